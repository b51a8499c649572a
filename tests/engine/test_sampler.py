"""The sampler against a slow, straightforward reference, and its edges."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.params import SamplingParams
from shoal.engine.sampler import Sampler, cut, likeliest, log_total
from shoal.errors import RequestError, ShoalError

Logits = np.ndarray[Any, np.dtype[np.float32]]


def reference_adjusted(logits: list[float], params: SamplingParams, prompt: list[int], made: list[int]) -> list[float]:
    out = []
    for token, logit in enumerate(logits):
        value = logit
        if token in prompt or token in made:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * made.count(token)
        value -= params.presence_penalty if token in made else 0.0
        bias = params.logit_bias.get(token, 0.0)
        out.append(-math.inf if bias == -100 else value + bias)
    return out


def reference_weights(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Token → probability, after temperature, top-k, top-p and min-p in that order, each over what is left."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = [token for token in order if logits[token] > -math.inf]
    if params.top_k:
        order = order[: params.top_k]
    top = max(logits[token] for token in order)
    weights = [math.exp((logits[token] - top) / params.temperature) for token in order]
    total, reached, kept = math.fsum(weights), 0.0, []
    for token, weight in zip(order, weights, strict=True):
        kept.append((token, weight))
        reached += weight
        if params.top_p < 1 and reached >= params.top_p * total:
            break
    kept = [(token, weight) for token, weight in kept if weight >= params.min_p * kept[0][1]]
    total = math.fsum(weight for _, weight in kept)
    return {token: weight / total for token, weight in kept}


def logit_arrays(size: int = 40) -> st.SearchStrategy[Logits]:
    # Eighths: exact in every format, with many ties.
    values = st.integers(-160, 160).map(lambda eighths: eighths / 8)
    return st.lists(st.one_of(values, st.just(-math.inf)), min_size=2, max_size=size).map(
        lambda items: np.array([0.0, *items], np.float32)
    )


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 2.0, 30.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 1000]),
        "top_p": st.sampled_from([1.0, 0.97, 0.6, 0.03]),
        "min_p": st.sampled_from([0.0, 0.013, 0.37, 1.0]),
    }
)


@settings(max_examples=300, deadline=None)
@given(logit_arrays(), SETTINGS)
def test_the_cuts_keep_what_the_reference_keeps(logits: Logits, given_: dict[str, Any]) -> None:
    params = SamplingParams(**given_)
    ids, weights = cut(logits, params)
    ours = {int(token): weight / weights.sum() for token, weight in zip(ids, weights, strict=True)}
    theirs = reference_weights(logits.tolist(), params)
    # Two ways of adding may disagree on whether a sum reaches p exactly; then one token more or less is kept.
    if set(ours) != set(theirs):
        assert _is_borderline(logits, params)
        return
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-300)


def _is_borderline(logits: Logits, params: SamplingParams) -> bool:
    nudged = []
    for factor in (1 - 1e-12, 1 + 1e-12):
        changed = {"top_p": min(1.0, params.top_p * factor), "min_p": min(1.0, params.min_p * factor)}
        kept = SamplingParams(temperature=params.temperature, top_k=params.top_k, **changed)
        nudged.append(set(reference_weights(logits.tolist(), kept)))
    return nudged[0] != nudged[1]


@settings(max_examples=200, deadline=None)
@given(
    logit_arrays(),
    st.fixed_dictionaries(
        {
            "presence_penalty": st.sampled_from([0.0, 0.5, -1.25]),
            "frequency_penalty": st.sampled_from([0.0, 0.25, -0.5]),
            "repetition_penalty": st.sampled_from([1.0, 2.0, 0.5]),
        }
    ),
    st.dictionaries(st.integers(0, 2), st.sampled_from([-100.0, -3.0, 0.5, 100.0]), max_size=2),
    st.lists(st.integers(0, 2), max_size=4),
)
def test_penalties_and_biases_act_as_the_reference_says(
    logits: Logits, given_: dict[str, Any], bias: dict[int, float], prompt: list[int]
) -> None:
    params = SamplingParams(temperature=0.0, logit_bias=bias, **given_)
    sampler, made = Sampler(params, prompt, logits.size), []
    before = logits.copy()
    for _ in range(6):
        expected = reference_adjusted(logits.tolist(), params, prompt, made)
        best = max(expected)
        if best == -math.inf:
            return
        token = sampler.choose(logits)
        assert token == expected.index(best)  # the smaller id where several are equally likely
        made.append(token)
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    logits = np.array([1.0, 0.0, -1.0, 0.5, -2.0, 0.9, -math.inf], np.float32)
    for given_ in ({}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}):
        params = SamplingParams(seed=3, **given_)
        sampler = Sampler(params, [], logits.size)
        draws = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=logits.size)
        expected = reference_weights(logits.tolist(), params)
        for token in range(logits.size):
            share = expected.get(token, 0.0)
            assert abs(draws[token] / 20_000 - share) <= 5 * math.sqrt(share * (1 - share) / 20_000)  # five sigma


def test_seeds() -> None:
    logits = np.zeros(1000, np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), [], logits.size)
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(5) == draw(5)
    assert len({tuple(draw(seed)) for seed in (0, 1, -1, 2**63, 2**64 - 2, None, None)}) == 7


def test_a_large_vocabulary_is_cut_alike() -> None:
    """The short cut that sorts only near tokens, on both of its sides."""
    logits = np.random.default_rng(0).normal(0, 4, 50_000).astype(np.float32)
    flat = np.linspace(0, -40, 50_000, dtype=np.float32)
    for values, top_p in ((logits, 0.9), (logits, 0.999999), (flat, 0.9999999)):
        params = SamplingParams(top_p=top_p)
        ids, weights = cut(values, params)
        assert set(ids.tolist()) == set(reference_weights(values.tolist(), params))
        assert weights.size < values.size
        assert np.all(np.diff(weights) <= 0)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5])
def test_a_tiny_temperature_is_greedy_and_quiet(temperature: float) -> None:
    logits = np.array([0.0, 3.0, 2.999, -50.0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = Sampler(SamplingParams(temperature=temperature, seed=1, top_p=0.9), [], 4)
        assert {sampler.choose(logits) for _ in range(50)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error(temperature: float, bad: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=3, top_p=0.9), [], 5)
    with pytest.raises(ShoalError, match="not finite"):
        sampler.choose(np.array([0, 1, bad, 2, 3], np.float32))
    with pytest.raises(ShoalError, match="not finite"):
        sampler.choose(np.full(5, -math.inf, np.float32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidding_tokens(temperature: float) -> None:
    logits = np.array([200.0, 0.0, 0.0, -math.inf], np.float32)
    sampler = Sampler(SamplingParams(temperature=temperature, logit_bias={0: -100.0}), [], 4)
    assert {sampler.choose(logits) for _ in range(20)} <= {1, 2}  # however likely it was
    everything = dict.fromkeys(range(4), -100.0)
    with pytest.raises(RequestError, match="every token") as refused:
        Sampler(SamplingParams(logit_bias=everything), [], 4)
    assert refused.value.param == "logit_bias"
    rest = Sampler(SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(range(3), -100.0)), [], 4)
    with pytest.raises(RequestError, match="no token") as left:
        rest.choose(logits)
    assert left.value.param == "logit_bias"
    with pytest.raises(RequestError, match="outside the vocabulary"):
        Sampler(SamplingParams(logit_bias={4: 1.0}), [], 4)


@settings(deadline=None)
@given(logit_arrays(), st.integers(0, 45))
def test_the_likeliest_come_in_order_with_ties_by_id(logits: Logits, count: int) -> None:
    order = sorted(range(logits.size), key=lambda token: (-logits[token], token))
    assert likeliest(logits, count) == order[:count]


@settings(deadline=None)
@given(logit_arrays())
def test_probabilities_add_up_to_one(logits: Logits) -> None:
    total = log_total(logits)
    assert math.fsum(math.exp(float(logit) - total) for logit in logits) == pytest.approx(1, abs=1e-6)
