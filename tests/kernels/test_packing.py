"""Weights into the packed layout and back: native against NumPy byte for byte, both against GGUF's own arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shoal.engine import packing as engine_packing
from shoal.formats import gguf_quants
from shoal.formats.checkpoint import LazyTensor
from shoal.kernels import reference_packing as reference

native = pytest.importorskip("shoal.kernels._native")

SHAPES = [(1, 1), (2, 31), (15, 32), (16, 33), (17, 63), (33, 64), (47, 65), (130, 96), (50, 200)]
BLOCKS = ["Q8_0", "Q4_0", "Q4_1", "Q4_K"]
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SOURCES = {"F32": 0, "BF16": 1, "F16": 2, "Q8_0": 3, "Q4_0": 4, "Q4_1": 5, "Q4_K": 6, "codes": 7}


def _pack(source, data, cols, packing, threads=1, **more):
    kind = reference.PACKINGS.index(packing)
    out = np.full(native.packed_bytes(kind, data.shape[0], cols), 0xA5, np.uint8)
    native.pack(SOURCES[source], data.view(np.uint8), data.shape[0], cols, kind, out, threads, **more)
    return out


def _rows_of(packing, rows, cols, tiles):
    """The matrix as the native side reads it back."""
    packed = native.Packed(reference.PACKINGS.index(packing), rows, cols, tiles)
    out = np.empty((rows, cols), np.float32)
    for row in range(rows):
        packed.row(row, out[row])
    return out


def _random_blocks(name, rows, blocks, seed):
    """Any codes with sane half-precision scales, as no quantiser of floats would choose them."""
    rng, fmt = np.random.default_rng(seed), gguf_quants.FORMATS[name]
    stored = rng.integers(0, 256, (rows, blocks, fmt.size), np.uint8)
    halves = 2 if name in ("Q4_1", "Q4_K") else 1
    scales = rng.choice([1.0, -0.5, 0.0, 3e-7, 6e-8, 0.1, 100.0], (rows, blocks, halves)).astype(np.float16)
    stored[:, :, : 2 * halves] = scales.view(np.uint8)
    return stored.reshape(rows, blocks * fmt.size), blocks * fmt.block


@pytest.mark.parametrize("packing", reference.PACKINGS)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_floats_match_reference(rows, cols, source, packing, random):
    w = np.ascontiguousarray(random((rows, cols), rows + cols, 0.1)).astype(FLOATS[source])
    truth = reference.pack(w.astype(np.float32), packing)
    tiles = _pack(source, w, cols, packing)
    np.testing.assert_array_equal(tiles, truth.tiles)
    np.testing.assert_array_equal(_rows_of(packing, rows, cols, tiles), reference.unpack(truth))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 2), (16, 3), (33, 5), (40, 4), (16, 8)])
def test_blocks_match_reference(name, rows, blocks):
    stored, cols = _random_blocks(name, rows, blocks, rows)
    packing = reference.PACKING_OF_BLOCKS[name]
    truth = reference.pack_blocks(stored, name)
    tiles = _pack(name, stored, cols, packing)
    np.testing.assert_array_equal(tiles, truth.tiles)
    np.testing.assert_array_equal(_rows_of(packing, rows, cols, tiles), reference.unpack(truth))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_keep_their_values(name):
    """GGUF's own arithmetic is the truth; only Q4_K's products of two scales are rounded, to 11 bits each."""
    stored, _ = _random_blocks(name, 20, 4, 1)
    ours, truth = reference.unpack(reference.pack_blocks(stored, name)), gguf_quants.dequantize(stored, name)
    if name != "Q4_K":
        np.testing.assert_array_equal(ours, truth)
        return
    d, dmin = stored.reshape(20, 4, 144)[:, :, :4].copy().view(np.float16).astype(np.float32).transpose(2, 0, 1)
    largest = 63 * (15 * np.abs(d) + np.abs(dmin))
    error = np.abs(ours - truth).reshape(20, 4, 256)
    assert (error <= 2.0**-11 * largest[..., None] + 2.0**-24 * 16).all() and error.any()


@pytest.mark.parametrize("packing", ["q8", "q4", "q4m"])
def test_rounding_is_that_of_gguf(packing, random):
    """A float matrix packed equals the same matrix quantised to GGUF's blocks first."""
    w = np.ascontiguousarray(random((40, 96), 7, 0.1))
    w[0] = 0
    w[1] *= 1e-9  # scales too small for a half
    w[2] *= np.float32(1e-36)  # and quotients too large for a float
    w[3] = 0.25
    name = {"q8": "Q8_0", "q4": "Q4_0", "q4m": "Q4_1"}[packing]
    tiles = _pack(name, gguf_quants.quantize(w, name), 96, packing)
    np.testing.assert_array_equal(_pack("F32", w, 96, packing), tiles)
    values = _rows_of(packing, 40, 96, tiles)
    assert np.isfinite(values).all() and not values[0].any()
    step = {"q8": 1 / 127, "q4": 1 / 8, "q4m": 2 / 15}[packing] * np.abs(w).max(axis=1, keepdims=True)
    assert (np.abs(values - w) <= step + 1e-7).all()


@pytest.mark.parametrize("packing", ["q8", "q4", "q4m"])
def test_padding_stands_for_zero(packing):
    """And does not widen the range of a group's real columns."""
    w = np.linspace(5.0, 6.0, 40, dtype=np.float32).reshape(1, 40)
    tiles = _pack("F32", w, 40, packing)
    whole = reference.PackedWeights(packing=packing, rows=16, cols=64, tiles=tiles)
    values = reference.unpack(whole)
    assert not values[1:].any()
    if packing == "q4m":  # the minimum counts in the padding of the last group too, where activations are zero
        np.testing.assert_allclose(values[0, :40], w[0], atol=0.03)
    else:
        assert not values[0, 40:].any()


@pytest.mark.parametrize("packing", reference.PACKINGS)
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_a_fault_stays_visible_in_its_group(packing, fault, random):
    for at in (0, 5, 33):
        w = np.ascontiguousarray(random((3, 64), 1, 1.0))
        clean = _rows_of(packing, 3, 64, _pack("F32", w, 64, packing))
        w[1, at] = fault
        values = _rows_of(packing, 3, 64, _pack("F32", w, 64, packing))
        assert not np.isfinite(values[1, at])
        other = np.ones((3, 64), bool)
        other[1, at // 32 * 32 : at // 32 * 32 + 32] = False
        np.testing.assert_array_equal(values[other], clean[other])


def test_bf16_rounds_to_nearest_even_and_keeps_nan():
    bits = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7FFFFFFF, 0xFF800001]], np.uint32)
    got = _rows_of("bf16", 1, 6, _pack("F32", bits, 6, "bf16")).view(np.uint32)[0] >> 16
    assert got[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]
    assert np.isnan((got[4:].astype(np.uint32) << 16).view(np.float32)).all()


def test_every_half_survives():
    """Every finite scale there is, subnormal ones among them, through a block and back."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    stored = np.zeros((halves.size, 34), np.uint8)
    stored[:, :2] = halves[:, None].view(np.uint8)
    stored[:, 2:] = 1
    values = _rows_of("q8", halves.size, 32, _pack("Q8_0", stored, 32, "q8"))
    np.testing.assert_array_equal(values, np.repeat(halves.astype(np.float32)[:, None], 32, axis=1))
    # And every rounding to one: the halves themselves, the middles between them and their neighbours.
    f = np.unique(np.abs(halves)).astype(np.float32)[1:]
    middle = (f[1:] + f[:-1]) / 2
    scales = np.concatenate([f, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    codes = np.ones((scales.size, 32), np.int8)
    got = _rows_of("q8", scales.size, 32, _pack("codes", codes, 32, "q8", scales=scales[:, None]))[:, 0]
    np.testing.assert_array_equal(got, scales.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("cols", [200, 256])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("packing", ["q8", "q4", "q4m"])
def test_codes_with_scales_of_their_own(packing, group, cols):
    """int8 codes with a scale, and a minimum in q4m, for each `group` columns: the form of compressed-tensors."""
    low, high = {"q8": (-128, 128), "q4": (-8, 8), "q4m": (0, 16)}[packing]
    rng = np.random.default_rng(group)
    codes = rng.integers(low, high, (21, cols)).astype(np.int8)
    scales, minima = (rng.normal(size=(21, -(-cols // group))).astype(np.float16).astype(np.float32) for _ in range(2))
    more = {"minima": minima} if packing == "q4m" else {}
    values = _rows_of(packing, 21, cols, _pack("codes", codes, cols, packing, scales=scales, group=group, **more))
    expected = codes.astype(np.float32) * np.repeat(scales, group, axis=1)[:, :cols]
    if packing == "q4m":
        expected += np.repeat(minima, group, axis=1)[:, :cols]
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("packing", reference.PACKINGS)
def test_threads_and_addresses_do_not_matter(packing, random, odd_byte):
    w = np.ascontiguousarray(random((333, 70), 3, 1.0))
    one = _pack("F32", w, 70, packing)
    np.testing.assert_array_equal(_pack("F32", w, 70, packing, threads=5), one)
    np.testing.assert_array_equal(_pack("F32", odd_byte(w), 70, packing, threads=0), one)


def test_wrong_inputs_are_refused():
    w = np.ones((4, 64), np.float32)
    q8 = gguf_quants.quantize(w, "Q8_0")
    codes, scales = np.full((4, 64), 7, np.int8), np.ones((4, 2), np.float32)
    wrong = [
        ("Q8_0", q8, 64, "q4", {}, "do not go into that packing"),
        ("F32", w, 65, "q8", {}, "rows have the wrong number of bytes"),
        ("Q8_0", q8[:, :34].copy(), 33, "q8", {}, "rows have the wrong number of bytes"),
        ("Q4_K", np.zeros((4, 144), np.uint8), 288, "q4m", {}, "rows have the wrong number of bytes"),
        ("codes", codes, 64, "q4", {}, "one scale a group and row"),
        ("codes", codes, 64, "q4", {"scales": scales, "group": 0}, "a group is a multiple of 32 columns"),
        ("codes", codes, 64, "q4", {"scales": scales, "group": 48}, "a group is a multiple of 32 columns"),
        ("codes", codes, 64, "q4", {"scales": scales[:, :1].copy()}, "one scale a group and row"),
        ("codes", codes, 64, "q4", {"scales": scales, "minima": scales}, "minima go into q4m alone"),
        ("codes", codes + np.int8(1), 64, "q4", {"scales": scales}, "out of the packing's range"),
        ("codes", -codes, 64, "q4m", {"scales": scales, "minima": scales}, "out of the packing's range"),
    ]
    for source, data, cols, packing, more, problem in wrong:
        with pytest.raises(ValueError, match=problem):
            _pack(source, data, cols, packing, **more)
    out = np.zeros(native.packed_bytes(2, 4, 64), np.uint8)
    with pytest.raises(ValueError, match="out does not fit the matrix"):
        native.pack(0, w.view(np.uint8), 4, 64, 2, out[:-1])
    with pytest.raises(ValueError, match="data must hold the rows' bytes"):
        native.pack(0, w[:3].view(np.uint8), 4, 64, 2, out)
    with pytest.raises(ValueError, match="no such packing or an empty matrix"):
        native.packed_bytes(5, 4, 64)
    with pytest.raises(ValueError, match="memory does not fit the matrix"):
        native.Packed(2, 4, 64, out[:-1])
    with pytest.raises(ValueError, match="no such row"):
        native.Packed(2, 4, 64, out).row(4, np.zeros(64, np.float32))
    with pytest.raises(ValueError, match="no such row"):
        native.Packed(2, 4, 64, out).row(0, np.zeros(63, np.float32))


# From a checkpoint's tensors ------------------------------------------------------------------------------------------


def _tensor(chunks, shape, dtype, blocks=None):
    raw = None if blocks is None else lambda: blocks
    return LazyTensor(
        name="w", shape=shape, dtype=dtype, source="nowhere", make_chunks=lambda: iter(chunks), raw_blocks=raw
    )


def _values(packed, shape):
    out = np.empty((packed.count * packed.rows, packed.cols), np.float32)
    for row in range(out.shape[0]):
        packed.row(row, out[row])
    return out.reshape(shape)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_tensor_of_blocks_keeps_its_codes(name):
    stored, cols = _random_blocks(name, 34, 2, 3)
    tensor = _tensor([], (34, cols), name.upper(), stored)  # reading floats would fail: there are no chunks
    packing = engine_packing.packing_for(tensor, "auto")
    assert packing == reference.PACKING_OF_BLOCKS[name]
    packed = engine_packing.pack_tensor(tensor, packing, threads=2)
    np.testing.assert_array_equal(_values(packed, tensor.shape), reference.unpack(reference.pack_blocks(stored, name)))
    stack = engine_packing.pack_tensor(_tensor([], (2, 17, cols), name, stored), packing)  # experts
    assert (stack.count, stack.rows, stack.cols) == (2, 17, cols)
    np.testing.assert_array_equal(_values(stack, tensor.shape), _values(packed, tensor.shape))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("packing", reference.PACKINGS)
def test_a_stack_equals_its_matrices(source, packing, random):
    w = np.ascontiguousarray(random((3, 18, 70), 5, 0.1)).astype(FLOATS[source])
    for chunks in ([w], list(w[:, None]), [w[:1], w[1:]]):
        packed = engine_packing.pack_tensor(_tensor(chunks, w.shape, source), packing)
        whole = engine_packing.pack_array(w.astype(np.float32), packing)
        for either in (packed, whole):
            assert (either.count, either.rows, either.cols) == (3, 18, 70)
            assert either.nbytes == 3 * native.packed_bytes(reference.PACKINGS.index(packing), 18, 70)
            for index, values in enumerate(_values(either, w.shape)):
                truth = reference.unpack(reference.pack(w[index].astype(np.float32), packing))
                np.testing.assert_array_equal(values, truth)
    parts = engine_packing.pack_tensor(_tensor([w[0, :7], w[0, 7:]], (18, 70), source), packing)
    np.testing.assert_array_equal(_values(parts, (18, 70)), _values(packed, w.shape)[0])


def test_blocks_go_through_floats_into_another_packing():
    stored, cols = _random_blocks("Q8_0", 20, 2, 8)
    floats = gguf_quants.dequantize(stored, "Q8_0")
    packed = engine_packing.pack_tensor(_tensor([floats], (20, cols), "Q8_0", stored), "q4m")
    np.testing.assert_array_equal(_values(packed, (20, cols)), reference.unpack(reference.pack(floats, "q4m")))


@pytest.mark.benchmark
@pytest.mark.parametrize("packing", reference.PACKINGS)
def test_benchmark_packing(packing, random, speed):
    w = np.ascontiguousarray(random((256, 2048), 0, 1.0))
    speed(f"pack {packing} 256x2048", w.nbytes, lambda: _pack("F32", w, 2048, packing))
