"""Leaving early, failing, sharing: one request's end never touches another, and every page comes back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.engine.conftest import (
    Gate,
    assert_idle,
    check_books,
    in_memory,
    open_tiny,
    set_steps,
    some_tokens,
    with_prediction_layer,
)

from shoal import LLM
from shoal.engine import SamplingParams
from shoal.errors import ConfigError, RequestError, ShoalError
from shoal.formats.checkpoint import Checkpoint

PROMPT = some_tokens(150)
GREEDY = SamplingParams(temperature=0, max_tokens=20)
SAMPLED = SamplingParams(seed=4, max_tokens=20)


@pytest.fixture
def llm(llama: tuple[Any, Checkpoint]) -> Iterator[LLM]:
    one = open_tiny(llama[1])
    yield one
    assert_idle(one)


@pytest.fixture(scope="module")
def expected(llama: tuple[Any, Checkpoint]) -> tuple[int, ...]:
    return open_tiny(llama[1]).generate(PROMPT, SAMPLED).token_ids


def drain(llm: LLM, *generations: Any) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in generations]
    while not all(generation.done for generation in generations):
        llm.step()
        for tokens, generation in zip(out, generations, strict=True):
            tokens.extend(token for chunk in generation.ready() for token in chunk.token_ids)
        check_books(llm)
    return out


# ---- leaving


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 40])
def test_leaving_in_any_state_frees_all_pages(llm: LLM, steps: int, expected: tuple[int, ...]) -> None:
    set_steps(llm, step=100, mixed=50)  # 0: waits; 1: reads its prompt; 2: has its first token; 40: has finished
    generation = llm.prepare(PROMPT, SAMPLED)
    generation.start()
    for _ in range(steps):
        llm.step()
    for _ in range(2):  # twice does no harm
        generation.cancel()
        assert_idle(llm)
    assert generation.ready() == []
    assert not llm.step()
    assert llm.generate(PROMPT, SAMPLED).token_ids == expected


def test_a_request_that_left_before_it_started_never_runs(llm: LLM) -> None:
    generation = llm.prepare(PROMPT, SAMPLED)
    generation.cancel()
    generation.start()
    assert not llm.step()
    assert list(generation.chunks()) == []


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_closing_a_stream_frees_all_pages(llm: LLM, taken: int) -> None:
    stream = llm.stream(PROMPT, SAMPLED)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert_idle(llm)


def test_an_abandoned_stream_frees_all_pages(llm: LLM) -> None:
    next(llm.stream(PROMPT, SAMPLED))
    assert_idle(llm)


def test_leaving_in_the_middle_of_a_step_frees_pages_at_once(llm: LLM, expected: tuple[int, ...]) -> None:
    gate = Gate(llm)
    doomed, kept = llm.prepare(PROMPT[:130][::-1], GREEDY), llm.prepare(PROMPT, SAMPLED)
    doomed.start()
    kept.start()
    with ThreadPoolExecutor(1) as pool:
        gate.open.clear()
        step = pool.submit(llm.step)
        gate.entered.acquire()
        before = llm.load.pages_in_use
        doomed.cancel()
        assert llm.load.running == 1
        assert llm.load.pages_in_use == before - 3
        late = llm.prepare(PROMPT[:70], GREEDY)
        late.start()  # does not wait for the step either, and gets the pages only after it
        late.cancel()
        gate.open.set()
        step.result()
    assert tuple(drain(llm, kept)[0]) == expected


def test_leaving_never_waits_for_the_lock(llm: LLM, expected: tuple[int, ...]) -> None:
    """The garbage collector may close a stream while its own thread is inside the scheduler."""
    kept, doomed = llm.prepare(PROMPT, SAMPLED), llm.prepare(PROMPT[::-1], GREEDY)
    kept.start()
    doomed.start()
    scheduler = llm._core._scheduler
    plan = scheduler.next_step

    def collecting() -> Any:
        slices = plan()
        doomed.cancel()
        assert doomed._sequence in scheduler.running, "taken out under the scheduler's hands"
        return slices

    scheduler.next_step = collecting  # type: ignore[method-assign]
    assert llm.step()
    scheduler.next_step = plan  # type: ignore[method-assign]
    assert llm.load.running == 1
    assert tuple(drain(llm, kept)[0]) == expected


def test_a_long_prompt_can_be_given_up_by_another_thread(llm: LLM) -> None:
    gate = Gate(llm)
    set_steps(llm, step=1)
    gate.hold_from = 3
    gate.open.clear()
    generation = llm.prepare(PROMPT, SAMPLED)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(lambda: list(generation.chunks()))
        for _ in range(3):
            gate.entered.acquire()
        generation.cancel()
        gate.open.set()
        assert taken.result(10) == []
    assert gate.steps == 3


# ---- failing


def test_a_failure_in_choosing_fails_that_request_only(llm: LLM, expected: tuple[int, ...]) -> None:
    class Broken:
        def choose(self, logits: np.ndarray, best: int) -> int:
            raise ZeroDivisionError("broken")

    bad, good = llm.prepare(PROMPT, SAMPLED), llm.prepare(PROMPT, SAMPLED)
    bad._sequence.sampler = Broken()  # type: ignore[assignment]
    bad.start()
    good.start()
    for _ in range(3):
        llm.step()
    with pytest.raises(ZeroDivisionError, match="broken"):
        bad.ready()
    assert bad.done
    assert bad.ready() == []
    assert tuple(drain(llm, good)[0]) == expected


def test_a_failing_request_gives_what_it_had_first(llm: LLM) -> None:
    generation = llm.prepare(PROMPT, SAMPLED)
    generation.start()
    for _ in range(3):
        llm.step()
    generation._sequence.fail(ValueError("late"))
    assert sum(len(chunk.token_ids) for chunk in generation.ready()) == 3
    with pytest.raises(ValueError, match="late"):
        generation.ready()


def test_a_bias_that_meets_an_impossible_token_fails_that_request_only(llm: LLM, expected: tuple[int, ...]) -> None:
    good = llm.prepare(PROMPT, SAMPLED)
    good.start()
    llm.step()
    banned = dict.fromkeys(range(96), -100.0)
    bad = llm.prepare(PROMPT, SamplingParams(logit_bias=banned))
    rows = llm._core._choose
    llm._core._choose = lambda sequence, draft, logits, best: rows(  # type: ignore[method-assign]
        sequence, draft, np.where(np.arange(97) == 96, -math.inf, logits).astype(np.float32)
        if sequence is bad._sequence else logits, best,
    )  # fmt: skip
    with pytest.raises(RequestError, match="logit_bias"):
        list(bad.chunks())
    assert tuple(drain(llm, good)[0]) == expected


def test_a_failing_step_fails_whoever_was_in_it_and_the_engine_goes_on(llm: LLM, expected: tuple[int, ...]) -> None:
    gate = Gate(llm)
    gate.fails = MemoryError("no room for the buffers")
    both = [llm.prepare(PROMPT, SAMPLED), llm.prepare(PROMPT[::-1], GREEDY)]
    for generation in both:
        generation.start()
    llm.step()
    for generation in both:
        with pytest.raises(MemoryError):
            generation.ready()
    assert_idle(llm)
    with pytest.raises(MemoryError):
        llm.score(PROMPT)
    gate.fails = None
    assert llm.generate(PROMPT, SAMPLED).token_ids == expected


def test_a_failing_prediction_layer_fails_whoever_was_in_the_step(v3: tuple[Any, Checkpoint]) -> None:
    llm = open_tiny(with_prediction_layer(v3[1]), look_ahead=True)
    expected = llm.generate(PROMPT, SAMPLED).token_ids
    gate = Gate(llm)
    gate.fails, gate.fails_at = MemoryError("no room"), lambda arrays: len(arrays) > 6 and arrays[6] == 1
    with pytest.raises(MemoryError):
        llm.generate(PROMPT, SAMPLED)
    gate.fails = None
    assert llm.generate(PROMPT, SAMPLED).token_ids == expected
    assert_idle(llm)


@pytest.fixture(scope="module")
def poisoned(v2: tuple[Any, Checkpoint]) -> Checkpoint:
    """The embedding of token 5 is not a number."""
    tensors = {name: tensor.read() for name, tensor in v2[1].tensors.items()}
    table = tensors["model.embed_tokens.weight"].copy()
    table[5] = math.nan
    return in_memory(v2[1].config, {**tensors, "model.embed_tokens.weight": table})


@pytest.mark.parametrize("options", [{}, {"weights": "q8", "cache": "bf16"}])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_scores_that_are_no_numbers_end_that_request_only(
    v2: tuple[Any, Checkpoint], poisoned: Checkpoint, options: dict[str, str], params: SamplingParams
) -> None:
    clean = [token if token != 5 else 6 for token in PROMPT]
    params = replace(params, logit_bias={5: -100.0})
    expected = open_tiny(v2[1], **options).generate(clean, params).token_ids
    llm = open_tiny(poisoned, **options, cache_tokens=448)
    # The sick one shares pages with the healthy one, and ends in the same step as it is read.
    bad, good = llm.prepare([*clean[:140], 5], params), llm.prepare(clean, params)
    bad.start()
    good.start()
    while bad._sequence.finish is None:
        llm.step()
    with pytest.raises(ShoalError, match="not finite"):
        bad.ready()
    assert tuple(drain(llm, good)[0]) == expected
    with pytest.raises(ShoalError, match="not finite"):
        llm.score([1, 2, 5, 3])
    # Pages that held bad numbers serve others.
    for seed in (1, 2):
        healthy = [token if token != 5 else 6 for token in some_tokens(300, seed=seed)]
        twin = open_tiny(v2[1], **options)
        assert llm.generate(healthy, params).token_ids == twin.generate(healthy, params).token_ids
    assert_idle(llm)


# ---- sharing one engine


def test_many_threads_share_one_engine(llama: tuple[Any, Checkpoint]) -> None:
    llm = open_tiny(llama[1], cache_tokens=1024, speculate=3)
    prompts = [some_tokens(3 + 11 * index, seed=index % 5) for index in range(24)]
    solo = open_tiny(llama[1])
    expected = [solo.generate(prompt, replace(SAMPLED, seed=index)).token_ids for index, prompt in enumerate(prompts)]
    largest = 0
    run = llm._core._compute

    def watched(batch: Any, done: Any) -> None:
        nonlocal largest
        largest = max(largest, len(batch.slices))
        run(batch, done)

    llm._core._compute = watched  # type: ignore[method-assign]
    with ThreadPoolExecutor(12) as pool:
        results = pool.map(
            lambda item: llm.generate(item[1], replace(SAMPLED, seed=item[0])).token_ids, enumerate(prompts)
        )
        assert list(results) == expected
    assert largest > 1, "they ran one after the other"
    assert_idle(llm)


def test_threads_that_leave_and_stay(llama: tuple[Any, Checkpoint]) -> None:
    llm = open_tiny(llama[1], cache_tokens=512)
    expected = open_tiny(llama[1]).generate(PROMPT, SAMPLED).token_ids

    def ask(index: int) -> tuple[int, ...]:
        if index % 2:
            return llm.generate(PROMPT, SAMPLED).token_ids
        stream = llm.stream(PROMPT[index:], replace(GREEDY, max_tokens=300))
        for _ in range(index):
            next(stream)
        stream.close()
        return expected

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(24))) == {expected}
    assert_idle(llm)


def test_a_thread_that_does_not_read_delays_nobody(llm: LLM, expected: tuple[int, ...]) -> None:
    stream = llm.stream(PROMPT[:10], GREEDY)
    next(stream)  # and then never again
    assert llm.generate(PROMPT, SAMPLED).token_ids == expected
    assert len([token for chunk in stream for token in chunk.token_ids]) == 19


def test_while_one_thread_computes_another_waits_without_stepping(llm: LLM) -> None:
    gate = Gate(llm)
    first, second = llm.prepare(PROMPT, GREEDY), llm.prepare(PROMPT[::-1], GREEDY)
    with ThreadPoolExecutor(2) as pool:
        gate.open.clear()
        both = [pool.submit(lambda g=g: sum(len(c.token_ids) for c in g.chunks())) for g in (first, second)]
        gate.entered.acquire()
        time.sleep(0.05)
        assert gate.steps == 1
        gate.open.set()
        assert [one.result(20) for one in both] == [20, 20]
    assert gate.steps <= 45, "they did not run together"


# ---- memory


def test_too_little_memory_is_refused_with_the_numbers(
    llama: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_left(count: int) -> Callable[[], int]:
        return lambda: count

    checkpoint = llama[1]
    from shoal.engine.memory import cache_bytes, weight_bytes

    needed = weight_bytes(checkpoint, checkpoint.config, "f32") + cache_bytes(checkpoint.config, "f32", 1024)
    monkeypatch.setattr("shoal.engine.memory.available_bytes", with_left(needed))
    open_tiny(checkpoint)
    monkeypatch.setattr("shoal.engine.memory.available_bytes", with_left(needed - 1))
    with pytest.raises(ConfigError, match=r"tiny needs \d\.\d\d GB .* cache of 1024 tokens; \d\.\d\d GB are available"):
        open_tiny(checkpoint)
    open_tiny(checkpoint, cache_tokens=512)
    monkeypatch.setattr("shoal.engine.memory.available_bytes", with_left(1000))
    with pytest.raises(ConfigError, match=r"weights: tiny needs .* for its weights, 0\.00 GB are available"):
        open_tiny(checkpoint)
