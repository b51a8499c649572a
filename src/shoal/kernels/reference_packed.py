"""The kernels that read packed weights or the cache, in NumPy: the truth that they are tested against.

`quantize_rows` and `matmul_q` are defined down to the order of float32 operations and agree with the kernels bit for
bit; `matmul_f` and `attend` are computed in double precision and rounded once.

Letters: T tokens, R rows of a matrix, C its columns, C' the same padded to 64, G groups of 32 columns; Q queries,
S cached keys, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shoal.kernels.reference_packing import BLOCK_COLS, GROUP, Bytes, PackedWeights, T, groups_of, padded_size, unpack

F32 = npt.NDArray[np.float32]

KEY_BLOCK, LANES = 64, 16
CACHE_GROUP = 64  # cached int8 values that share a scale
MASKED = -1e30
SMALLEST_GROUP = np.float32(1e-36)  # quantize_rows takes groups of smaller values for zeros


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantRows:
    """Rows [rows, cols] as int8 groups, `lanes` of them interleaved.

    codes int8 [⌈rows/lanes⌉, C'/4, lanes, 4]; scales float32 and sums int32 [⌈rows/lanes⌉, C'/32, lanes]; rest float32
    [rows, cols] is what scale · code leaves of the row.
    """

    rows: int
    cols: int
    codes: npt.NDArray[np.int8]
    scales: F32
    sums: npt.NDArray[np.int32]
    rest: F32

    def plain(self) -> tuple[npt.NDArray[np.int8], F32, npt.NDArray[np.int32]]:
        """codes [rows, C'], scales and sums [rows, C'/32], no longer interleaved."""
        blocks, steps, lanes, _ = self.codes.shape
        codes = self.codes.transpose(0, 2, 1, 3).reshape(blocks * lanes, steps * 4)
        scales, sums = (a.swapaxes(1, 2).reshape(blocks * lanes, a.shape[1]) for a in (self.scales, self.sums))
        return codes[: self.rows], scales[: self.rows], sums[: self.rows]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttendState:
    """A running softmax: largest score and sum of weights [Q], weighted values [Q, V]."""

    top: F32
    total: F32
    out: F32

    @classmethod
    def empty(cls, queries: int, value_width: int) -> AttendState:
        top = np.full(queries, MASKED, np.float32)
        return cls(top=top, total=np.zeros_like(top), out=np.zeros((queries, value_width), np.float32))

    def result(self) -> F32:
        """softmax(scores) · values, [Q, V]."""
        y: F32 = self.out / self.total[:, None]
        return y


def quantize_rows(x_TC: F32, lanes: int = 1) -> QuantRows:
    """Groups of 32: scale = largest magnitude / 127, code = x · (127 / largest) rounded to nearest even. A group with a
    value that is not finite gets a scale of NaN and, like one of values below 1e-36, codes of 0."""
    rows, cols = x_TC.shape
    padded = np.zeros((padded_size(rows, lanes), padded_size(cols, BLOCK_COLS)), np.float32)
    padded[:rows, :cols] = x_TC
    x = padded.reshape(padded.shape[0], padded.shape[1] // GROUP, GROUP)
    largest = np.where(np.isfinite(x).all(axis=-1), np.abs(x).max(axis=-1, initial=0), np.float32(np.nan))
    with np.errstate(all="ignore"):
        inverse = np.where(largest >= SMALLEST_GROUP, np.float32(127) / largest, np.float32(0))
        codes = np.where(inverse[..., None] > 0, np.rint(x * inverse[..., None]), 0).astype(np.int8)
        scales = largest / np.float32(127)
        rest = x - np.nan_to_num(scales, nan=0)[..., None] * codes.astype(np.float32)
    sums = codes.sum(axis=-1, dtype=np.int32)

    return QuantRows(
        rows=rows,
        cols=cols,
        codes=_interleave(codes.reshape(padded.shape[0], padded.shape[1] // 4, 4), lanes),
        scales=_interleave(scales, lanes),
        sums=_interleave(sums, lanes),
        rest=rest.reshape(padded.shape)[:rows, :cols],
    )


def matmul_q(weights: PackedWeights, x: QuantRows, onto: F32 | None = None, fused: bool = True) -> F32:
    """x Wᵀ [T, R], or `onto` + x Wᵀ. Group by group in the order of columns, in float32:

    y = fma(whole-number sum of products, scale · x.scale, y), then for q4m y = fma(minimum, x.scale · x.sum, y).

    Args:
        fused: round product and sum once, as every instruction set but `scalar` does.
    """
    codes, scales, minima = groups_of(weights)
    x_codes, x_scales, x_sums = x.plain()
    multiply_add = fused_multiply_add if fused else _multiply_then_add
    y = np.zeros((x.rows, codes.shape[0]), np.float32)
    for g in range(scales.shape[1]):
        group = slice(g * GROUP, (g + 1) * GROUP)
        whole = x_codes[:, group].astype(np.float64) @ codes[:, group].T.astype(np.float64)  # exact: below 2^20
        y = multiply_add(whole.astype(np.float32), scales[:, g] * x_scales[:, g, None], y)
        if minima is not None:
            y = multiply_add(minima[None, :, g], (x_scales[:, g] * x_sums[:, g].astype(np.float32))[:, None], y)
    y = y[:, : weights.rows]
    return y if onto is None else onto + y


def matmul_f(weights: PackedWeights, x_TC: F32, onto: F32 | None = None) -> F32:
    """x Wᵀ [T, R] for weights in f32 or bf16, or `onto` + x Wᵀ."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinities come and go as in the kernel
        y = x_TC.astype(np.float64) @ unpack(weights).T.astype(np.float64)
        rounded: F32 = (y if onto is None else y + onto).astype(np.float32)
    return rounded


def lora_shrink(x_TC: F32, a_RC: npt.NDArray[ml_dtypes.bfloat16], scale: float) -> F32:
    """scale · x Aᵀ [T, R] for the R directions of a low-rank adapter."""
    y: F32 = (scale * (x_TC.astype(np.float64) @ a_RC.astype(np.float64).T)).astype(np.float32)
    return y


def lora_expand(low_TR: F32, b_RO: npt.NDArray[ml_dtypes.bfloat16], onto: F32) -> F32:
    """onto + low Bᵀ [T, O]; b is B transposed."""
    y: F32 = (onto + low_TR.astype(np.float64) @ b_RO.astype(np.float64)).astype(np.float32)
    return y


def narrow_rows(x_TC: F32, scale: float) -> npt.NDArray[ml_dtypes.bfloat16]:
    """scale · x, a product in float32 rounded once more to bfloat16, ties to even."""
    y: npt.NDArray[ml_dtypes.bfloat16] = (x_TC * np.float32(scale)).astype(ml_dtypes.bfloat16)
    return y


def widen_rows(stored_SB: Bytes, width: int) -> npt.NDArray[ml_dtypes.bfloat16]:
    """Cached int8 rows to bfloat16 [S, width]: a row is `width` codes, padded to 4 bytes, and a float32 scale for every
    64 of them. Each value is code · scale in float32, rounded once more."""
    codes = stored_SB[:, :width].view(np.int8).astype(np.float32)
    scales = np.ascontiguousarray(stored_SB[:, padded_size(width, 4) :]).view(np.float32)
    y: npt.NDArray[ml_dtypes.bfloat16] = codes * np.repeat(scales, CACHE_GROUP, axis=1)[:, :width]
    return y.astype(ml_dtypes.bfloat16)


def attend(
    queries_QK: npt.NDArray[np.generic],
    keys_SK: npt.NDArray[np.generic],
    values_SV: npt.NDArray[np.generic],
    last_key_Q: npt.NDArray[np.int32],
    first_key: int = 0,
    state: AttendState | None = None,
) -> AttendState:
    """Folds keys into a running softmax, 64 at a time (Milakov and Gimelshein 2018, arXiv 1805.02867).

    Key i stands at position first_key + i; a query sees positions up to its last_key. Queries are scaled already. With
    a bfloat16 cache the weights are rounded to bfloat16 where they meet the values, but not in their sum.
    """
    if state is None:
        state = AttendState.empty(queries_QK.shape[0], values_SV.shape[1])
    top, total, out = (a.astype(np.float64) for a in (state.top, state.total, state.out))
    for start in range(0, keys_SK.shape[0], KEY_BLOCK):
        keys, values = (a[start : start + KEY_BLOCK].astype(np.float64) for a in (keys_SK, values_SV))
        position_S = first_key + start + np.arange(keys.shape[0])
        scores_QS = queries_QK.astype(np.float64) @ keys.T
        scores_QS[position_S > last_key_Q[:, None]] = MASKED
        new_top = np.maximum(top, scores_QS.max(axis=1))
        weights_QS = np.exp(scores_QS - new_top[:, None])
        shrink = np.exp(top - new_top)
        total = total * shrink + weights_QS.sum(axis=1)
        if keys_SK.dtype == ml_dtypes.bfloat16:
            weights_QS = weights_QS.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
        out = out * shrink[:, None] + weights_QS @ values
        top = new_top
    return AttendState(top=top.astype(np.float32), total=total.astype(np.float32), out=out.astype(np.float32))


def fused_multiply_add(a: F32, b: F32, c: F32) -> F32:
    """a · b + c in float32, rounded once.

    The product is exact in double precision. The sum is rounded to odd there, so that rounding it again to float32
    gives what a single rounding would (Boldo and Melquiond 2008, IEEE Trans. Comput. 57(4)).
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    back = total - product
    with np.errstate(invalid="ignore"):
        error = (product - (total - back)) + (c - back)  # what the sum lost, exactly (Knuth's two-sum)
    bits = total.view(np.int64)
    inexact_and_even = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    outward = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where(inexact_and_even, bits + outward, bits).view(np.float64)
    rounded: F32 = odd.astype(np.float32)
    return rounded


def _multiply_then_add(a: F32, b: F32, c: F32) -> F32:
    y: F32 = a * b + c
    return y


def _interleave(a: npt.NDArray[T], lanes: int) -> npt.NDArray[T]:
    """[T', n, …] → [T'/lanes, n, lanes, …]."""
    return np.ascontiguousarray(a.reshape(a.shape[0] // lanes, lanes, *a.shape[1:]).swapaxes(1, 2))
