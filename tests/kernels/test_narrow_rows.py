"""f32 rows to bf16, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shoal.kernels import packed
from shoal.kernels import reference_packed as reference

SHAPES = [(0, 5), (1, 1), (2, 3), (3, 15), (5, 16), (2, 33), (7, 64), (3, 129), (64, 576)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.0883883])
def test_matches_reference(isa, rows, cols, scale, random):
    x = random((rows, cols + 3), 0, 4.0)[:, :cols]
    y = packed.narrow_rows(x, scale)
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y.view(np.uint16), reference.narrow_rows(x, scale).view(np.uint16))


def test_reference_is_the_formula(random):
    x = random((3, 40), 1, 4.0)
    np.testing.assert_allclose(reference.narrow_rows(x, 0.3).astype(np.float64), 0.3 * x.astype(np.float64), 2.0**-8)


def test_extremes(isa):
    """Ties to even, subnormal values, what becomes infinite, infinities and NaN."""
    bits = [0x3F808000, 0x3F818000, 0x00008000, 0x00018000, 0x80000001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001]
    x = np.tile(np.array(bits, np.uint32).view(np.float32), 4)[None]
    y = packed.narrow_rows(x)
    expected = np.tile([0x3F80, 0x3F82, 0x0000, 0x0002, 0x8000, 0x7F80, 0x7F80, 0xFF80], 4)
    finite = np.arange(x.size) % len(bits) != len(bits) - 1
    np.testing.assert_array_equal(y.view(np.uint16)[0, finite], expected)
    assert np.isnan(y.astype(np.float32)[0, ~finite]).all()


def test_wrong_inputs_are_named(isa):
    with pytest.raises(ValueError, match="x: 1 axes, expected 2"):
        packed.narrow_rows(np.zeros(4, np.float32))
    native = pytest.importorskip("shoal.kernels._native")
    with pytest.raises(ValueError, match="x and y differ in shape"):
        native.narrow_rows(np.zeros((2, 4), np.float32), 1.0, np.zeros((2, 5), np.uint16))


@pytest.mark.benchmark
def test_benchmark(isa, speed, random):
    x = random((64, 576), 0, 1.0)
    speed(f"narrow_rows {isa} 64x576", x.nbytes, lambda: packed.narrow_rows(x))
