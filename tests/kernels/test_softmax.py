from __future__ import annotations

import numpy as np
import pytest

from shoal import kernels
from shoal.kernels import reference


@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_matches_reference(isa, shape, spread, random):
    x = random(shape, 0, spread)
    y = kernels.softmax(x, 0.125)
    # scale·x - max reaches 40 here: rounding it to float32 alone moves the exponential by 40 · 2^-24
    np.testing.assert_allclose(y, reference.softmax(x, 0.125), rtol=5e-6, atol=1e-30)
    np.testing.assert_allclose(y.sum(axis=-1), np.ones(shape[0]), rtol=1e-5)


def test_reference_is_the_formula():
    y = reference.softmax(np.array([[0.0, np.log(3.0)]], np.float32))
    np.testing.assert_allclose(y, [[0.25, 0.75]], rtol=1e-6)


@pytest.mark.parametrize("cols", [1, 5, 16, 31])
def test_masked_scores_weigh_exactly_nothing(isa, cols, random):
    x = random((1, 2 * cols), 1, 5.0).copy()
    x[0, ::2] = -np.inf
    y = kernels.softmax(x)
    assert not y[0, ::2].any()
    np.testing.assert_allclose(y[0, 1::2], reference.softmax(x[:, 1::2].copy())[0], rtol=2e-6)


def test_all_negative_scores_keep_their_maximum(isa):
    """The zeros that a partial load reads past the end of the row must not enter the maximum."""
    for cols in range(1, 40):
        x = np.full((1, cols), -200.0, np.float32)
        np.testing.assert_allclose(kernels.softmax(x), np.full((1, cols), 1 / cols), rtol=1e-6)


def test_extremes(isa):
    big = np.array([[3e38, 3e38, -3e38, 1.0, 2.0]], np.float32)
    np.testing.assert_array_equal(kernels.softmax(big), [[0.5, 0.5, 0, 0, 0]])
    assert np.isnan(kernels.softmax(np.full((1, 21), -np.inf, np.float32))).all()
    x = np.zeros((1, 37), np.float32)
    for at in (0, 20, 36):
        x[:] = 0
        x[0, at] = np.nan
        assert np.isnan(kernels.softmax(x)).all()


def test_odd_addresses_in_place_and_leading_axes(isa, random, odd_byte):
    x = random((2, 3, 37), 4, 2.0)
    expected = kernels.softmax(x)
    np.testing.assert_array_equal(kernels.softmax(odd_byte(x)), expected)
    np.testing.assert_array_equal(kernels.softmax(x[1, 2]), expected[1, 2])
    y = np.ascontiguousarray(x)
    assert kernels.softmax(y, out=y) is y
    np.testing.assert_array_equal(y, expected)


@pytest.mark.benchmark
@pytest.mark.parametrize("cols", [64, 1024, 16384])
def test_benchmark(isa, cols, random, speed):
    x = random((16, cols), 0, 1.0)
    y = np.empty((16, cols), np.float32)
    speed(f"softmax {isa} 16x{cols}", 2 * y.nbytes, lambda: kernels.softmax(x, 0.1, out=y))
