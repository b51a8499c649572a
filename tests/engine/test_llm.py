"""`shoal.LLM` from outside: streams, endings, log-probabilities, scoring, refusals."""

from __future__ import annotations

import math
import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.engine.conftest import VOCABULARY, TinyTokenizer, assert_idle, open_tiny, set_steps, some_tokens

from shoal import LLM
from shoal.engine import Chunk, SamplingParams, Stats, TokenLogprob
from shoal.engine.sampler import likeliest
from shoal.errors import RequestError
from shoal.formats.checkpoint import Checkpoint
from shoal.machine import processors, staying_on

PROMPT = some_tokens(20)
GREEDY = SamplingParams(temperature=0, max_tokens=25)
WILD = SamplingParams(temperature=5.0, seed=3, max_tokens=150)


@pytest.fixture(scope="module")
def llm(llama: tuple[Any, Checkpoint]) -> LLM:
    return open_tiny(llama[1])


@pytest.fixture(autouse=True)
def idle(llm: LLM) -> Any:
    yield
    assert_idle(llm)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


# ---- text


def test_a_stream_is_the_whole_answer_in_pieces(llm: LLM) -> None:
    whole = llm.generate(PROMPT, WILD)
    chunks = list(llm.stream(PROMPT, WILD))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].finish_reason, chunks[-1].token_ids) == ("length", ())
    assert all(chunk.stats is None for chunk in chunks[:-1])
    stats = chunks[-1].stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.completion_tokens) == (20, 150)
    assert stats.prompt_seconds > 0 and stats.decode_seconds > 0


def test_the_speed_of_a_prompt_counts_what_was_read(llm: LLM) -> None:
    stats = Stats(prompt_tokens=100, cached_tokens=64, completion_tokens=2, prompt_seconds=0.5, decode_seconds=0.1)
    assert stats.prompt_tok_s == 72


def test_code_points_split_over_tokens_come_whole(llm: LLM) -> None:
    tokenizer = TinyTokenizer()
    chunks = list(llm.stream(PROMPT, WILD))
    raw = b"".join(tokenizer.token_bytes(token) for chunk in chunks for token in chunk.token_ids)
    text = "".join(chunk.text for chunk in chunks)
    assert text == raw.decode(errors="replace")
    assert "�" in text, "no half code point was produced"
    for chunk in chunks:
        chunk.text.encode()  # no lone surrogates
    # The three bytes of a euro sign, forced one after the other: nothing, nothing, the sign.
    parts = tokenizer.encode("!")
    for byte in "€".encode():
        bias = {tokenizer._bytes.index(bytes([byte])): 100.0}
        answer = llm.stream(parts, SamplingParams(temperature=0, max_tokens=1, logit_bias=bias))
        parts.extend(token for chunk in answer for token in chunk.token_ids)
    decoder = tokenizer.stream()
    assert [decoder.push(token) for token in parts] == ["!", "", "", "€"]


class Spaced(TinyTokenizer):
    """Every token starts with a space, as a SentencePiece vocabulary's words do."""

    strips_first_space = True

    def token_bytes(self, token: int) -> bytes:
        return b" " + super().token_bytes(token)


def test_a_continuation_keeps_its_first_space_and_an_answer_has_none(
    llama: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_tiny(replace(llama[1], load_tokenizer=Spaced))
    monkeypatch.setattr(llm, "encode_chat", lambda messages, **options: PROMPT)
    text = llm.generate(PROMPT, GREEDY).text
    assert text[0] == " " and text[1] != " "
    assert llm.chat([{"role": "user", "content": "x"}], GREEDY).text == text[1:]


def test_stop_strings_may_span_tokens_and_are_left_out(llm: LLM) -> None:
    whole = llm.generate(PROMPT, WILD)
    pieces = [TinyTokenizer().token_bytes(token).decode(errors="replace") for token in whole.token_ids]
    stop = pieces[7][-1] + pieces[8] + pieces[9][0]
    cut = whole.text.index(stop)
    for stops in ((stop,), ("never", stop, stop + "and on")):
        answer = llm.generate(PROMPT, replace(WILD, stop=stops))
        assert (answer.text, answer.finish_reason) == (whole.text[:cut], "stop")
        assert len(answer.token_ids) <= 10
        streamed = list(llm.stream(PROMPT, replace(WILD, stop=stops)))
        assert "".join(chunk.text for chunk in streamed) == answer.text
    assert llm.generate(PROMPT, replace(WILD, stop=("never",))).text == whole.text


def test_an_end_of_text_token_ends_and_is_left_out(llama: tuple[Any, Checkpoint]) -> None:
    tokens = open_tiny(llama[1]).generate(PROMPT, GREEDY).token_ids
    end = next(token for index, token in enumerate(tokens) if index > 2 and token not in tokens[:index])
    at = tokens.index(end)
    ending = open_tiny(replace(llama[1], config=replace(llama[1].config, eos_token_id=(end,))))
    answer = ending.generate(PROMPT, GREEDY)
    assert (answer.token_ids, answer.finish_reason) == (tokens[:at], "stop")
    assert ending.generate(PROMPT, replace(GREEDY, ignore_eos=True)).token_ids == tokens
    speculating = open_tiny(replace(llama[1], config=replace(llama[1].config, eos_token_id=(end,))), speculate=8)
    assert speculating.generate(PROMPT, GREEDY).token_ids == tokens[:at]
    assert_idle(ending)
    assert_idle(speculating)


def test_the_context_ends_a_text(llama: tuple[Any, Checkpoint]) -> None:
    small = open_tiny(llama[1], max_context=32, cache_tokens=100)
    answer = small.generate(PROMPT, SamplingParams(temperature=0))
    assert (len(answer.token_ids), answer.finish_reason) == (12, "length")
    assert len(small.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1000)).token_ids) == 12
    assert small.generate(PROMPT[:1] * 31, GREEDY).finish_reason == "length"
    with pytest.raises(RequestError, match="32") as refused:
        small.generate(PROMPT[:1] * 32, GREEDY)
    assert refused.value.code == "context_length_exceeded"
    assert len(small.logits(PROMPT[:1] * 32)) == 32
    with pytest.raises(RequestError):
        small.logits(PROMPT[:1] * 33)


# ---- log-probabilities


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.3, "top_k": 3, "repetition_penalty": 1.5, "seed": 1}])
def test_logprobs_are_the_model_s_own(llm: LLM, changes: dict[str, Any]) -> None:
    answer = llm.generate(PROMPT, replace(GREEDY, logprobs=5, **changes))
    rows = log_softmax(llm.logits([*PROMPT, *answer.token_ids]))[len(PROMPT) - 1 :]
    assert len(answer.logprobs) == 25
    for entry, row in zip(answer.logprobs, rows, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-5)
        assert [token for token, _, _ in entry.top] == likeliest(row, 5)
        assert [value for _, _, value in entry.top] == pytest.approx(
            [row[token] for token, _, _ in entry.top], abs=1e-5
        )
        assert entry.text_bytes == TinyTokenizer().token_bytes(entry.token_id)
        assert sum(math.exp(value) for _, _, value in entry.top) <= 1 + 1e-6
    assert llm.generate(PROMPT, replace(GREEDY, logprobs=0)).logprobs[0].top == ()
    assert llm.generate(PROMPT, GREEDY).logprobs == ()


def assert_scores(entries: list[TokenLogprob], tokens: list[int], rows: np.ndarray, top: int) -> None:
    assert [entry.token_id for entry in entries] == tokens
    assert math.isnan(entries[0].logprob) and entries[0].top == ()
    for entry, row in zip(entries[1:], rows, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-5)
        assert [token for token, _, _ in entry.top] == likeliest(row, top)


def test_scores_of_a_text(llm: LLM) -> None:
    tokens = some_tokens(300)
    rows = log_softmax(llm.logits(tokens))
    assert_scores(llm.score(tokens, top=3), tokens, rows, 3)
    assert_scores(llm.score(tokens), tokens, rows, 0)
    assert_scores(llm.score(tokens[:1], top=2), tokens[:1], rows, 2)
    with pytest.raises(RequestError):
        llm.score(tokens, top=1000)
    with pytest.raises(RequestError):
        llm.score([])


def test_scores_are_the_same_after_a_cached_prefix_and_under_pressure(llama: tuple[Any, Checkpoint]) -> None:
    tokens = some_tokens(200)
    llm = open_tiny(llama[1], cache_tokens=7 * 64)
    expected = llm.score(tokens, top=2)
    assert str(llm.score(tokens, top=2)) == str(expected)  # NaN is not equal to itself
    # An older neighbour grows and pushes the text out while its scores are half done.
    set_steps(llm, step=200, mixed=2)
    old = llm.prepare(some_tokens(120, seed=5), replace(WILD, max_tokens=100))
    young = llm.prepare(tokens, SamplingParams(logprobs=2), score=True, generate=False)
    old.start()
    llm.step()
    young.start()
    chunks: list[Chunk] = []
    while not young.done:
        llm.step()
        old.ready()
        chunks += young.ready()
    assert young._sequence.preempted == 1
    assert str(list(chunks[0].logprobs)) == str(expected)


def test_a_prompt_can_be_scored_and_continued(llm: LLM) -> None:
    params = replace(GREEDY, logprobs=2)
    first, *rest = llm.prepare(PROMPT, params, score=True).chunks()
    assert str(list(first.logprobs)) == str(llm.score(PROMPT, top=2))
    assert (first.text, first.token_ids) == ("", ())
    assert [chunk.token_ids for chunk in rest] == [chunk.token_ids for chunk in llm.stream(PROMPT, params)]
    only, last = llm.prepare(PROMPT, params, score=True, generate=False).chunks()
    assert str(only) == str(first)
    assert (last.finish_reason, last.token_ids, last.text) == ("length", (), "")


def test_scoring_holds_few_rows_of_logits(llama: tuple[Any, Checkpoint]) -> None:
    llm = open_tiny(llama[1])
    llm.score(some_tokens(900))
    assert len(llm._core._logits) <= 128


def test_padding_rows_of_the_table_are_never_chosen_and_do_not_count(llama: tuple[Any, Checkpoint]) -> None:
    class Small(TinyTokenizer):
        vocab_size = 50

    small = open_tiny(replace(llama[1], load_tokenizer=Small))
    prompt = [token % 50 for token in PROMPT]
    answer = small.generate(prompt, replace(WILD, logprobs=20))
    assert max(answer.token_ids) < 50
    rows = log_softmax(small.logits([*prompt, *answer.token_ids])[:, :50])[len(prompt) - 1 :]
    assert answer.logprobs[0].logprob == pytest.approx(rows[0, answer.token_ids[0]], abs=1e-5)
    entry = small.score(prompt, top=20)[-1]
    assert max(token for token, _, _ in entry.top) < 50


# ---- what is refused


@pytest.mark.parametrize("prompt", [[], [VOCABULARY], [-1], [1.5], [True], ["a"], [2**70]])
def test_impossible_prompts_are_refused_before_anything_runs(llm: LLM, prompt: list[Any]) -> None:
    for ask in (llm.stream, llm.prepare, llm.score, llm.logits):
        with pytest.raises(RequestError):
            ask(prompt)


def test_impossible_options_are_refused(llama: tuple[Any, Checkpoint]) -> None:
    for options in (
        {"threads": 0}, {"threads": 10_000}, {"max_context": 0}, {"cache_tokens": 0}, {"speculate": -1},
        {"speculate": 1000}, {"max_running": 0},
    ):  # fmt: skip
        with pytest.raises(RequestError, match=next(iter(options))):
            open_tiny(llama[1], **options)
    for options in ({"weights": "q3"}, {"cache": "f64"}, {"activations": "int4"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            open_tiny(llama[1], **options)


def test_a_bias_that_leaves_nothing_is_that_request_s_error(llm: LLM) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        llm.prepare(PROMPT, SamplingParams(logit_bias=dict.fromkeys(range(VOCABULARY), -100.0)))
    one = SamplingParams(logit_bias=dict.fromkeys(range(1, VOCABULARY), -100.0), max_tokens=3)
    assert llm.generate(PROMPT, one).token_ids == (0, 0, 0)


def test_speculation_leaves_the_distribution_unchanged(llama: tuple[Any, Checkpoint]) -> None:
    """Two tokens drawn with guessing 1500 times against the exact probabilities, by chi-square."""
    llm = open_tiny(llama[1], speculate=3, cache_tokens=8192)
    params = SamplingParams(temperature=0.8, top_k=4, max_tokens=2)
    prompt = _prompt_with_a_likely_guess(llm)
    generations = [llm.prepare(prompt, replace(params, seed=seed)) for seed in range(1500)]
    drawn: dict[tuple[int, ...], int] = {}
    accepted = 0
    for start in range(0, len(generations), 60):
        group = generations[start : start + 60]
        for generation in group:
            generation.start()
        while not all(generation.done for generation in group):
            llm.step()
            for generation in group:
                chunks = generation.ready()
                if chunks and chunks[-1].stats:
                    accepted += chunks[-1].stats.accepted
        for generation in group:
            pair = tuple(generation._sequence.tokens[len(prompt) :])
            drawn[pair] = drawn.get(pair, 0) + 1
    expected = {
        (first, second): p * q
        for first, p in _top(llm, prompt, params).items()
        for second, q in _top(llm, [*prompt, first], params).items()
    }
    assert set(drawn) <= set(expected)
    statistic = sum((drawn.get(pair, 0) - 1500 * p) ** 2 / (1500 * p) for pair, p in expected.items())
    assert statistic < 45  # 15 degrees of freedom: beyond it once in 10 000 seeds
    assert 100 < accepted < 1400, "the guess is never or always right, which tells little"
    assert_idle(llm)


def _prompt_with_a_likely_guess(llm: LLM) -> list[int]:
    """A text whose last three tokens stood there before, followed by a token that the model may well choose now."""
    rng = random.Random(0)
    while True:
        gram, rest = rng.choices(range(VOCABULARY), k=3), rng.choices(range(VOCABULARY), k=6)
        for guess in range(VOCABULARY):
            prompt = [*gram, guess, *rest, *gram]
            if likeliest(llm.logits(prompt)[-1], 2)[1] == guess:
                return prompt


def _top(llm: LLM, tokens: list[int], params: SamplingParams) -> dict[int, float]:
    row = llm.logits(tokens)[-1].astype(np.float64)
    ids = likeliest(row, params.top_k)
    weights = np.exp((row[ids] - row[ids].max()) / params.temperature)
    return dict(zip(ids, (weights / weights.sum()).tolist(), strict=True))


@pytest.mark.skipif(len(processors()) < 2, reason="needs two processors and a system that tells them")
def test_the_team_s_helpers_start_where_they_are_told_and_the_caller_stays_free(llama: tuple[Any, Checkpoint]) -> None:
    every = processors()
    before = set(os.listdir("/proc/self/task"))
    llm = open_tiny(llama[1], threads=2, helpers_on=every[1:2])
    new = set(os.listdir("/proc/self/task")) - before
    assert {frozenset(os.sched_getaffinity(int(thread))) for thread in new} == {frozenset(every[1:2])}
    assert processors() == every
    with staying_on(every[:1]):
        assert processors() == every[:1]
        assert llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=3)).token_ids
    assert processors() == every
