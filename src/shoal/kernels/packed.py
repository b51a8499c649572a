"""The kernels of packed weights, one checked call each: for tests, measurements and odd jobs. The executor calls them
from C++ without passing here.

Letters as in `reference_packed`, which computes where the compiled extension is absent.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shoal.kernels import extension
from shoal.kernels import reference_packed as reference
from shoal.kernels.arrays import checked, flat, rows_contiguous
from shoal.kernels.reference_packed import CACHE_GROUP, KEY_BLOCK, LANES, AttendState, QuantRows
from shoal.kernels.reference_packing import PACKINGS, PackedWeights, padded_size

__all__ = [
    "AttendState", "PackedWeights", "QuantRows", "attend", "lora_expand", "lora_shrink", "matmul_f", "matmul_q",
    "narrow_rows", "quantize_rows", "widen_rows",
]  # fmt: skip

F32 = npt.NDArray[np.float32]


def quantize_rows(x_TC: F32, lanes: int = 1) -> QuantRows:
    """int8 groups of 32 columns with a scale and a sum each, `lanes` (1 or 4) rows interleaved.

    Raises:
        TypeError: x is no float32 array. ValueError: x is no matrix, or lanes is neither 1 nor 4.
    """
    _matrix("x", x_TC)
    if lanes not in (1, 4):
        raise ValueError(f"lanes: {lanes}, expected 1 or 4")
    native = extension.load()
    if native is None:
        return reference.quantize_rows(x_TC, lanes)
    rows, cols = x_TC.shape
    blocks, groups = -(-rows // lanes), -(-cols // 64) * 2
    out = QuantRows(
        rows=rows,
        cols=cols,
        codes=np.empty((blocks, groups * 8, lanes, 4), np.int8),
        scales=np.empty((blocks, groups, lanes), np.float32),
        sums=np.empty((blocks, groups, lanes), np.int32),
        rest=np.empty((rows, cols), np.float32),
    )
    native.quantize_rows(flat(x_TC), out.codes, out.scales, out.sums, out.rest)
    return out


def matmul_q(weights: PackedWeights, x: QuantRows, onto: F32 | None = None) -> F32:
    """x Wᵀ [T, R] for W in q8, q4 or q4m; with `onto` [T, R] the product is added to it, in place.

    Raises:
        ValueError: sizes that do not agree, or a packing of `matmul_f`.
    """
    if x.cols != weights.cols:
        raise ValueError(f"x: {x.cols} columns, expected {weights.cols}")
    y = _output(onto, (x.rows, weights.rows))
    native = extension.load()
    if native is None:
        y[...] = reference.matmul_q(weights, x, onto)
    else:
        packing = PACKINGS.index(weights.packing)
        native.matmul_q(packing, weights.tiles, weights.cols, x.codes, x.scales, x.sums, y, onto is not None)
    return y


def matmul_f(weights: PackedWeights, x_TC: F32, onto: F32 | None = None) -> F32:
    """x Wᵀ [T, R] for W in f32 or bf16; with `onto` [T, R] the product is added to it, in place.

    Raises:
        ValueError: sizes that do not agree, or a packing of `matmul_q`.
    """
    _matrix("x", x_TC)
    if x_TC.shape[1] != weights.cols:
        raise ValueError(f"x: {x_TC.shape[1]} columns, expected {weights.cols}")
    y = _output(onto, (x_TC.shape[0], weights.rows))
    native = extension.load()
    if native is None:
        y[...] = reference.matmul_f(weights, x_TC, onto)
    else:
        rows = x_TC.copy() if np.may_share_memory(x_TC, y) else flat(x_TC)
        native.matmul_f(PACKINGS.index(weights.packing), weights.tiles, rows, y, onto is not None)
    return y


BF16 = npt.NDArray[ml_dtypes.bfloat16]


def lora_shrink(x_TC: F32, a_RC: BF16, scale: float) -> F32:
    """scale · x Aᵀ [T, R], the first half of what a low-rank adapter adds (arXiv 2106.09685).

    Raises:
        ValueError: sizes that do not agree.
    """
    _matrix("x", x_TC)
    if a_RC.shape != (a_RC.shape[0], x_TC.shape[1]):
        raise ValueError(f"a: shape {a_RC.shape}, expected {x_TC.shape[1]} columns")
    native = extension.load()
    if native is None:
        return reference.lora_shrink(x_TC, a_RC, scale)
    low = np.empty((x_TC.shape[0], a_RC.shape[0]), np.float32)
    native.lora_shrink(flat(x_TC), np.ascontiguousarray(a_RC).view(np.uint16), scale, low)
    return low


def lora_expand(low_TR: F32, b_RO: BF16, onto: F32) -> F32:
    """low Bᵀ added to `onto` [T, O], in place; b is B transposed. The second half.

    Raises:
        ValueError: sizes that do not agree.
    """
    _matrix("low", low_TR)
    y = _output(onto, (low_TR.shape[0], b_RO.shape[1]))
    if b_RO.shape[0] != low_TR.shape[1]:
        raise ValueError(f"b: {b_RO.shape[0]} rows, expected {low_TR.shape[1]}")
    native = extension.load()
    if native is None:
        y[...] = reference.lora_expand(low_TR, b_RO, onto)
    else:
        native.lora_expand(np.ascontiguousarray(low_TR), b_RO.view(np.uint16), y)
    return y


def narrow_rows(x_TC: F32, scale: float = 1.0) -> npt.NDArray[ml_dtypes.bfloat16]:
    """scale · x in bfloat16.

    Raises:
        TypeError: x is no float32 array. ValueError: x is no matrix.
    """
    _matrix("x", x_TC)
    native = extension.load()
    if native is None:
        return reference.narrow_rows(x_TC, scale)
    y = np.empty(x_TC.shape, ml_dtypes.bfloat16)
    native.narrow_rows(x_TC if rows_contiguous(x_TC) else np.ascontiguousarray(x_TC), scale, y.view(np.uint16))
    return y


def widen_rows(stored_SB: npt.NDArray[np.uint8], width: int) -> npt.NDArray[ml_dtypes.bfloat16]:
    """Cached int8 rows [S, bytes] to bfloat16 [S, width]; a row is `width` codes, padded to 4 bytes, then a float32
    scale for every 64 of them.

    Raises:
        ValueError: rows of another size.
    """
    row_bytes = padded_size(width, 4) + 4 * (padded_size(width, CACHE_GROUP) // CACHE_GROUP)
    if stored_SB.dtype != np.uint8 or stored_SB.ndim != 2 or stored_SB.shape[1] != row_bytes:
        raise ValueError(f"stored: {stored_SB.dtype} {stored_SB.shape}, expected uint8 rows of {row_bytes} bytes")
    native = extension.load()
    if native is None:
        return reference.widen_rows(stored_SB, width)
    y = np.empty((stored_SB.shape[0], width), ml_dtypes.bfloat16)
    native.widen_rows(np.ascontiguousarray(stored_SB), padded_size(width, 4), y.view(np.uint16))
    return y


def attend(
    queries_QK: npt.NDArray[np.generic],
    keys_SK: npt.NDArray[np.generic],
    values_SV: npt.NDArray[np.generic],
    last_key_Q: npt.NDArray[np.int32],
    first_key: int = 0,
    state: AttendState | None = None,
) -> AttendState:
    """Folds keys and values into a running softmax of at most 16 queries, a native call for every 64 keys.

    Args:
        queries_QK, keys_SK, values_SV: all float32 or all bfloat16; the queries are scaled already.
        last_key_Q: the last position that each query sees; key i stands at first_key + i.
        state: where to go on from; it stays as it was.

    Raises:
        TypeError: mixed or other element types. ValueError: sizes that do not agree, over 16 queries, or bfloat16 keys
            of an odd width.
    """
    if queries_QK.dtype not in (np.float32, ml_dtypes.bfloat16) or not (
        queries_QK.dtype == keys_SK.dtype == values_SV.dtype
    ):
        raise TypeError("queries, keys and values: expected three float32 or three bfloat16 arrays")
    num_queries, width = queries_QK.shape
    if num_queries > LANES or last_key_Q.shape != (num_queries,):
        raise ValueError(f"queries: {num_queries} with {last_key_Q.size} last keys, expected at most {LANES} pairs")
    native = extension.load()
    if native is None:
        return reference.attend(queries_QK, keys_SK, values_SV, last_key_Q, first_key, state)
    if state is None:
        state = AttendState.empty(num_queries, values_SV.shape[1])
    top, total = (np.zeros(LANES, np.float32) for _ in range(2))
    top[:num_queries], total[:num_queries], out = state.top, state.total, state.out.copy()
    last_key = np.full(LANES, -1, np.int32)
    last_key[:num_queries] = last_key_Q
    bf16 = queries_QK.dtype == ml_dtypes.bfloat16
    if bf16 and width % 2:
        raise ValueError(f"keys: {width} columns, expected an even number with bfloat16")
    lanes = 8 if bf16 and num_queries <= 8 and width % 4 == 0 else LANES  # as query_lanes in ops.h
    queries = np.zeros((lanes, width), queries_QK.dtype)
    queries[:num_queries] = queries_QK
    if bf16:  # columns side by side: [K / 2, 16, 2] or [K / 4, 8, 4]
        beside = queries.view(np.uint16).reshape(lanes, -1, 32 // lanes).transpose(1, 0, 2)
        args = [np.ascontiguousarray(beside).reshape(-1, 32), keys_SK.view(np.uint16), values_SV.view(np.uint16)]
    else:
        args = [np.ascontiguousarray(queries.T), keys_SK, values_SV]
    fold = native.attend_bf16 if bf16 else native.attend_f32
    for start in range(0, keys_SK.shape[0], KEY_BLOCK):
        keys, values = (a[start : start + KEY_BLOCK] for a in args[1:])
        fold(args[0], keys, values, last_key, first_key + start, top, total, out)
    return AttendState(top=top[:num_queries], total=total[:num_queries], out=out)


def _matrix(name: str, a: F32) -> None:
    if checked(name, a).ndim != 2:
        raise ValueError(f"{name}: {a.ndim} axes, expected 2")


def _output(onto: F32 | None, shape: tuple[int, int]) -> F32:
    if onto is None:
        return np.empty(shape, np.float32)
    if checked("onto", onto).shape != shape:
        raise ValueError(f"onto: shape {onto.shape}, expected {shape}")
    if not onto.flags.writeable or not rows_contiguous(onto):
        raise ValueError("onto: must be writeable with contiguous rows")
    return onto
