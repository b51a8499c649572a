from __future__ import annotations

import numpy as np
import pytest

from shoal.kernels import packed
from shoal.kernels import reference_packed as reference

SHAPES = [(0, 32), (1, 1), (1, 31), (2, 33), (3, 63), (4, 64), (5, 65), (7, 96), (13, 200), (1, 7168)]


def _assert_equal(x, lanes):
    """Bit for bit: the kernel has no freedom."""
    ours, truth = packed.quantize_rows(x, lanes), reference.quantize_rows(x, lanes)
    for name in ("codes", "scales", "sums", "rest"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(truth, name), err_msg=name)
    return ours


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_matches_reference(isa, rows, cols, lanes, random):
    quant = _assert_equal(random((rows, cols), cols, 3.0), lanes)
    codes, scales, sums = quant.plain()
    assert codes.shape == (rows, -(-cols // 64) * 64)
    assert not codes[:, cols:].any() and not scales[:, -(-cols // 32) :].any()
    np.testing.assert_array_equal(sums, codes.reshape(rows, codes.shape[1] // 32, 32).sum(axis=-1, dtype=np.int32))


def test_reference_is_the_formula():
    x = np.zeros((2, 64), np.float32)
    x[0, :3] = [-254.0, 3.0, 5.0]  # scale 2: 3 / 2 is a tie and goes to even, 5 / 2 likewise
    x[1, 40] = 1.0
    quant = reference.quantize_rows(x, 4)
    assert quant.codes.shape == (1, 16, 4, 4) and quant.scales.shape == quant.sums.shape == (1, 2, 4)
    codes, scales, sums = quant.plain()
    assert codes[0, :4].tolist() == [-127, 2, 2, 0] and codes[1, 40] == 127
    assert scales.tolist() == [[2.0, 0.0], [0.0, np.float32(1) / np.float32(127)]]
    assert sums.tolist() == [[-123, 0], [0, 127]]
    assert quant.rest[0, :3].tolist() == [0.0, -1.0, 1.0]
    # Row 1 is lane 1: its column 40 is byte 0 of dword 10.
    assert quant.codes[0, 10, 1].tolist() == [127, 0, 0, 0]


@pytest.mark.parametrize("lanes", [1, 4])
def test_what_is_left_is_below_half_a_step(isa, lanes, random):
    x = random((5, 300), 3, 10.0)
    quant = packed.quantize_rows(x, lanes)
    codes, scales, _ = quant.plain()
    step = np.repeat(scales, 32, axis=1)[:, :300]
    assert (np.abs(codes[:, :300] * step + quant.rest - x) <= 1e-6 * np.abs(x).max()).all()
    assert (np.abs(quant.rest) <= 0.5001 * step).all()
    assert (np.abs(codes).max(axis=1) == 127).all()


def test_extremes(isa):
    """Zeros, one huge outlier, values at the edges of float32, subnormal ones."""
    x = np.zeros((9, 40), np.float32)
    x[1, 7] = 3e38
    x[2] = 1.0
    x[2, 20] = -1e30
    x[3] = np.linspace(-127, 127, 40)
    x[4] = 1e-40
    x[5] = 9.9e-37
    x[6] = 1.1e-36
    x[7] = -1e-30
    x[8] = np.float32(0.5) * np.arange(-20, 20)  # many ties
    quant = _assert_equal(x, 4)
    codes, scales, _ = quant.plain()
    assert not codes[[0, 4, 5]].any() and scales[0, 0] == 0
    np.testing.assert_array_equal(quant.rest[[4, 5]], x[[4, 5]])
    assert (codes[6, :40] == 127).all() and (codes[7, :40] == -127).all()
    assert np.isfinite(scales).all() and np.isfinite(quant.rest).all()


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, 31, 32, 36])
def test_a_fault_upstream_stays_visible(isa, fault, at, random):
    x = random((3, 37), 5, 1.0).copy()
    clean = packed.quantize_rows(x)
    x[1, at] = fault
    quant = packed.quantize_rows(x)
    bad = np.zeros((3, 2), bool)
    bad[1, at // 32] = True
    np.testing.assert_array_equal(np.isnan(quant.plain()[1]), bad)
    np.testing.assert_array_equal(quant.plain()[1][~bad], clean.plain()[1][~bad])
    sums = quant.plain()[0].reshape(3, 2, 32).sum(axis=-1, dtype=np.int32)
    np.testing.assert_array_equal(quant.plain()[2], sums)


def test_a_row_does_not_depend_on_its_neighbours(isa, random):
    x = random((9, 201), 2, 1.0)
    for lanes in (1, 4):
        whole = packed.quantize_rows(x, lanes).plain()
        for row in range(9):
            alone = packed.quantize_rows(x[row : row + 1], 1).plain()
            for a, b in zip(alone, whole, strict=True):
                np.testing.assert_array_equal(a[0], b[row])


def test_odd_addresses_and_strides(isa, random, odd_byte):
    x = random((6, 77), 4, 1.0)
    expected = packed.quantize_rows(np.ascontiguousarray(x), 4)
    for same in (x, odd_byte(x), np.asfortranarray(x)):
        ours = packed.quantize_rows(same, 4)
        np.testing.assert_array_equal(ours.codes, expected.codes)
        np.testing.assert_array_equal(ours.rest, expected.rest)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="lanes: 2, expected 1 or 4"):
        packed.quantize_rows(np.ones((2, 5), np.float32), 2)
    with pytest.raises(ValueError, match="x: 1 axes, expected 2"):
        packed.quantize_rows(np.ones(5, np.float32))
    with pytest.raises(TypeError, match="x: expected a float32 array, got float64"):
        packed.quantize_rows(np.ones((2, 5)))


def test_the_binding_itself_checks_shapes(isa):
    native = pytest.importorskip("shoal.kernels._native")
    x = np.ones((5, 70), np.float32)
    good = [np.zeros(s, t) for s, t in (((2, 32, 4, 4), np.int8), ((2, 4, 4), np.float32), ((2, 4, 4), np.int32))]
    native.quantize_rows(x, *good)
    wrong = [
        (0, np.zeros((1, 32, 4, 4), np.int8), r"codes must be \[blocks"),
        (0, np.zeros((2, 18, 4, 4), np.int8), r"codes must be \[blocks"),
        (0, np.zeros((3, 32, 2, 4), np.int8), "lanes must be 1 or 4"),
        (1, np.zeros((2, 3, 4), np.float32), "scales and sums must be"),
        (2, np.zeros((2, 4, 1), np.int32), "scales and sums must be"),
    ]
    for at, array, problem in wrong:
        with pytest.raises(ValueError, match=problem):
            native.quantize_rows(x, *(array if i == at else a for i, a in enumerate(good)))
    with pytest.raises(ValueError, match="rest must have the shape of x"):
        native.quantize_rows(x, *good, np.zeros((5, 64), np.float32))
    with pytest.raises(ValueError, match="elements of a row must be contiguous"):
        native.quantize_rows(np.ones((70, 5), np.float32).T, *good)


@pytest.mark.benchmark
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("cols", [576, 2048, 7168])
def test_benchmark(isa, cols, lanes, random, speed):
    x = np.ascontiguousarray(random((64, cols), 0, 1.0))
    out = packed.quantize_rows(x, lanes)
    native = pytest.importorskip("shoal.kernels._native")
    args = (x, out.codes, out.scales, out.sums)
    speed(f"quantize_rows {isa} 64x{cols} lanes {lanes}", x.nbytes, lambda: native.quantize_rows(*args))
