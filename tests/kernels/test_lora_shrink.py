"""Rows onto the directions of a low-rank adapter."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shoal.kernels import packed
from shoal.kernels import reference_packed as reference

SHAPES = [(0, 5, 2), (1, 1, 1), (2, 3, 4), (3, 15, 5), (5, 16, 8), (2, 33, 1), (4, 63, 7), (1, 129, 0), (3, 7168, 16)]


def _inputs(rows, cols, rank, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (rows, cols + 3)).astype(np.float32)[:, 1 : cols + 1]
    return x, rng.normal(0, cols**-0.5, (rank, cols)).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(("rows", "cols", "rank"), SHAPES)
def test_matches_reference(isa, rows, cols, rank):
    x, a = _inputs(rows, cols, rank)
    low = packed.lora_shrink(x, a, 1.5)
    assert low.shape == (rows, rank) and low.dtype == np.float32
    np.testing.assert_allclose(low, reference.lora_shrink(x, a, 1.5), rtol=2e-6, atol=2e-5)


def test_a_direction_depends_on_nothing_beside_it(isa):
    x, a = _inputs(5, 577, 7)
    whole = packed.lora_shrink(x, a, 0.7)
    for row in range(5):
        for rank in range(7):
            assert packed.lora_shrink(x[row : row + 1], a[rank : rank + 1], 0.7)[0, 0] == whole[row, rank]


def test_what_is_not_finite_stays_visible_in_its_row(isa):
    x, a = _inputs(3, 70, 5)
    x = np.array(x)
    x[1, 69] = np.nan
    assert np.isnan(packed.lora_shrink(x, a, 1.0)).all(axis=1).tolist() == [False, True, False]


def test_wrong_inputs_are_named(isa):
    x, a = _inputs(2, 65, 3)
    with pytest.raises(ValueError, match=r"a: shape \(3, 65\), expected 64 columns"):
        packed.lora_shrink(x[:, :64], a, 1.0)
    native = pytest.importorskip("shoal.kernels._native")
    bits = a.view(np.uint16)
    with pytest.raises(ValueError, match="x and a differ in columns"):
        native.lora_shrink(x[:, :64], bits, 1.0, np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="low must be"):
        native.lora_shrink(x, bits, 1.0, np.zeros((2, 4), np.float32))


@pytest.mark.benchmark
def test_benchmark(isa, speed):
    x, a = _inputs(64, 2048, 8)
    speed(f"lora_shrink {isa} 64x2048 rank 8", 64 * a.nbytes, lambda: packed.lora_shrink(x, a, 1.0))
