"""Scores and a budget in tokens to the documents that are kept. All that the methods share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a method thinks of each document.

    Attributes:
        values_N: the greater the sooner it is kept; -inf never.
        facts: what the page tells about how they came about; plain values.
        reasons: for documents that are not wanted whatever the budget: number → a few words.
        picked_N: the method's own choice, where it deals with the budget itself.
    """

    values_N: NDArray[np.float64]
    facts: dict[str, Any] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    picked_N: NDArray[np.bool_] | None = None


def parse_share(text: str) -> float:
    """`10%` or `0.1` as a number. Raises ConfigError."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise ConfigError("share", f"must be a share such as 10% or 0.1, got {text!r}")
    return value


def fill(values_N: NDArray[np.float64], lengths_N: NDArray[np.int64], budget: int) -> NDArray[np.bool_]:
    """Documents in falling order of value as long as they fit into `budget` tokens.

    One that does not fit is passed over. Ties go to the earlier document. Documents at -inf are never taken.
    """
    order = np.argsort(-values_N, kind="stable")
    order = order[np.isfinite(values_N[order])]
    total = np.cumsum(lengths_N[order])
    first = int(np.searchsorted(total, budget, side="right"))
    picked = np.zeros(len(values_N), bool)
    picked[order[:first]] = True
    left = budget - (int(total[first - 1]) if first else 0)
    rest = order[first:]
    rest = rest[lengths_N[rest] <= left]
    for number, length in zip(rest.tolist(), lengths_N[rest].tolist(), strict=True):
        if length <= left:
            picked[number] = True
            left -= length
    return picked


def gumbel(size: int, seed: int) -> NDArray[np.float64]:
    """Noise that turns the greatest of log-weights into draws without replacement (Gumbel top-k, arXiv 1903.06059)."""
    return np.random.default_rng([seed, 0x6B]).gumbel(size=size)
