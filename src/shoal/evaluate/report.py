"""Figures with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Z = 1.959964  # 97.5th percentile of the normal distribution
# Metrics that are functions of a mean log-likelihood per word or byte.
_RATIOS: dict[str, Callable[[float], float]] = {
    "word_perplexity": lambda mean: math.exp(-mean), "byte_perplexity": lambda mean: math.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}  # fmt: skip
_SHARES = ("acc", "acc_norm", "exact_match", "pass@1", "execution_accuracy")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task over `items` items.

    `low` and `high` bound it with 95 % confidence: Wilson's interval where every item is right or wrong, the spread
    of the items where it is a ratio of their sums (perplexities), else lm-eval's standard error; None without one.
    """

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    items: int
    higher_is_better: bool


def scores_of(found: Mapping[str, Any]) -> list[Score]:
    """Every metric of lm-eval's results, in the order of tasks."""
    out = []
    for task, metrics in found["results"].items():
        items = found["n-samples"][task]["effective"]
        better = found.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{rule}")
            pairs = [item[metric] for item in found.get("samples", {}).get(task, ()) if metric in item]
            low, high = _ratio_interval(metric, pairs) if metric in _RATIOS else _interval(metric, value, error, items)
            out.append(
                Score(task=task, metric=metric, value=float(value), low=low, high=high, items=items,
                      higher_is_better=better.get(metric) is not False)
            )  # fmt: skip
    return out


def wilson(share: float, items: int) -> tuple[float, float]:
    """Bounds of a share of `items` right-or-wrong items (Wilson 1927)."""
    spread = Z * math.sqrt(share * (1 - share) / items + Z**2 / (4 * items**2))
    middle, weight = share + Z**2 / (2 * items), 1 + Z**2 / items
    return max(0.0, (middle - spread) / weight), min(1.0, (middle + spread) / weight)


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Σ a / Σ b over items (a, b), and its standard error by the items' deviations from it (the delta method)."""
    total = sum(b for _, b in pairs)
    middle = sum(a for a, _ in pairs) / total
    spread = sum((a - middle * b) ** 2 for a, b in pairs) * len(pairs) / max(1, len(pairs) - 1)
    return middle, math.sqrt(spread) / total


def _ratio_interval(metric: str, pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """lm-eval's items carry the log-likelihood and the number of words or bytes."""
    if len(pairs) < 2:
        return None, None
    middle, error = ratio(pairs)
    ends = [_RATIOS[metric](middle + sign * Z * error) for sign in (1, -1)]
    return ends[0], ends[1]


def _interval(metric: str, value: float, error: Any, items: int) -> tuple[float | None, float | None]:
    if metric in _SHARES and items:
        return wilson(value, items)
    if isinstance(error, (int, float)) and math.isfinite(error):
        return value - Z * error, value + Z * error
    return None, None
