"""From logits to a token, in NumPy and float32/64: penalties, bias, temperature, top-k, top-p, min-p, then one draw.

V is the vocabulary. The order is the field's usual one; cuts act on the probabilities after temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.engine.params import SamplingParams
from shoal.errors import RequestError

Floats = NDArray[np.float32]


class Sampler:
    """One request's state: its random stream and the counts that penalties need."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self._params = params
        self._rng = np.random.Generator(np.random.Philox(_seed(params.seed)))
        self._counts = np.zeros(vocab_size, np.int32)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[np.asarray(prompt, np.int64)] = params.repetition_penalty != 1.0
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        if self._bias_ids.size and self._bias_ids.max() >= vocab_size:
            raise RequestError("logit_bias", f"token {self._bias_ids.max()} is outside the vocabulary of {vocab_size}")
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)

    def choose(self, logits_V: Floats) -> int:
        """Draw one token. `logits_V` is float32 [V] and left unchanged; −inf marks tokens that may not be chosen."""
        adjusted_V = self._adjust(logits_V)
        if self._params.temperature == 0.0:
            token = int(np.argmax(adjusted_V))
        else:
            ids, probs = cut(adjusted_V, self._params)
            reached = np.cumsum(probs)
            drawn = np.searchsorted(reached, self._rng.random() * reached[-1], side="right")
            token = int(ids[min(int(drawn), ids.size - 1)])
        self._counts[token] += 1
        self._seen[token] = True
        return token

    def _adjust(self, logits_V: Floats) -> Floats:
        params = self._params
        penalised = params.presence_penalty or params.frequency_penalty
        if not (penalised or params.repetition_penalty != 1.0 or self._bias_ids.size):
            return logits_V
        out_V: Floats = logits_V.copy()
        if params.repetition_penalty != 1.0:
            seen = out_V[self._seen]
            factor = params.repetition_penalty
            out_V[self._seen] = np.where(seen > 0, seen / factor, seen * factor)
        if penalised:
            out_V -= params.frequency_penalty * self._counts
            out_V -= params.presence_penalty * (self._counts > 0)
        if self._bias_ids.size:
            out_V[self._bias_ids] += self._bias
        return out_V


# Below this distance from the top a token weighs less than 4e-7 of the likeliest: a nucleus seldom reaches that far.
_NEAR = -15.0


def cut(logits_V: Floats, params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids that survive temperature, top-k, top-p and min-p with their weights (not normalised).

    Likeliest first where a cut needs the order, by id otherwise; the same logits always give the same arrays."""
    if 0 < params.top_k < logits_V.size:
        ids = _best(logits_V, params.top_k)
    else:
        ids = np.flatnonzero(logits_V > -np.inf)
    wide = logits_V[ids].astype(np.float64)
    scaled: NDArray[np.float64] = (wide - wide.max()) / params.temperature
    probs = np.exp(scaled)
    if params.top_p < 1.0:
        ids, probs = _nucleus(ids, scaled, probs, params.top_p)
    if params.min_p > 0.0:
        keep = probs >= params.min_p * probs.max()
        ids, probs = ids[keep], probs[keep]
    return ids, probs


def _best(logits_V: Floats, count: int) -> NDArray[np.int64]:
    """The `count` largest; where equal values straddle the boundary, the smaller ids."""
    threshold = np.partition(logits_V, -count)[-count]
    above = np.flatnonzero(logits_V > threshold)
    level = np.flatnonzero(logits_V == threshold)[: count - above.size]
    return np.concatenate((above, level))


def _nucleus(
    ids: NDArray[np.int64], scaled: NDArray[np.float64], probs: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The smallest set of likeliest tokens whose share reaches top_p."""
    wanted = top_p * probs.sum()
    near = scaled > _NEAR
    if probs[near].sum() >= wanted:  # sorting the whole vocabulary would cost more than the model's step
        ids, probs = ids[near], probs[near]
    order = np.lexsort((ids, -probs))
    ids, probs = ids[order], probs[order]
    before = np.cumsum(probs) - probs
    keep = max(1, int(np.searchsorted(before, wanted, side="left")))
    return ids[:keep], probs[:keep]


def log_softmax(logits_V: Floats) -> NDArray[np.float64]:
    """Natural-log probabilities, float64 [V]."""
    shifted = logits_V.astype(np.float64) - float(logits_V.max())
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return out


def likeliest(logprobs_V: NDArray[np.float64], count: int) -> list[int]:
    """Ids of the `count` likeliest tokens, best first; ties go to the smaller id."""
    count = min(count, logprobs_V.size)
    if count == 0:
        return []
    ids = np.argpartition(logprobs_V, -count)[-count:]
    return [int(i) for i in ids[np.lexsort((ids, -logprobs_V[ids]))]]


def _seed(seed: int | None) -> int | None:
    return None if seed is None else seed % (1 << 64)
