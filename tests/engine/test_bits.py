"""The same bits, whatever else happens: chunks, neighbours, pages, shared prefixes, threads, guesses, evictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.engine.conftest import (
    LLAMA,
    V2,
    V3,
    check_books,
    open_tiny,
    set_steps,
    some_tokens,
    tiny,
    with_prediction_layer,
)

from shoal import LLM
from shoal.engine import SamplingParams
from shoal.engine.generation import Generation
from shoal.formats.checkpoint import Checkpoint

EXACT = {"weights": "f32", "cache": "f32"}
SMALL = {"weights": "q8", "cache": "bf16", "activations": "int8"}
WIDE = {"weights": "q4m", "cache": "bf16", "activations": "int16"}
TINY = {"weights": "q8", "cache": "int8", "activations": "int8"}
AHEAD = {**EXACT, "look_ahead": True}
# One configuration for each path through the kernels: both attentions, experts, every kind of weights and cache; and
# one that guesses with a prediction layer, alone and beside the guesses from the text.
KINDS = {
    "v2": (V2, EXACT),
    "v2-q8": (V2, SMALL),
    "v3": (V3, EXACT),
    "v3-q4": (V3, WIDE),
    "v3-int8": (V3, TINY),
    "v3-ahead": (V3, AHEAD),
    "llama-q8": (LLAMA, SMALL),
    "llama-int8": (LLAMA, TINY),
}
GREEDY = SamplingParams(temperature=0, max_tokens=30)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.95, seed=11, max_tokens=30, logprobs=3)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Checkpoint, dict[str, Any]]:
    case, options = KINDS[request.param]
    checkpoint = tiny(case)[1]
    return with_prediction_layer(checkpoint) if options.get("look_ahead") else checkpoint, options


def logits_in_chunks(llm: LLM, tokens: list[int], step: int) -> np.ndarray:
    set_steps(llm, step=step)
    return llm.logits(tokens)


def texts(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[Any]:
    """Answers to all prompts at once, stepped by this thread; what was produced, without the timing."""
    generations = [llm.prepare(prompt, params) for prompt in prompts]
    for generation in generations:
        generation.start()
    return collect(llm, generations)


def collect(llm: LLM, generations: list[Generation]) -> list[Any]:
    chunks: list[list[Any]] = [[] for _ in generations]
    while not all(generation.done for generation in generations):
        llm.step()
        for mine, generation in zip(chunks, generations, strict=True):
            mine.extend(generation.ready())
        check_books(llm)
    return [
        ([token for chunk in mine for token in chunk.token_ids], [one for chunk in mine for one in chunk.logprobs])
        for mine in chunks
    ]


def test_chunks(kind: tuple[Checkpoint, dict[str, Any]]) -> None:
    checkpoint, options = kind
    llm = open_tiny(checkpoint, **options)
    tokens = some_tokens(290)
    whole = logits_in_chunks(llm, tokens, 512)
    for step in (1, 3, 64, 100):
        np.testing.assert_array_equal(logits_in_chunks(llm, tokens, step), whole)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(kind: tuple[Checkpoint, dict[str, Any]], threads: int) -> None:
    checkpoint, options = kind
    tokens = some_tokens(290)
    alone, team = open_tiny(checkpoint, **options), open_tiny(checkpoint, **options, threads=threads)
    assert team._core.threads == threads
    np.testing.assert_array_equal(team.logits(tokens), alone.logits(tokens))
    assert texts(team, [tokens[:40]], SAMPLED) == texts(alone, [tokens[:40]], SAMPLED)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_neighbours_pages_and_the_size_of_steps(
    kind: tuple[Checkpoint, dict[str, Any]], params: SamplingParams
) -> None:
    checkpoint, options = kind
    prompts = [some_tokens(length, seed=length) for length in (1, 5, 63, 64, 65, 140, 200)]
    solo = open_tiny(checkpoint, **options)
    expected = [texts(solo, [prompt], params)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens, _ in expected}) == len(prompts)
    for step, mixed in ((512, 128), (7, 5), (64, 3)):
        together = open_tiny(checkpoint, **options)
        set_steps(together, step=step, mixed=mixed)
        assert texts(together, prompts, params) == expected
        # Again over pages that others have used, in another order.
        texts(together, [some_tokens(150, seed=99)], params)
        assert texts(together, prompts[::-1], params) == expected[::-1]


def test_a_shared_prefix(kind: tuple[Checkpoint, dict[str, Any]]) -> None:
    checkpoint, options = kind
    start = some_tokens(130)
    prompts = [start + some_tokens(20, seed=seed) for seed in (2, 3)] + [start[:128], start[:129]]
    expected = [texts(open_tiny(checkpoint, **options), [prompt], SAMPLED)[0] for prompt in prompts]
    llm = open_tiny(checkpoint, **options)
    for prompt, result in zip(prompts, expected, strict=True):
        assert texts(llm, [prompt], SAMPLED) == [result]
    cached = [llm.generate(prompt, GREEDY).stats.cached_tokens for prompt in prompts]
    assert cached == [128, 128, 64, 128]  # whole pages, and one token is left to run


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_guesses(kind: tuple[Checkpoint, dict[str, Any]], params: SamplingParams) -> None:
    checkpoint, options = kind
    prompt = some_tokens(9) * 9  # a text that repeats itself, as guesses want it
    prompts = [prompt, prompt[3:], some_tokens(40)]
    plain = texts(open_tiny(checkpoint, **options), prompts, params)
    for length in (1, 4, 16):
        assert texts(open_tiny(checkpoint, **options, speculate=length), prompts, params) == plain


def test_guesses_are_made_and_some_are_right() -> None:
    checkpoint = tiny(LLAMA)[1]
    llm = open_tiny(checkpoint, speculate=4)
    # The guesses of a random model come true where its greedy text runs into a loop.
    stats = llm.generate(some_tokens(9) * 9, SamplingParams(temperature=0, max_tokens=300)).stats
    assert 0 < stats.accepted <= stats.drafted


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_full_cache(kind: tuple[Checkpoint, dict[str, Any]], params: SamplingParams) -> None:
    """Requests that do not fit together give way to each other and continue as if nothing had happened."""
    checkpoint, options = kind
    prompts = [some_tokens(length, seed=length) for length in (50, 60, 62, 100, 120)]
    expected = texts(open_tiny(checkpoint, **options), prompts, params)
    narrow = open_tiny(checkpoint, **options, cache_tokens=256)
    generations = [narrow.prepare(prompt, params) for prompt in prompts]
    for generation in generations:
        generation.start()
    assert collect(narrow, generations) == expected
    assert sum(generation._sequence.preempted for generation in generations) > 0, "the cache was large enough"


@pytest.mark.parametrize("when", [0, 1, 2, 5])
def test_a_cancelled_neighbour_with_the_same_prefix(
    kind: tuple[Checkpoint, dict[str, Any]], when: int, opened: Callable[..., LLM]
) -> None:
    """Of two requests that share a prefix one is cancelled; the other's bits are those of a solo run."""
    checkpoint, options = kind
    start = some_tokens(130)
    first, second = start + some_tokens(11, seed=2), start + some_tokens(12, seed=3)
    expected = texts(open_tiny(checkpoint, **options), [second], SAMPLED)
    llm = opened(checkpoint, **options)
    set_steps(llm, step=100, mixed=60)
    doomed, kept = llm.prepare(first, SAMPLED), llm.prepare(second, SAMPLED)
    doomed.start()
    kept.start()
    for _ in range(when):
        llm.step()
    doomed.cancel()
    check_books(llm)
    for seed in (4, 5):  # others take the pages that came free
        llm.generate(some_tokens(90, seed=seed), GREEDY)
    assert collect(llm, [kept]) == expected
