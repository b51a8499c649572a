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
from shoal.kernels.reference_packed import KEY_BLOCK, LANES, AttendState, QuantRows
from shoal.kernels.reference_packing import PACKINGS, PackedWeights

__all__ = ["AttendState", "PackedWeights", "QuantRows", "attend", "matmul_f", "matmul_q", "quantize_rows"]

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
    queries = np.zeros((LANES, width), queries_QK.dtype)
    queries[:num_queries] = queries_QK
    if bf16:  # pairs of columns side by side: [K / 2, 16, 2]
        pairs = queries.view(np.uint16).reshape(LANES, -1, 2).transpose(1, 0, 2)
        args = [np.ascontiguousarray(pairs).reshape(-1, 2 * LANES), keys_SK.view(np.uint16), values_SV.view(np.uint16)]
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
