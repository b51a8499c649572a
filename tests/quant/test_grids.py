"""Rounding to grids: what it promises of codes and scales, and that the search earns its time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shoal.quant.grids import MAX_SCALE, Grid, exact_scale, quantise

GRIDS = [
    Grid(bits=bits, group=group, symmetric=symmetric)
    for bits, symmetric in ((8, True), (4, True), (4, False))
    for group in (32, 64)
]


def some_weights(rows=40, cols=128, seed=0):
    """Heavy tails, as trained weights have."""
    return np.random.default_rng(seed).standard_t(5, (rows, cols)).astype(np.float32) * np.float32(0.02)


def error(weights, grid, importance=None, *, search=True):
    """Mean weighted squared error of each group."""
    squares = (weights - quantise(weights, grid, importance, search=search).dequantise()) ** 2
    if importance is not None:
        squares = squares * importance
    return squares.reshape(len(weights), -1, grid.group).mean(axis=2)


@pytest.mark.parametrize("bits", [7, 8])
def test_scales_are_exact_in_both_half_types(bits):
    exponents = np.ldexp(1.0, np.arange(-30, 16))
    scales = (np.random.default_rng(0).uniform(1, 2, (500, 1)) * exponents).astype(np.float32)
    scales = np.concatenate([scales.ravel(), -scales.ravel(), [0.0, 2.0**-24, 2.0**-25, MAX_SCALE]]).astype(np.float32)
    scales = scales[np.abs(scales) <= MAX_SCALE * (1 if bits == 8 else 0.99)]
    out = exact_scale(scales, bits)
    for kind in (np.float16, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(out.astype(kind).astype(np.float32), out)
    assert (np.abs(out - scales) <= np.maximum(np.abs(scales) * 2.0**-bits, 2.0**-25)).all()
    np.testing.assert_array_equal(exact_scale(out, bits), out)


def test_minima_are_exact_in_half_precision():
    """scale · zero point, which the packed layout keeps in float16."""
    scales = exact_scale(
        np.random.default_rng(1).uniform(1e-3, 1, 4000).astype(np.float32),
        Grid(bits=4, group=32, symmetric=False).scale_bits,
    )
    minima = scales[:, None] * np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(minima.astype(np.float16).astype(np.float32), minima)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("search", [False, True])
def test_codes_stay_on_the_grid_and_near_the_weights(grid, search):
    weights = some_weights()
    out = quantise(weights, grid, search=search)
    assert out.codes.dtype == np.int8 and out.codes.min() >= grid.low and out.codes.max() <= grid.high
    assert out.scales.shape == (40, 128 // grid.group) and (out.zeros is None) == grid.symmetric
    if out.zeros is not None:
        assert out.zeros.min() >= grid.low and out.zeros.max() <= grid.high
    groups = np.abs(weights.reshape(40, -1, grid.group))
    steps = groups.max(axis=2) / grid.high
    limit = 0.51 if not search else 2.6  # the search may cut off an outlier
    worst = np.abs(out.dequantise() - weights).reshape(40, -1, grid.group).max(axis=2)
    assert (worst <= limit * steps).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_on_a_grid_come_back_exactly(grid):
    rng = np.random.default_rng(4)
    codes = rng.integers(grid.low, grid.high + 1, (8, 2, grid.group))
    codes[:, :, :2] = grid.low, grid.high  # the whole range is used
    zeros = np.zeros((8, 2), int) if grid.symmetric else rng.integers(grid.low, grid.high + 1, (8, 2))
    scales = exact_scale(rng.uniform(0.01, 0.02, (8, 2)).astype(np.float32), 7)
    weights = ((codes - zeros[:, :, None]) * scales[:, :, None]).astype(np.float32).reshape(8, -1)
    np.testing.assert_array_equal(quantise(weights, grid).dequantise(), weights)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_search_lowers_the_error(grid):
    weights = some_weights(200)
    plain, searched = error(weights, grid, search=False).mean(), error(weights, grid).mean()
    assert searched < plain * (0.75 if grid.bits == 4 and grid.symmetric else 0.95)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_matters_is_kept_most_exactly(grid):
    weights, importance = some_weights(200), np.random.default_rng(2).exponential(1, 128).astype(np.float32) ** 3
    blind = quantise(weights, grid).dequantise()
    aware = quantise(weights, grid, importance).dequantise()
    weighted = [((w - weights) ** 2 * importance).mean() for w in (aware, blind)]
    assert weighted[0] < weighted[1] * 0.8


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_odd_groups(grid):
    weights = some_weights(7)
    weights[0] = 0
    weights[1] = 0.25
    weights[2] = -0.25
    weights[3] *= 1e-9
    weights[4, 5] = 50.0  # an outlier in one group
    weights[5] = np.abs(weights[5]) + 3
    out = quantise(weights, grid, np.zeros(128, np.float32)).dequantise()
    assert np.isfinite(out).all() and not out[0].any()
    np.testing.assert_allclose(out[1:3], weights[1:3], rtol=0.005)
    assert np.abs(out[3]).max() < 1e-6
    assert abs(out[4, 5] - 50) < 50 / 2**grid.bits
    np.testing.assert_array_equal(
        out[4, 64:], quantise(weights[4:5], grid, np.zeros(128, np.float32)).dequantise()[0, 64:]
    )


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_rows_do_not_depend_on_blocks_or_threads(grid, monkeypatch):
    weights = some_weights(50)
    whole = quantise(weights, grid)
    monkeypatch.setattr("shoal.quant.grids._BLOCK_VALUES", 3 * 128)
    for threads in (1, 3):
        cut = quantise(weights, grid, threads=threads)
        np.testing.assert_array_equal(cut.codes, whole.codes)
        np.testing.assert_array_equal(cut.scales, whole.scales)
