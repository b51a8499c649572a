"""From logits to a token, in NumPy and float32/64: penalties, bias, temperature, top-k, top-p, min-p, then one draw.

V is the vocabulary. The order is the field's usual one; cuts act on the probabilities after temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.engine.grammar import Constraint
from shoal.engine.params import BAN, SamplingParams
from shoal.errors import RequestError, ShoalError

Floats = NDArray[np.float32]
_NO_IDS, _NO_BIAS = np.zeros(0, np.int64), np.zeros(0, np.float32)


class Sampler:
    """One request's state: its random stream, the counts that penalties need, and its place in a grammar."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, constraint: Constraint | None = None
    ) -> None:
        self._params = params
        self._constraint = constraint
        # A stream of random numbers takes longer to make than a greedy token to choose.
        self._rng = np.random.Generator(np.random.Philox(_seed(params.seed))) if params.temperature > 0.0 else None
        penalised = params.presence_penalty or params.frequency_penalty
        self._counts_V = np.zeros(vocab_size, np.int32) if penalised else None
        self._seen_V = np.zeros(vocab_size, bool) if params.repetition_penalty != 1.0 else None
        if self._seen_V is not None:
            ids = np.asarray(prompt, np.int64)
            self._seen_V[ids[ids < vocab_size]] = True
        self._bias_ids, self._bias = _biases(params, vocab_size) if params.logit_bias else (_NO_IDS, _NO_BIAS)

    @property
    def finished(self) -> bool:
        """Whether the text is complete by its grammar."""
        return self._constraint is not None and self._constraint.finished

    def choose(self, logits_V: Floats, best: int | None = None) -> int:
        """Draw one token. `logits_V` is float32 [V] and left unchanged; −inf marks tokens that may not be chosen;
        `best` is the place of its largest value, if known.

        Raises:
            RequestError: the request's own bias or grammar leaves no token to choose.
            ShoalError: the logits are not numbers, or all −inf.
        """
        adjusted_V = self._adjust(logits_V)
        if best is None or adjusted_V is not logits_V:
            best = int(adjusted_V.argmax())  # the first NaN if there is one
        if not math.isfinite(adjusted_V[best]):
            raise self._no_choice(logits_V)
        token = best
        if self._rng is not None:
            ids, probs = cut(adjusted_V, self._params)
            reached = np.cumsum(probs)
            drawn = np.searchsorted(reached, self._rng.random() * reached[-1], side="right")
            token = int(ids[min(int(drawn), ids.size - 1)])
        if self._counts_V is not None:
            self._counts_V[token] += 1
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _no_choice(self, logits_V: Floats) -> ShoalError:
        if math.isfinite(logits_V.max()):
            if np.isinf(self._bias).any():
                return RequestError("logit_bias", "leaves no token to choose")
            if self._constraint is not None:
                return RequestError("grammar", "leaves no token of this model's vocabulary to choose")
        return ShoalError("the model's scores for the next token are not finite; its weights may be damaged")

    def _adjust(self, logits_V: Floats) -> Floats:
        if self._constraint is not None:
            logits_V = self._constraint.restrict(logits_V)
        if self._counts_V is None and self._seen_V is None and not self._bias_ids.size:
            return logits_V
        params = self._params
        out_V: Floats = logits_V.copy()
        if self._seen_V is not None:
            seen = out_V[self._seen_V]
            factor = np.float32(params.repetition_penalty)
            out_V[self._seen_V] = np.where(seen > 0, seen / factor, seen * factor)
        if self._counts_V is not None:
            out_V -= np.float32(params.frequency_penalty) * self._counts_V
            out_V -= np.float32(params.presence_penalty) * (self._counts_V > 0)
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
        ids = ids[logits_V[ids] > -np.inf]
    else:
        ids = np.flatnonzero(logits_V > -np.inf)
    wide = logits_V[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to −inf, as it should
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


def log_total(logits_V: Floats) -> float:
    """The logarithm of the sum of exponentials: a logit minus this is a natural-log probability."""
    top = logits_V.max()
    return float(top) + math.log(float(np.exp(logits_V - top).sum(dtype=np.float64)))


def likeliest(logits_V: NDArray[np.floating], count: int) -> list[int]:
    """Ids of the `count` largest, best first; ties go to the smaller id."""
    count = min(count, logits_V.size)
    if count == 0:
        return []
    ids = _best(logits_V, count)
    return [int(i) for i in ids[np.lexsort((ids, -logits_V[ids]))]]


def _biases(params: SamplingParams, vocab_size: int) -> tuple[NDArray[np.int64], Floats]:
    """Ids and what their logits gain; −inf forbids. RequestError: they are outside the vocabulary, or all forbidden."""
    ids = np.fromiter(params.logit_bias.keys(), np.int64)
    if ids.max() >= vocab_size:
        raise RequestError("logit_bias", f"token {ids.max()} is outside the vocabulary of {vocab_size}")
    bias = np.fromiter(params.logit_bias.values(), np.float32)
    if (bias == BAN).sum() == vocab_size:
        raise RequestError("logit_bias", "forbids every token")
    return ids, np.where(bias == BAN, np.float32(-np.inf), bias)


def _seed(seed: int | None) -> int | None:
    return None if seed is None else seed % (1 << 64)
