"""Quantised weights against quantised rows. The definition fixes every rounding, so the truth is matched bit for bit,
and with it that a row's result depends neither on the rows beside it nor on their interleaving."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.kernels import packed
from shoal.kernels import reference_packed as reference
from shoal.kernels import reference_packing as packing

PACKINGS = ["q8", "q4", "q4m"]
# Rows × columns: one, odd, one short of and one past a tile, a group, a block; a small model's width.
SHAPES = [(1, 1), (5, 31), (15, 32), (16, 33), (17, 63), (33, 64), (40, 65), (48, 130), (50, 200), (31, 576)]


def _inputs(kind, rows, cols, tokens, random, spread=1.0):
    return packing.pack(random((rows, cols), rows, 0.1), kind), random((tokens, cols), cols, spread)


def _matches_bit_for_bit(isa, weights, x):
    truth = reference.matmul_q(weights, reference.quantize_rows(x), fused=isa != "scalar")
    for lanes in (1, 4):
        y = packed.matmul_q(weights, packed.quantize_rows(x, lanes))
        np.testing.assert_array_equal(y, truth)
    return truth


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_matches_reference(isa, kind, rows, cols, random):
    weights, x = _inputs(kind, rows, cols, 13, random)
    truth = _matches_bit_for_bit(isa, weights, x)
    for tokens in range(13):
        for lanes in (1, 4):
            y = packed.matmul_q(weights, packed.quantize_rows(x[:tokens], lanes))
            np.testing.assert_array_equal(y, truth[:tokens], err_msg=f"{tokens} tokens in {lanes} lanes")


@pytest.mark.parametrize("kind", PACKINGS)
def test_reference_is_a_product(kind, random):
    """Against the unpacked weights in double precision; the bound is that of rounding once a group."""
    weights, x = _inputs(kind, 20, 150, 6, random)
    quant = reference.quantize_rows(x)
    codes, scales, _ = quant.plain()
    rounded = (codes * np.repeat(scales, 32, axis=1))[:, :150].astype(np.float64)
    w = packing.unpack(weights).astype(np.float64)
    for fused in (True, False):
        error = np.abs(reference.matmul_q(weights, quant, fused=fused) - rounded @ w.T)
        assert (error <= 4e-6 * (np.abs(rounded) @ np.abs(w).T + np.abs(x).max())).all()


def test_reference_rounds_a_fused_sum_once():
    """Cases that a sum in double precision, rounded again, gets wrong; checked against exact fractions."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=400).astype(np.float32) for _ in range(2))
    c = (-a.astype(np.float64) * b * rng.choice([1, 0.5, 2.0**-24, 2.0**30], 400)).astype(np.float32)
    # 1 + 2^-24 is a tie of float32, and 2^-60 breaks it upwards: lost in double precision.
    a[0], b[0], c[0] = 2.0**-24, 1 + 2.0**-23, 1.0
    a[1], b[1], c[1] = 2.0**-30, 2.0**-30, 1 + 2.0**-23
    y = reference.fused_multiply_add(a, b, c)
    for i in range(400):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        beside = [np.nextafter(y[i], np.float32(side)) for side in (-np.inf, np.inf)]
        distance = abs(Fraction(float(y[i])) - exact)
        assert all(distance <= abs(Fraction(float(other)) - exact) for other in beside)
    assert y[0] == np.float32(1 + 2.0**-23)


@pytest.mark.parametrize("kind", PACKINGS)
def test_float_weights_within_the_rounding_of_activations(isa, kind, random):
    """|y - x Wᵀ| is at most half a step of every activation times its weight."""
    weights, x = _inputs(kind, 30, 300, 5, random)
    w = packing.unpack(weights).astype(np.float64)
    steps = np.repeat(reference.quantize_rows(x).plain()[1], 32, axis=1)[:, :300]
    bound = (0.5001 * steps) @ np.abs(w).T + 1e-6 * (np.abs(x) @ np.abs(w).T)
    error = np.abs(packed.matmul_q(weights, packed.quantize_rows(x, 4)) - x @ w.T)
    assert (error <= bound).all()
    assert error.max() > 1e-5  # it is eight bits: the bound is not met by accident


@pytest.mark.parametrize("kind", PACKINGS)
def test_two_layers_of_activations_are_nearly_exact(isa, kind, random):
    """What eight bits leave over, quantised again: activations of about 16 bits (the executor's wide rows)."""
    weights, x = _inputs(kind, 30, 576, 5, random)
    high = packed.quantize_rows(x, 4)
    low = packed.quantize_rows(high.rest, 4)
    y = packed.matmul_q(weights, high)
    one_layer = y.copy()
    packed.matmul_q(weights, low, onto=y)
    w = packing.unpack(weights).astype(np.float64)
    truth = x @ w.T
    steps = np.repeat(low.plain()[1], 32, axis=1)
    assert (np.abs(y - truth) <= 0.51 * steps @ np.abs(w).T + 1e-6 * np.abs(x) @ np.abs(w).T).all()
    error, coarse = (np.linalg.norm(a - truth) / np.linalg.norm(truth) for a in (y, one_layer))
    assert error < 3e-5 < 3e-3 < coarse


@pytest.mark.parametrize("kind", PACKINGS)
def test_adds_onto(isa, kind, random):
    weights, x = _inputs(kind, 21, 70, 7, random)
    quant, before = packed.quantize_rows(x, 4), random((7, 21), 9, 1.0).copy()
    onto = before.copy()
    assert packed.matmul_q(weights, quant, onto=onto) is onto
    np.testing.assert_array_equal(onto, before + packed.matmul_q(weights, quant))


@pytest.mark.parametrize("kind", PACKINGS)
def test_writes_its_rows_only_and_reads_tiles_anywhere(isa, kind, random, odd_byte):
    weights, x = _inputs(kind, 37, 100, 6, random)
    expected = packed.matmul_q(weights, packed.quantize_rows(x, 4))
    block = np.full((6, 45), 7.0, np.float32)
    raw = np.empty(weights.tiles.size + 1, np.uint8)
    raw[1:] = weights.tiles
    moved = packing.PackedWeights(packing=kind, rows=37, cols=100, tiles=raw[1:])
    native = pytest.importorskip("shoal.kernels._native")
    quant = packed.quantize_rows(x, 4)
    native.matmul_q(
        packing.PACKINGS.index(kind), moved.tiles, 100, quant.codes, quant.scales, quant.sums, block[:, 3:40]
    )
    np.testing.assert_array_equal(block[:, 3:40], expected)
    assert (block[:, :3] == 7).all() and (block[:, 40:] == 7).all()
    y = odd_byte(np.zeros((6, 37), np.float32))
    np.testing.assert_array_equal(packed.matmul_q(moved, quant, onto=y), expected)


@pytest.mark.parametrize("kind", PACKINGS)
def test_extreme_codes(isa, kind):
    """Every code at either end: the largest whole-number sums, which 16-bit intermediate products must hold."""
    rows, cols = 17, 128
    weights = packing.pack(np.zeros((rows, cols), np.float32), kind)
    tiles = weights.tiles.copy()
    head = 128 if kind == "q4m" else 64
    size = head + (1024 if kind == "q8" else 512)
    blocks = tiles.reshape(-1, size)
    rng = np.random.default_rng(0)
    for fill in (0x00, 0xFF, None):
        blocks[:, head:] = rng.choice([0x00, 0xFF, 0xF0, 0x0F], blocks[:, head:].shape) if fill is None else fill
        halves = blocks[:, :head].view(np.float16)
        halves[...] = rng.choice([1.0, -0.25, 6e-8, 65504.0, 0.0], halves.shape)  # 6e-8 is subnormal
        whole = packing.PackedWeights(packing=kind, rows=rows, cols=cols, tiles=tiles.copy())
        for sign in (1, -1, 0):
            x = np.full((5, cols), 127.0 * sign, np.float32)
            if sign == 0:
                x[...] = rng.choice([-127.0, 127.0], x.shape)
            assert np.isfinite(_matches_bit_for_bit(isa, whole, x)).all()


@pytest.mark.parametrize("kind", PACKINGS)
def test_extreme_values(isa, kind, random):
    """Zero rows and weights, one huge activation, weights whose scale is a subnormal half or none at all."""
    rows, cols = 20, 96
    w = random((rows, cols), 1, 1.0).copy()
    w[0] = 0
    w[1] *= 1e-6
    w[2] *= 1e-9
    w[3, 5] = 4e5
    x = random((5, cols), 2, 1.0).copy()
    x[0] = 0
    x[1, 40] = 1e30
    x[2] *= 1e-38
    weights = packing.pack(w, kind)
    y = _matches_bit_for_bit(isa, weights, x)
    assert np.isfinite(y).all() and not y[0].any() and not y[:, 0].any()


@pytest.mark.parametrize("kind", PACKINGS)
def test_what_is_not_finite_shows_and_stays_in_its_row(isa, kind, random):
    weights, x = _inputs(kind, 19, 80, 9, random)
    clean = packed.matmul_q(weights, packed.quantize_rows(x, 4))
    x = x.copy()
    x[4, 33] = np.nan
    y = packed.matmul_q(weights, packed.quantize_rows(x, 4))
    others = np.arange(9) != 4
    assert np.isnan(y[4]).all()
    np.testing.assert_array_equal(y[others], clean[others])
    w = random((19, 80), 3, 1.0).copy()
    w[7] *= 1e8  # its scale does not fit a half
    with np.errstate(over="ignore"):
        huge = packing.pack(w, kind)
    y = packed.matmul_q(huge, packed.quantize_rows(x[others], 4))
    assert not np.isfinite(y[:, 7]).any() and np.isfinite(np.delete(y, 7, axis=1)).all()


def test_wrong_inputs_are_named(isa, random):
    weights, x = _inputs("q8", 20, 64, 3, random)
    quant = packed.quantize_rows(x, 4)
    with pytest.raises(ValueError, match="x: 65 columns, expected 64"):
        packed.matmul_q(weights, packed.quantize_rows(np.ones((3, 65), np.float32)))
    with pytest.raises(ValueError, match=r"onto: shape \(3, 21\), expected \(3, 20\)"):
        packed.matmul_q(weights, quant, onto=np.zeros((3, 21), np.float32))
    with pytest.raises(ValueError, match="onto: must be writeable with contiguous rows"):
        packed.matmul_q(weights, quant, onto=np.zeros((20, 3), np.float32).T)
    with pytest.raises(ValueError, match="a packing of the other kernel"):
        packed.matmul_q(packing.pack(np.ones((20, 64), np.float32), "bf16"), quant)


def test_the_binding_itself_checks_shapes(isa, random):
    native = pytest.importorskip("shoal.kernels._native")
    weights, x = _inputs("q4", 20, 64, 3, random)
    quant, y = packed.quantize_rows(x, 4), np.zeros((3, 20), np.float32)
    arrays = (quant.codes, quant.scales, quant.sums)
    with pytest.raises(ValueError, match="tiles do not fit"):
        native.matmul_q(3, weights.tiles[:-1], 64, *arrays, y)
    with pytest.raises(ValueError, match="tiles do not fit"):
        native.matmul_q(3, weights.tiles, 64, *arrays, np.zeros((3, 33), np.float32))
    with pytest.raises(ValueError, match="tiles do not fit"):
        native.matmul_q(2, weights.tiles, 64, *arrays, y)
    with pytest.raises(ValueError, match=r"codes must be \[blocks"):
        native.matmul_q(3, weights.tiles, 64, *arrays, np.zeros((5, 20), np.float32))
    with pytest.raises(ValueError, match="a packing of the other kernel"):
        native.matmul_q(5, weights.tiles, 64, *arrays, y)


@pytest.mark.benchmark
@pytest.mark.parametrize("tokens", [1, 4, 12, 64])
@pytest.mark.parametrize("kind", PACKINGS)
def test_benchmark(isa, kind, tokens, random, speed):
    weights, x = _inputs(kind, 512, 2048, tokens, random)
    quant = packed.quantize_rows(x, 1 if tokens == 1 else 4)
    speed(
        f"matmul_q {isa} {kind} 512x2048, {tokens} tokens",
        weights.tiles.nbytes,
        lambda: packed.matmul_q(weights, quant),
    )
