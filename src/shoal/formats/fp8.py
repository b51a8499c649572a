"""FP8 E4M3 weights with one scale per block, as DeepSeek-V3 publishes them (arXiv 2412.19437 §3.3).

The scale is called `weight_scale_inv` but one multiplies by it: weight = fp8 × scale, the scale repeated over its block
(128 × 128 unless `quantization_config.weight_block_size` says otherwise; the last block of an axis may be partial).
Scales are float32 or, from V3.1 on, powers of two (`ue8m0`), stored as float32 or as one exponent byte (F8_E8M0).

Shape letters: O output rows, I input columns, P and Q blocks along them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.errors import FileError
from shoal.formats.safetensors import Array

SCALE_SUFFIX = "_scale_inv"
BLOCK = (128, 128)
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
BAND_BYTES = 1 << 26  # float32 bytes given out at a time


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """[P, Q] of a weight [O, I]: the number of blocks along each axis, partial ones included."""
    rows, cols = shape
    return -(-rows // block[0]), -(-cols // block[1])


def check_scale(
    path: Path, name: str, shape: tuple[int, ...], scale: tuple[str, tuple[int, ...]], block: tuple[int, int]
) -> None:
    """Raise FileError unless `scale` (its dtype and shape) fits the weight `name` of `shape`."""
    dtype, got = scale
    if len(shape) != 2:
        raise FileError(path, f"is FP8 with shape {list(shape)}; only matrices are block-scaled", item=name)
    if dtype not in SCALE_DTYPES:
        raise FileError(
            path, f"has dtype {dtype}; a scale is one of {', '.join(SCALE_DTYPES)}", item=name + SCALE_SUFFIX
        )
    expected = scale_shape(shape, block)
    if got != expected:
        raise FileError(
            path,
            f"has shape {list(got)}; a weight of {list(shape)} in blocks of {list(block)} needs {list(expected)}",
            item=name + SCALE_SUFFIX,
        )


def dequantise(weight_OI: Array, scale_PQ: Array, block: tuple[int, int] = BLOCK) -> NDArray[np.float32]:
    """fp8 [O, I] × scale [P, Q] → float32 [O, I]."""
    rows, cols = weight_OI.shape
    out_OI = weight_OI.astype(np.float32)
    wide_PI = np.repeat(scale_PQ.astype(np.float32), block[1], axis=1)[:, :cols]
    for index, scale_I in enumerate(wide_PI):
        out_OI[index * block[0] : min(rows, (index + 1) * block[0])] *= scale_I
    return out_OI


def dequantise_bands(
    weight_OI: Array, scale_PQ: Array, block: tuple[int, int] = BLOCK, limit: int = BAND_BYTES
) -> Iterator[NDArray[np.float32]]:
    """The same, some whole block rows at a time, so that a large matrix never stands in memory as float32."""
    rows, cols = weight_OI.shape
    blocks = max(1, limit // max(1, 4 * cols * block[0]))
    step = blocks * block[0]
    for start in range(0, rows, step):
        first = start // block[0]
        yield dequantise(weight_OI[start : start + step], scale_PQ[first : first + blocks], block)
