from __future__ import annotations

import numpy as np
import pytest

from shoal.kernels import packed
from shoal.kernels import reference_packed as reference
from shoal.kernels import reference_packing as packing

PACKINGS = ["f32", "bf16"]
SHAPES = [(1, 1), (5, 2), (15, 31), (16, 33), (17, 63), (33, 64), (40, 65), (48, 130), (50, 200), (31, 577)]


def _inputs(kind, rows, cols, tokens, random):
    return packing.pack(random((rows, cols), rows, 0.1), kind), random((tokens, cols), cols, 1.0)


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_matches_reference(isa, kind, rows, cols, random):
    weights, x = _inputs(kind, rows, cols, 13, random)
    y = packed.matmul_f(weights, x)
    # Every addition rounds: at most one step of float32 for each of the columns, in practice far less.
    magnitude = np.abs(x) @ np.abs(packing.unpack(weights)).T
    assert (np.abs(y - reference.matmul_f(weights, x)) <= 2.0**-24 * (cols + 3) * magnitude).all()
    np.testing.assert_allclose(y, reference.matmul_f(weights, x), rtol=0, atol=2e-6 * float(magnitude.max()))
    for tokens in range(13):  # bit for bit: a row's result does not depend on its company
        np.testing.assert_array_equal(packed.matmul_f(weights, x[:tokens]), y[:tokens], err_msg=f"{tokens} tokens")
        np.testing.assert_array_equal(packed.matmul_f(weights, x[tokens : tokens + 1])[0], y[tokens])


def test_reference_is_a_product():
    w = np.array([[1.0, 2.0, 4.0], [-0.5, 0.25, 0.0]], np.float32)
    for kind in PACKINGS:
        y = reference.matmul_f(packing.pack(w, kind), np.array([[3.0, 5.0, 7.0]], np.float32))
        assert y.tolist() == [[41.0, -0.25]]
    third = packing.pack(np.array([[1 / 3]], np.float32), "bf16")
    assert reference.matmul_f(third, np.ones((1, 1), np.float32)).tolist() == [[0.333984375]]


@pytest.mark.parametrize("kind", PACKINGS)
def test_adds_onto(isa, kind, random):
    weights, x = _inputs(kind, 21, 70, 7, random)
    before = random((7, 21), 9, 1.0).copy()
    onto = before.copy()
    assert packed.matmul_f(weights, x, onto=onto) is onto
    np.testing.assert_array_equal(onto, before + packed.matmul_f(weights, x))


@pytest.mark.parametrize("kind", PACKINGS)
def test_odd_addresses_strides_and_gaps(isa, kind, random, odd_byte):
    weights, x = _inputs(kind, 37, 101, 6, random)
    expected = packed.matmul_f(weights, np.ascontiguousarray(x))
    raw = np.empty(weights.tiles.size + 1, np.uint8)
    raw[1:] = weights.tiles
    moved = packing.PackedWeights(packing=kind, rows=37, cols=101, tiles=raw[1:])
    block = np.full((6, 45), 7.0, np.float32)
    native = pytest.importorskip("shoal.kernels._native")
    native.matmul_f(packing.PACKINGS.index(kind), moved.tiles, odd_byte(x), block[:, 3:40])
    np.testing.assert_array_equal(block[:, 3:40], expected)
    assert (block[:, :3] == 7).all() and (block[:, 40:] == 7).all()
    y = odd_byte(np.zeros((6, 37), np.float32))
    np.testing.assert_array_equal(packed.matmul_f(moved, np.asfortranarray(x), onto=y), expected)
    square = packing.pack(random((101, 101), 5, 1.0), kind)
    both = np.ascontiguousarray(x)
    assert packed.matmul_f(square, both, onto=both) is both  # x itself: the face reads a copy
    np.testing.assert_array_equal(both, x + packed.matmul_f(square, x))


@pytest.mark.parametrize("kind", PACKINGS)
def test_extremes(isa, kind):
    w = np.zeros((18, 70), np.float32)
    w[1] = 1e30
    w[2, 69] = 1e-38
    w[17, 0] = np.inf
    x = np.ones((5, 70), np.float32)
    x[1] = 0
    x[2, 69] = 1e38
    x[3] = 1e9
    y = packed.matmul_f(packing.pack(w, kind), x)
    assert not y[:, 0].any() and (y[3, 1] == np.inf) and y[0, 17] == np.inf and np.isnan(y[1, 17])
    np.testing.assert_allclose(y[:3, 1:3], reference.matmul_f(packing.pack(w, kind), x)[:3, 1:3], rtol=1e-5)
    x[4, 3] = np.nan
    again = packed.matmul_f(packing.pack(w, kind), x)
    assert np.isnan(again[4]).all()
    np.testing.assert_array_equal(again[:4], y[:4])


def test_wrong_inputs_are_named(isa, random):
    weights, x = _inputs("f32", 20, 64, 3, random)
    with pytest.raises(ValueError, match="x: 65 columns, expected 64"):
        packed.matmul_f(weights, np.ones((3, 65), np.float32))
    with pytest.raises(ValueError, match="x: 1 axes, expected 2"):
        packed.matmul_f(weights, np.ones(64, np.float32))
    with pytest.raises(ValueError, match=r"onto: shape \(2, 20\), expected \(3, 20\)"):
        packed.matmul_f(weights, x, onto=np.zeros((2, 20), np.float32))
    with pytest.raises(ValueError, match="a packing of the other kernel"):
        packed.matmul_f(packing.pack(np.ones((20, 64), np.float32), "q8"), x)


def test_the_binding_itself_checks_shapes(isa, random):
    native = pytest.importorskip("shoal.kernels._native")
    weights, x = _inputs("bf16", 20, 64, 3, random)
    y = np.zeros((3, 20), np.float32)
    with pytest.raises(ValueError, match="x and y differ in rows"):
        native.matmul_f(1, weights.tiles, np.ones((4, 64), np.float32), y)
    with pytest.raises(ValueError, match="tiles do not fit"):
        native.matmul_f(0, weights.tiles, x, y)
    with pytest.raises(ValueError, match="tiles do not fit"):
        native.matmul_f(1, weights.tiles, x, np.zeros((3, 33), np.float32))
    with pytest.raises(ValueError, match="a packing of the other kernel"):
        native.matmul_f(-1, weights.tiles, x, y)


@pytest.mark.benchmark
@pytest.mark.parametrize("tokens", [1, 4, 64])
@pytest.mark.parametrize("kind", PACKINGS)
def test_benchmark(isa, kind, tokens, random, speed):
    weights, x = _inputs(kind, 512, 2048, tokens, random)
    x = np.ascontiguousarray(x)
    speed(f"matmul_f {isa} {kind} 512x2048, {tokens} tokens", weights.tiles.nbytes, lambda: packed.matmul_f(weights, x))
