"""What a low-rank adapter adds to a matrix's output."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shoal.kernels import packed
from shoal.kernels import reference_packed as reference

SHAPES = [(0, 5, 2), (1, 1, 1), (2, 3, 4), (3, 15, 5), (5, 16, 8), (2, 33, 1), (4, 63, 7), (1, 129, 0), (3, 7168, 16)]


def _inputs(rows, cols, rank, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.normal(0, 1, (rows, rank)).astype(np.float32)
    b = rng.normal(0, 1, (rank, cols + 3)).astype(ml_dtypes.bfloat16)[:, 1 : cols + 1]
    return low, b, rng.normal(0, 1, (rows, cols + 3)).astype(np.float32)[:, 1 : cols + 1]


@pytest.mark.parametrize(("rows", "cols", "rank"), SHAPES)
def test_matches_reference(isa, rows, cols, rank):
    low, b, y = _inputs(rows, cols, rank)
    expected = reference.lora_expand(low, b, y)
    assert packed.lora_expand(low, b, y) is y
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=8e-6)


def test_a_part_of_the_columns_is_that_part(isa):
    """The executor cuts a matrix's rows into tiles, which fall differently with every number of threads."""
    low, b, y = _inputs(3, 100, 5)
    whole = packed.lora_expand(low, b, np.array(y))
    for first, last in ((0, 16), (16, 48), (48, 100)):
        for row in range(3):
            part = np.array(y[row : row + 1, first:last])
            packed.lora_expand(low[row : row + 1], b[:, first:last], part)
            np.testing.assert_array_equal(part[0], whole[row, first:last])


def test_columns_beside_it_stay_as_they_were(isa):
    low, b, _ = _inputs(2, 21, 3)
    room = np.full((2, 40), 7, np.float32)
    packed.lora_expand(low, b, room[:, 5:26])
    assert (np.delete(room, np.s_[5:26], axis=1) == 7).all()


def test_wrong_inputs_are_named(isa):
    low, b, y = _inputs(2, 65, 3)
    with pytest.raises(ValueError, match="b: 3 rows, expected 2"):
        packed.lora_expand(low[:, :2], b, y)
    with pytest.raises(ValueError, match=r"onto: shape \(2, 64\), expected \(2, 65\)"):
        packed.lora_expand(low, b, y[:, :64])
    native = pytest.importorskip("shoal.kernels._native")
    bits = b.view(np.uint16)
    with pytest.raises(ValueError, match="low must be"):
        native.lora_expand(low, bits[:2], y)
    with pytest.raises(ValueError, match="b and y differ in columns"):
        native.lora_expand(low, bits[:, :64], y)


@pytest.mark.benchmark
def test_benchmark(isa, speed):
    low, b, y = _inputs(64, 2048, 8)
    speed(f"lora_expand {isa} 64x2048 rank 8", 64 * b.nbytes, lambda: packed.lora_expand(low, b, y))
