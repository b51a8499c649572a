"""Block formats against the `gguf` package, bit for bit."""

import numpy as np
import pytest

from shoal.formats.gguf_quants import BY_GGML_TYPE, FORMATS, PLAIN, dequantize, quantize

gguf = pytest.importorskip("gguf")

WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def bits(values):
    return np.ascontiguousarray(values).view(np.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_and_numbers_are_ggmls(name):
    fmt = FORMATS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert (fmt.block, fmt.size) == gguf.GGML_QUANT_SIZES[kind]
    assert fmt.ggml_type == kind.value
    assert BY_GGML_TYPE[kind.value] is fmt


@pytest.mark.parametrize("name", FORMATS)
def test_any_stored_bytes_decode_as_in_gguf(name):
    """Random bytes reach every scale, including infinities and NaN."""
    fmt = FORMATS[name]
    stored = np.random.default_rng(1).integers(0, 256, (3, 40, 5 * fmt.size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
        ours = dequantize(stored, name)
    assert ours.dtype == np.float32
    assert ours.shape == (3, 40, 5 * fmt.block)
    assert np.array_equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("name", WRITABLE)
def test_encoding_is_ggufs(name):
    rng = np.random.default_rng(2)
    values = rng.standard_normal((50, 256), dtype=np.float32) * np.exp(rng.standard_normal((50, 1), dtype=np.float32))
    values[0] = 0  # a block without a scale
    values[1, 32:64] = -3.0  # one value only
    values[2, :64] = np.repeat([0.5, 1.5, -0.5, 127.0], 16)  # ties in Q8_0, whose scale is 1
    values[3] = np.abs(values[3])
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    assert np.array_equal(quantize(values, name), bits(theirs).reshape(50, -1))


@pytest.mark.parametrize("name", WRITABLE)
def test_what_is_written_reads_back_close(name):
    values = np.random.default_rng(3).standard_normal((4, 64), dtype=np.float32)
    back = dequantize(quantize(values, name), name)
    steps = {"F32": 0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 1 / 127, "Q4_0": 1 / 7, "Q4_1": 1 / 7}
    assert np.abs(back - values).max() <= steps[name] * np.abs(values).max()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_tiny_blocks_become_zero_not_garbage(name):
    """A scale that float16 rounds to zero, whose inverse overflows float32."""
    values = np.linspace(0, 1e-41, 32, dtype=np.float32)[None]
    assert np.array_equal(dequantize(quantize(values, name), name), np.zeros((1, 32), np.float32))


def test_bfloat16_keeps_nan_and_infinity():
    values = np.array([[np.nan, np.inf, -np.inf, 3.4e38]], np.float32)
    values.view(np.uint32)[0, 0] = 0x7F800001  # a NaN whose high half is an infinity's
    back = dequantize(quantize(values, "BF16"), "BF16")[0]
    assert np.isnan(back[0])
    assert np.array_equal(back[1:3], [np.inf, -np.inf])


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match="no whole number of Q4_0 blocks of 32"):
        quantize(np.zeros((2, 33), np.float32), "Q4_0")


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(WRITABLE)))
def test_formats_that_are_only_read_say_so(name):
    with pytest.raises(ValueError, match=f"{name} can be read but not written"):
        quantize(np.zeros((1, 256), np.float32), name)


def test_plain_types_match_their_sizes():
    assert {name: dtype.itemsize for name, dtype in PLAIN.items()} == {"F32": 4, "F16": 2, "BF16": 2}
