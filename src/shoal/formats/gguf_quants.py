"""GGUF's block formats in NumPy: the truth that the kernels are tested against.

A row of `cols` values is stored as `cols / block` blocks of a fixed number of bytes. A legacy block (Q4_0 … Q8_0) holds
32 values and one scale; a K block holds 256 values in sub-blocks with their own small integer scales. Sources:
ggml-common.h for the structs, ggml-quants.c for the arithmetic; results equal the `gguf` package's bit for bit.

Shape letters: B blocks, Q values of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

K_BLOCK = 256
K_SCALE_BYTES = 12


@dataclass(frozen=True)
class BlockFormat:
    """One storage format: `block` values take `size` bytes; `ggml_type` is its number in a GGUF file."""

    name: str
    ggml_type: int
    block: int
    size: int

    def row_bytes(self, cols: int) -> int:
        if cols % self.block:
            raise ValueError(f"a row of {cols} values is no whole number of {self.name} blocks of {self.block}")
        return cols // self.block * self.size


FORMATS = {
    fmt.name: fmt
    for fmt in (
        BlockFormat("F32", 0, 1, 4),
        BlockFormat("F16", 1, 1, 2),
        BlockFormat("Q4_0", 2, 32, 2 + 16),
        BlockFormat("Q4_1", 3, 32, 2 + 2 + 16),
        BlockFormat("Q5_0", 6, 32, 2 + 4 + 16),
        BlockFormat("Q5_1", 7, 32, 2 + 2 + 4 + 16),
        BlockFormat("Q8_0", 8, 32, 2 + 32),
        BlockFormat("Q4_K", 12, K_BLOCK, 2 + 2 + K_SCALE_BYTES + K_BLOCK // 2),
        BlockFormat("Q5_K", 13, K_BLOCK, 2 + 2 + K_SCALE_BYTES + K_BLOCK // 8 + K_BLOCK // 2),
        BlockFormat("Q6_K", 14, K_BLOCK, K_BLOCK // 2 + K_BLOCK // 4 + K_BLOCK // 16 + 2),
        BlockFormat("BF16", 30, 1, 2),
    )
}
BY_GGML_TYPE = {fmt.ggml_type: fmt for fmt in FORMATS.values()}
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def dequantize(stored: Bytes, name: str) -> Floats:
    """Stored bytes uint8 [..., row bytes] → float32 [..., cols]."""
    fmt = FORMATS[name]
    if name == "F32":
        return stored.view(np.float32)
    if name == "F16":
        return stored.view(np.float16).astype(np.float32)
    if name == "BF16":
        return np.left_shift(stored.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    values = _DECODERS[name](stored.reshape(-1, fmt.size))
    return values.reshape(*stored.shape[:-1], stored.shape[-1] // fmt.size * fmt.block)


def quantize(values: Floats, name: str) -> Bytes:
    """float32 [..., cols] → stored bytes uint8 [..., row bytes]. Values must be finite; rows must be whole blocks.

    Raises:
        ValueError: the format cannot be written, or the rows are no whole number of blocks.
    """
    fmt = FORMATS[name]
    row_bytes = fmt.row_bytes(values.shape[-1])
    values = np.ascontiguousarray(values, np.float32)
    if name == "F32":
        return values.view(np.uint8)
    if name == "F16":
        return values.astype(np.float16).view(np.uint8)
    if name == "BF16":
        return _encode_bf16(values)
    if name not in _ENCODERS:
        raise ValueError(f"{name} can be read but not written; choose from F32, F16, BF16, {', '.join(_ENCODERS)}")
    return _ENCODERS[name](values.reshape(-1, fmt.block)).reshape(*values.shape[:-1], row_bytes)


# Reading ------------------------------------------------------------------------------------------------------------


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, as float32 [B, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(packed: Bytes) -> Bytes:
    """uint8 [..., n] → [..., 2n]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """The 32 high bits of a Q5 block, bit i belonging to value i: 0 or 16, uint8 [B, 32]."""
    bits: Bytes = np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little") << np.uint8(4)
    return bits


def _decode_q4_0(blocks: Bytes) -> Floats:
    centred: Floats = nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)
    return _half(blocks, 0) * centred


def _decode_q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _decode_q5_0(blocks: Bytes) -> Floats:
    whole = nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    centred: Floats = whole.astype(np.float32) - np.float32(16)
    return _half(blocks, 0) * centred


def _decode_q5_1(blocks: Bytes) -> Floats:
    whole = nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * whole.astype(np.float32) + _half(blocks, 2)


def _decode_q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def k_scales(packed: Bytes) -> tuple[Floats, Floats]:
    """Twelve bytes → eight 6-bit scales and eight 6-bit minimums, float32 [B, 8, 1] each.

    Bytes 0–3 and 4–7 hold the first four of each in their low six bits; bytes 8–11 hold the low nibbles of the last
    four, whose two high bits sit on top of the first bytes.
    """
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=-1)
    minimums = np.concatenate([mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)], axis=-1)
    return scales.astype(np.float32)[..., None], minimums.astype(np.float32)[..., None]


def _decode_k45(blocks: Bytes, quants_B8Q: Bytes) -> Floats:
    scales, minimums = k_scales(blocks[:, 4 : 4 + K_SCALE_BYTES])
    scale, minimum = _half(blocks, 0)[..., None] * scales, _half(blocks, 2)[..., None] * minimums
    return (scale * quants_B8Q.astype(np.float32) - minimum).reshape(-1, K_BLOCK)


def k_nibbles(packed: Bytes) -> Bytes:
    """128 bytes → uint8 [B, 8, 32]: every 32 bytes hold one sub-block low and the next one high."""
    return nibbles(packed.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _decode_q4_k(blocks: Bytes) -> Floats:
    return _decode_k45(blocks, k_nibbles(blocks[:, 16:]))


def _decode_q5_k(blocks: Bytes) -> Floats:
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = ((blocks[:, 16:48][:, None, :] >> shifts) & 1) << np.uint8(4)
    return _decode_k45(blocks, k_nibbles(blocks[:, 48:]) | fifth)


def _decode_q6_k(blocks: Bytes) -> Floats:
    """Two halves of 128 values; each takes 64 bytes of low nibbles and 32 bytes of four 2-bit highs."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    low = nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3) << np.uint8(4)
    centred: Floats = (low | high).astype(np.float32).reshape(-1, 16, 16) - np.float32(32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[..., None] * centred).reshape(-1, K_BLOCK)


_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q8_0": _decode_q8_0,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
}


# Writing ------------------------------------------------------------------------------------------------------------


def _encode_bf16(values: Floats) -> Bytes:
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16  # to nearest, ties to even
    quiet = (bits >> 16) | np.uint32(0x40)  # rounding could turn a NaN into an infinity
    halves: NDArray[np.uint16] = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return halves.view(np.uint8)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where the scale is zero or so small that the quotient is no float32."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: Floats = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _half_bytes(value: Floats) -> Bytes:
    return value.astype(np.float16).view(np.uint8)


def _pack_nibbles(quants: Bytes) -> Bytes:
    packed: Bytes = quants[:, :16] | (quants[:, 16:] << np.uint8(4))
    return packed


def _encode_q4_0(values_BQ: Floats) -> Bytes:
    """The value of largest magnitude becomes −8 times the scale."""
    largest = np.take_along_axis(values_BQ, np.abs(values_BQ).argmax(axis=-1, keepdims=True), axis=-1)
    scale = largest / np.float32(-8)
    quants = np.trunc(values_BQ * _inverse(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([_half_bytes(scale), _pack_nibbles(quants)], axis=-1)


def _encode_q4_1(values_BQ: Floats) -> Bytes:
    low = values_BQ.min(axis=-1, keepdims=True)
    scale = (values_BQ.max(axis=-1, keepdims=True) - low) / np.float32(15)
    quants = np.trunc((values_BQ - low) * _inverse(scale) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([_half_bytes(scale), _half_bytes(low), _pack_nibbles(quants)], axis=-1)


def _encode_q8_0(values_BQ: Floats) -> Bytes:
    scale = np.abs(values_BQ).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = values_BQ * _inverse(scale)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    rounded = np.copysign(whole + np.floor(2 * (magnitude - whole)), scaled)  # halves away from zero, as C's roundf
    return np.concatenate([_half_bytes(scale), rounded.astype(np.int8).view(np.uint8)], axis=-1)


_ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
}
