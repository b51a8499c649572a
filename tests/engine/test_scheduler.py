"""Who runs when, with which pages; no model is needed for that."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine import pages as pages_module
from shoal.engine.pages import PagePool
from shoal.engine.params import SamplingParams
from shoal.engine.plan import PAGE_TOKENS
from shoal.engine.sampler import Sampler
from shoal.engine.scheduler import MAX_PREFILLING, SCORE_ROWS, Scheduler, Slice, share_out
from shoal.engine.sequence import Produced, Sequence

VOCABULARY = 50
PARAMS = SamplingParams()


def sequence(
    length: int, *, seed: int = 0, max_tokens: int = 1000, tokens: list[int] | None = None, **more: Any
) -> Sequence:
    tokens = tokens or random.Random(seed * 10_007 + length).choices(range(VOCABULARY), k=length)
    sampler = Sampler(PARAMS, tokens, VOCABULARY)
    return Sequence(
        tokens=list(tokens), prompt_tokens=len(tokens), params=PARAMS, sampler=sampler, max_tokens=max_tokens, **more
    )


class Machine:
    """A scheduler whose network says 7 again and again."""

    def __init__(self, pages: int = 1000, *, step: int = 512, mixed: int = 128, running: int = 64) -> None:
        self.pool = PagePool(pages)
        self.scheduler = Scheduler(self.pool, step_tokens=step, mixed_tokens=mixed, max_running=running)

    def submit(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.scheduler.submit(one)

    def step(self, token: int = 7) -> dict[Sequence, Slice]:
        slices = self.scheduler.next_step()
        self.check(slices)
        for piece in slices:
            if piece.last:
                piece.sequence.accept(Produced(token=token))
            self.scheduler.settle(piece, 0)
            if piece.sequence.finish is not None:
                self.scheduler.remove(piece.sequence)
        assert len({piece.sequence for piece in slices}) == len(slices)
        return {piece.sequence: piece for piece in slices}

    def check(self, slices: list[Slice]) -> None:
        scheduler = self.scheduler
        self.pool.check([one.pages for one in (*scheduler.running, *scheduler.waiting)])
        assert not any(one.pages for one in scheduler.waiting)
        for piece in slices:
            assert piece.sequence in scheduler.running
            assert piece.tokens == piece.sequence.tokens[piece.start : piece.start + len(piece.tokens)]
            assert piece.start == piece.sequence.computed
            assert piece.start + piece.rows <= len(piece.sequence.pages) * PAGE_TOKENS, "no page to write to"
            first_written = piece.start // PAGE_TOKENS
            for page in piece.sequence.pages[first_written:]:
                others = [one for one in scheduler.running if one is not piece.sequence and page in one.pages]
                assert others == [], "a page that is written belongs to one sequence"


@given(st.integers(0, 300), st.lists(st.integers(1, 200), max_size=8))
def test_a_room_is_shared_evenly(room: int, wants: list[int]) -> None:
    given_ = share_out(room, wants)
    assert sum(given_) == min(room, sum(wants))
    assert all(0 <= got <= want for got, want in zip(given_, wants, strict=True))
    unmet = [got for got, want in zip(given_, wants, strict=True) if got < want]
    # Who is cut short has as much as anyone, up to what does not divide.
    assert not unmet or max(given_) - min(unmet) <= 1


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    machine = Machine()
    talking = [sequence(10, seed=seed) for seed in range(3)]
    machine.submit(*talking)
    machine.step()
    long = sequence(1000)
    machine.submit(long)
    steps = 0
    while long.produced == 0:
        slices = machine.step()
        assert all(slices[one].last and len(slices[one].tokens) == 1 for one in talking)
        assert len(slices[long].tokens) <= 128, "others wait for this piece"
        steps += 1
    assert steps == -(-1000 // 128)


def test_without_neighbours_a_prompt_is_read_in_large_pieces() -> None:
    machine = Machine()
    long = sequence(1300)
    machine.submit(long)
    assert [len(machine.step()[long].tokens) for _ in range(4)] == [512, 512, 276, 1]


def test_several_prompts_progress_and_a_short_one_is_not_stuck_behind_a_long_one() -> None:
    machine = Machine(step=100)
    long, middle, short = sequence(5000), sequence(400), sequence(30)
    machine.submit(long, middle, short)
    slices = machine.step()
    assert {one: len(piece.tokens) for one, piece in slices.items()} == {long: 35, middle: 35, short: 30}
    assert short.produced == 1
    for _ in range(12):
        machine.step()
    assert middle.produced > 0
    assert long.computed > 300


def test_only_some_long_prompts_are_read_side_by_side_but_all_short_ones_start() -> None:
    machine = Machine()
    machine.submit(*(sequence(4000, seed=seed) for seed in range(8)))
    assert len(machine.step()) == MAX_PREFILLING
    machine = Machine()
    machine.submit(*(sequence(10, seed=seed) for seed in range(40)))
    assert len(machine.step()) == 40


def test_no_more_than_allowed_run_and_the_others_follow_in_order() -> None:
    machine = Machine(running=2)
    sequences = [sequence(5, seed=seed, max_tokens=3) for seed in range(5)]
    machine.submit(*sequences)
    order: list[Sequence] = []
    for _ in range(20):
        order += [one for one in machine.step() if one not in order]
        assert len(machine.scheduler.running) <= 2
    assert order == sequences
    assert all(one.produced == 3 for one in sequences)


def test_a_full_cache_sends_the_youngest_back_and_the_oldest_goes_on() -> None:
    machine = Machine(pages=6)
    old, young = sequence(64 * 2, max_tokens=64 * 3), sequence(64 * 2, seed=1, max_tokens=64 * 3)
    machine.submit(old, young)
    while old.finish is None:
        before = len(old.tokens)
        machine.step()
        assert len(old.tokens) == before + 1
    assert old.preempted == 0
    assert young.preempted == 1  # once: it does not come back only to be sent away again
    while young.finish is None:
        machine.step()
    machine.pool.check([])


def test_who_comes_back_finds_its_pages_in_the_cache() -> None:
    machine = Machine(pages=6)
    old, young = sequence(64 * 2, max_tokens=64 * 3), sequence(64 * 2, seed=1, max_tokens=70)
    machine.submit(old, young)
    while young.preempted == 0:
        machine.step()
    cached = young.cached_tokens
    machine.scheduler.remove(old)
    piece = machine.step()[young]
    assert piece.start >= 64, "computed again from the start"
    assert cached == young.cached_tokens == 0, "statistics are of the prompt's first start"


def test_a_prompt_waits_until_the_cache_has_room_for_all_of_it_and_keeps_its_place() -> None:
    machine = Machine(pages=10)
    first, large, small = sequence(64 * 5), sequence(64 * 6, seed=1), sequence(10, seed=2)
    machine.submit(first, large, small)
    for _ in range(5):
        assert set(machine.step()) == {first}
    machine.scheduler.remove(first)
    assert {large, small} == set(machine.step())


def test_nobody_starts_who_would_soon_be_pushed_out_again() -> None:
    machine = Machine(pages=10)
    talking = [sequence(60, seed=seed, max_tokens=60) for seed in range(4)]  # a page each, and soon another
    machine.submit(*talking)
    machine.step()
    late = sequence(64 * 5, max_tokens=5)
    machine.submit(late)
    while late.finish is None:
        machine.step()
    assert all(one.preempted == 0 for one in (*talking, late))


def test_equal_prompts_are_read_once() -> None:
    machine = Machine()
    prompt = sequence(64 * 20 + 5).tokens
    choices = [sequence(0, tokens=prompt) for _ in range(4)]
    machine.submit(*choices)
    rows = 0
    while any(one.produced == 0 for one in choices):
        rows += sum(len(piece.tokens) for piece in machine.step().values() if piece.start < len(prompt))
    assert rows <= len(prompt) + 3 * (5 + PAGE_TOKENS)


def test_who_waits_for_another_s_prefix_starts_when_that_one_leaves() -> None:
    machine = Machine()
    prompt = sequence(64 * 20).tokens
    first, second, other = sequence(0, tokens=prompt), sequence(0, tokens=prompt), sequence(30, seed=5)
    machine.submit(first, second, other)
    assert set(machine.step()) == {first, other}  # nobody else waits with it
    machine.scheduler.remove(first)
    piece = machine.step()[second]
    assert piece.start >= 64 * 4, "what the first has read is there already"


def test_a_page_is_named_once() -> None:
    calls = 0
    original = pages_module.hashlib.blake2b

    def counting(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_module.hashlib, "blake2b", counting)
        machine = Machine(pages=60)
        machine.submit(*(sequence(640, seed=seed, max_tokens=70) for seed in range(5)))
        for _ in range(90):
            machine.step()
    assert 5 * 10 <= calls <= 5 * 12  # one for each full page, however often the scheduler asks


def test_guesses_never_push_a_sequence_out_and_are_limited() -> None:
    machine = Machine(pages=4)
    prompts = [sequence(0, tokens=[seed] * 62, draft_length=16) for seed in (1, 2)]
    machine.submit(*prompts)
    for _ in range(2):
        machine.step(token=1)
    slices = machine.scheduler.next_step()
    machine.check(slices)
    assert len(slices) == 2
    assert all(one.preempted == 0 for one in prompts)
    many = Machine()
    many.submit(*(sequence(0, tokens=[seed] * 40, draft_length=16) for seed in range(1, 20)))
    for _ in range(3):
        slices = many.scheduler.next_step()
        for piece in slices:
            piece.sequence.accept(Produced(token=piece.sequence.tokens[-1]))
            many.scheduler.settle(piece, 0)
    assert 16 < sum(len(piece.draft) for piece in slices) <= 64


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 40))
def test_a_guess_is_what_followed_the_same_three_tokens_last(text: list[int], length: int, most: int) -> None:
    """Against the plain definition, token after token, so that the index is built as the text grows."""
    one = sequence(0, tokens=text[:1], max_tokens=most + len(text), draft_length=length)
    for token in text[1:]:
        one.draft()
        one.tokens.append(token)
    end = len(text)
    limit = min(length, one.max_tokens - one.produced - 1)
    found = [at for at in range(3, end) if text[at - 3 : at] == text[end - 3 :] and end >= 3]
    expected = list(text)
    for step in range(limit if found else 0):
        expected.append(expected[found[-1] + step])
    assert one.draft() == expected[end:]


def test_scored_prompts_ask_for_few_rows_at_a_time_and_for_each_once() -> None:
    seen: list[tuple[int, int]] = []
    scored = sequence(300, max_tokens=0, watch=lambda first, rows: None)
    plain = sequence(300, seed=1)
    machine = Machine()
    machine.submit(scored, plain)
    while scored.computed < 300:
        piece = machine.scheduler.next_step()[0]
        assert piece.sequence is scored
        assert len(piece.tokens) <= SCORE_ROWS
        seen.append((piece.start + piece.logits_from, piece.start + len(piece.tokens)))
        scored.watched = seen[-1][1]
        machine.scheduler.settle(piece, 0)
    assert seen == [(0, 128), (128, 256), (256, 300)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_the_books_agree_and_everyone_finishes(data: st.DataObject) -> None:
    """Random arrivals, cancellations at any moment and a cache of random size; `Machine.check` holds after each."""
    pages = data.draw(st.integers(4, 12), label="pages")
    machine = Machine(
        pages,
        step=data.draw(st.integers(8, 200)),
        mixed=data.draw(st.integers(4, 100)),
        running=data.draw(st.integers(1, 5)),
    )
    alive: list[Sequence] = []
    done: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 40), label="events")):
        event = data.draw(st.sampled_from(["submit", "step", "step", "cancel"]))
        if event == "submit":
            length = data.draw(st.integers(1, 3 * PAGE_TOKENS))
            shared = data.draw(st.booleans())
            tokens = [1] * length if shared else None
            most = min(data.draw(st.integers(1, 90)), pages * PAGE_TOKENS - length)
            one = sequence(
                length, seed=len(alive), max_tokens=most, tokens=tokens, draft_length=data.draw(st.integers(0, 3))
            )
            alive.append(one)
            machine.submit(one)
        elif event == "step":
            machine.step()
        elif alive:
            one = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            machine.scheduler.remove(one)
        done += [one for one in alive if one.finish]
        alive = [one for one in alive if not one.finish]
        machine.check([])
    for _ in range(4000):
        if not any(one.finish is None for one in alive):
            break
        assert machine.step(), "someone waits and nothing runs"
    assert all(one.produced == one.max_tokens for one in (*alive, *done))
    machine.pool.check([])
