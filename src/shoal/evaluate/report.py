"""Figures with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Z = 1.959964  # 97.5th percentile of the normal distribution
_SHARES = ("acc", "acc_norm", "exact_match", "pass@1", "execution_accuracy")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task over `items` items.

    `low` and `high` bound it with 95 % confidence: Wilson's interval where every item is right or wrong, else the
    standard error that lm-eval bootstraps; None where there is none.
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
            low, high = _interval(metric, float(value), error, items)
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


def _interval(metric: str, value: float, error: Any, items: int) -> tuple[float | None, float | None]:
    if metric in _SHARES and items:
        return wilson(value, items)
    if isinstance(error, (int, float)) and math.isfinite(error):
        return value - Z * error, value + Z * error
    return None, None
