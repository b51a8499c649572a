"""Packed weights in NumPy: the layout of native/include/shoal/packed.h written a second time from its description, with
GGUF's own arithmetic (`formats.gguf_quants`) where floats become codes. Equal to the native packing byte for byte.

Letters: R rows of a matrix, C its columns, G groups of 32 columns; R' and C' are padded to 16 and 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shoal.formats import gguf_quants

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

PACKINGS = ("f32", "bf16", "q8", "q4", "q4m")  # numbered as shoal::Packing
PACKING_OF_BLOCKS = {"Q8_0": "q8", "Q4_0": "q4", "Q4_1": "q4m", "Q4_K": "q4m"}
TILE_ROWS, BLOCK_COLS, GROUP = 16, 64, 32

_ZERO_CODE = {"q8": 128, "q4": 8, "q4m": 0}  # what is stored for a code that means zero
_FORMAT = {"q8": "Q8_0", "q4": "Q4_0", "q4m": "Q4_1"}  # whose rounding of floats a packing shares


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeights:
    """A matrix [rows, cols] in one packing; tiles: uint8, laid out as packed.h says."""

    packing: str
    rows: int
    cols: int
    tiles: Bytes


def pack(weights_RC: F32, packing: str) -> PackedWeights:
    """Float32 weights [R, C] into any packing."""
    rows, cols = weights_RC.shape
    if packing in ("f32", "bf16"):
        stored = gguf_quants.quantize(weights_RC, packing.upper())
        values = stored.view(np.uint32 if packing == "f32" else np.uint16)
        padded = _pad(values)
        tiles = padded.reshape(-1, TILE_ROWS, padded.shape[1] // BLOCK_COLS, BLOCK_COLS).transpose(0, 2, 3, 1)
        return PackedWeights(packing=packing, rows=rows, cols=cols, tiles=_bytes(tiles))
    name = _FORMAT[packing]
    whole = np.pad(weights_RC, ((0, 0), (0, -cols % GROUP)), mode="edge")  # a repeated value moves no range
    codes, scales, minima = _split(gguf_quants.quantize(whole, name), name)
    return _lay_out(packing, codes[:, :cols], scales, minima)


def pack_blocks(stored: Bytes, name: str) -> PackedWeights:
    """Rows of GGUF blocks, uint8 [R, row bytes], keeping their codes; `name` is Q8_0, Q4_0, Q4_1 or Q4_K."""
    return _lay_out(PACKING_OF_BLOCKS[name], *_split(stored, name))


def unpack(weights: PackedWeights) -> F32:
    """The float32 matrix [R, C] that a packed one stands for."""
    rows, cols = weights.rows, weights.cols
    if weights.packing in ("f32", "bf16"):
        width = padded_size(cols, BLOCK_COLS)
        values = weights.tiles.view(np.uint32 if weights.packing == "f32" else np.uint16)
        tiles = values.reshape(-1, width // BLOCK_COLS, BLOCK_COLS, TILE_ROWS).transpose(0, 3, 1, 2)
        whole = np.ascontiguousarray(tiles.reshape(-1, width)[:rows, :cols])
        return gguf_quants.dequantize(whole.view(np.uint8), weights.packing.upper())
    codes, scales, minima = groups_of(weights)
    y = codes.reshape(*scales.shape, GROUP).astype(np.float32) * scales[..., None]
    if minima is not None:
        y = y + minima[..., None]
    return y.reshape(codes.shape)[:rows, :cols]


def padded_size(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _pad(a: npt.NDArray[T], fill: int = 0, unit: int = BLOCK_COLS) -> npt.NDArray[T]:
    return np.pad(a, ((0, -a.shape[0] % TILE_ROWS), (0, -a.shape[1] % unit)), constant_values=fill)


def _bytes(a: npt.NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def _split(stored: Bytes, name: str) -> tuple[Bytes, npt.NDArray[np.float16], npt.NDArray[np.float16] | None]:
    """GGUF rows → stored codes uint8 [R, C] (q8 offset by 128), scales and minima float16 [R, G]."""
    rows, fmt = stored.shape[0], gguf_quants.FORMATS[name]
    blocks = np.ascontiguousarray(stored).reshape(-1, fmt.size)
    head = np.ascontiguousarray(blocks[:, :4]).view(np.float16)
    if name == "Q8_0":
        return (blocks[:, 2:] ^ np.uint8(128)).reshape(rows, -1), head[:, 0].reshape(rows, -1), None
    if name == "Q4_0":
        return gguf_quants.nibbles(blocks[:, 2:]).reshape(rows, -1), head[:, 0].reshape(rows, -1), None
    if name == "Q4_1":
        codes = gguf_quants.nibbles(blocks[:, 4:]).reshape(rows, -1)
        return codes, head[:, 0].reshape(rows, -1), head[:, 1].reshape(rows, -1)
    # Q4_K: the products of both levels of scales are rounded to the packing's float16.
    scales, minimums = gguf_quants.k_scales(blocks[:, 4:16])
    wide = head.astype(np.float32)
    scale = (wide[:, :1] * scales[..., 0]).astype(np.float16).reshape(rows, -1)
    minimum = (-wide[:, 1:] * minimums[..., 0]).astype(np.float16).reshape(rows, -1)
    return gguf_quants.k_nibbles(blocks[:, 16:]).reshape(rows, -1), scale, minimum


def _lay_out(
    packing: str, codes_RC: Bytes, scales_RG: npt.NDArray[np.float16], minima_RG: npt.NDArray[np.float16] | None
) -> PackedWeights:
    rows, cols = codes_RC.shape
    codes = _pad(codes_RC, _ZERO_CODE[packing])
    blocks = codes.shape[1] // BLOCK_COLS
    # tile, row, block, half, step of 4 columns, column → tile, block, half, step, row, column
    steps = codes.reshape(-1, TILE_ROWS, blocks, 2, 8, 4).transpose(0, 2, 3, 4, 1, 5)
    if packing != "q8":  # low nibbles are steps 0..3 of a group, high nibbles steps 4..7
        steps = steps[:, :, :, :4] | (steps[:, :, :, 4:] << 4)
    parts = [_pad(scales_RG, unit=2)] + ([] if minima_RG is None else [_pad(minima_RG, unit=2)])
    heads = [
        np.ascontiguousarray(part.reshape(-1, TILE_ROWS, blocks, 2).transpose(0, 2, 3, 1)).view(np.uint8)
        for part in parts
    ]
    shape = (steps.shape[0], blocks, -1)
    tiles = np.concatenate([part.reshape(shape) for part in (*heads, np.ascontiguousarray(steps))], axis=2)
    return PackedWeights(packing=packing, rows=rows, cols=cols, tiles=_bytes(tiles))


def groups_of(weights: PackedWeights) -> tuple[npt.NDArray[np.int16], F32, F32 | None]:
    """Codes less their offset int16 [R', C'], scales and minima float32 [R', C'/32]."""
    packing, blocks = weights.packing, padded_size(weights.cols, BLOCK_COLS) // BLOCK_COLS
    levels = 2 if packing == "q4m" else 1
    tiles = weights.tiles.reshape(-1, blocks, 64 * levels + BLOCK_COLS * TILE_ROWS // (1 if packing == "q8" else 2))
    heads = np.ascontiguousarray(tiles[:, :, : 64 * levels]).view(np.float16).astype(np.float32)
    heads = heads.reshape(-1, blocks, levels, 2, TILE_ROWS).transpose(2, 0, 4, 1, 3).reshape(levels, -1, blocks * 2)
    steps = tiles[:, :, 64 * levels :].reshape(tiles.shape[0], blocks, 2, -1, TILE_ROWS, 4)
    if packing != "q8":
        steps = np.concatenate([steps & 15, steps >> 4], axis=3)
    codes = steps.transpose(0, 4, 1, 2, 3, 5).reshape(-1, blocks * BLOCK_COLS).astype(np.int16)
    return codes - np.int16(_ZERO_CODE[packing]), heads[0], heads[1] if levels == 2 else None
