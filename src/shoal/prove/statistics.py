"""Means over seeds with 95 % intervals, and differences of two arms seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval by Student's t; the ends are NaN for a single value."""

    mean: float
    low: float
    high: float
    values: int


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with its interval: mean ± t · s / √n."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    reach = t_quantile(count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach, count)


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> Interval | None:
    """left - right over the seeds that both have; None if there are none."""
    seeds = sorted(left.keys() & right.keys())
    return interval([left[seed] - right[seed] for seed in seeds]) if seeds else None


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The t that a Student variable of so many degrees of freedom stays within with probability `level`."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2:
        term, total = math.cos(angle), 0.0
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= square * 2 * k / (2 * k + 1)
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= square * (2 * k - 1) / (2 * k)
    return sine * total
