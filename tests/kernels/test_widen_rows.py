"""Rows of the int8 cache to bf16, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shoal.kernels import packed
from shoal.kernels import reference_packed as reference

SHAPES = [(0, 5), (1, 1), (2, 3), (3, 15), (5, 16), (2, 33), (4, 63), (7, 64), (64, 65), (3, 129), (64, 576)]


def _inputs(rows, width, seed=0):
    """Rows as the cache holds them: codes, padding that must not matter, scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, (rows, width)).astype(np.int8)
    scales = rng.normal(0, 0.1, (rows, -(-width // 64))).astype(np.float32)
    padding = np.full((rows, -width % 4), 0xA5, np.uint8)
    return codes, scales, np.concatenate([codes.view(np.uint8), padding, scales.view(np.uint8)], axis=1)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_matches_reference(isa, rows, width):
    stored = _inputs(rows, width)[2]
    y = packed.widen_rows(stored, width)
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y.view(np.uint16), reference.widen_rows(stored, width).view(np.uint16))


def test_reference_is_the_formula():
    codes, scales, stored = _inputs(3, 130)
    for row in range(3):
        for i in (0, 63, 64, 127, 128, 129):
            exact = float(codes[row, i]) * float(scales[row, i // 64])
            assert abs(float(reference.widen_rows(stored, 130)[row, i]) - exact) <= 2.0**-8 * abs(exact)


def test_extremes(isa):
    _, scales, stored = _inputs(2, 128)
    stored[:, :128] = np.array([-128, -127, 0, 127], np.int8).view(np.uint8)[np.arange(128) % 4]
    scales[0], scales[1, 0], scales[1, 1] = 0, np.nan, 1e-40
    stored[:, 128:] = scales.view(np.uint8)
    y = packed.widen_rows(stored, 128)
    np.testing.assert_array_equal(y.view(np.uint16), reference.widen_rows(stored, 128).view(np.uint16))
    assert not y[0].any() and np.isnan(y[1, :64].astype(np.float32)).all()


def test_wrong_inputs_are_named(isa):
    stored = _inputs(2, 65)[2]
    with pytest.raises(ValueError, match=r"stored: uint8 \(2, 76\), expected uint8 rows of 68 bytes"):
        packed.widen_rows(stored, 64)
    native = pytest.importorskip("shoal.kernels._native")
    with pytest.raises(ValueError, match="x and y differ in rows"):
        native.widen_rows(stored, 68, np.zeros((3, 65), np.uint16))
    with pytest.raises(ValueError, match="a row must hold its codes"):
        native.widen_rows(stored, 60, np.zeros((2, 65), np.uint16))
    with pytest.raises(ValueError, match="a row must hold its codes"):
        native.widen_rows(stored, 68, np.zeros((2, 64), np.uint16))


@pytest.mark.benchmark
def test_benchmark(isa, speed):
    stored = _inputs(64, 576)[2]
    speed(f"widen_rows {isa} 64x576", stored.nbytes, lambda: packed.widen_rows(stored, 576))
