"""Intervals against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from shoal.prove.statistics import interval, paired, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 100])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_quantiles_of_student(freedom, level):
    assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, freedom), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 7, 30])
def test_intervals(count):
    values = np.random.default_rng(count).normal(3, 2, count)
    found = interval(values.tolist())
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean, found.low, found.high, found.values) == pytest.approx((values.mean(), low, high, count))


def test_one_value_has_no_interval():
    found = interval([4.0])
    assert found.mean == 4 and math.isnan(found.low) and math.isnan(found.high) and found.values == 1


def test_pairs_are_matched_by_seed():
    left, right = {0: 1.0, 1: 2.0, 2: 4.0, 7: 99.0}, {2: 3.5, 1: 1.0, 0: 0.5, 5: -9.0}
    found = paired(left, right)
    low, high = stats.t.interval(0.95, 2, loc=2 / 3, scale=stats.sem([0.5, 1.0, 0.5]))
    assert found == pytest.approx((2 / 3, low, high, 3))
    assert paired({0: 1.0}, {1: 1.0}) is None
