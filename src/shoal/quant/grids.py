"""Float matrices onto integer grids: codes, and one scale (and zero point) for each group of neighbouring columns.

    weight ≈ scale · (code - zero)

For every group a handful of scales is tried. Each trial rounds the weights to it, then takes the least-squares scale of
those codes; the trial of least error wins. The error of a column is weighted by the mean square of what the column is
multiplied with, so that columns that meet large activations are kept most exactly (the idea of AWQ, arXiv 2306.00978,
and of llama.cpp's importance matrix). Finally the scale is rounded to a number that float16 and bfloat16 both hold
exactly, and the codes are rounded once more to that.

Letters: R rows, C columns, G groups of a row, K columns of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]

_BLOCK_VALUES = 1 << 16  # weights worked on at a time, so that intermediate arrays stay in the cache
# Trial scales: the largest weight of a group is put on these levels (in units of half the grid), beyond the end too.
_SYMMETRIC_TRIALS = {4: np.linspace(0.7, 1.3, 19), 8: np.array([0.98, 0.992, 1.0, 1.004])}
_ASYMMETRIC_TRIALS = np.linspace(0.76, 1.04, 8)  # of the group's range
MAX_SCALE = 65280.0  # the largest number of 8 significant bits in float16
_SMALLEST = 2.0**-24  # float16's smallest step
_FLOOR = 1e-3  # importance of a column that met nothing, against a mean of 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`bits` of 4 or 8; `group` columns share a scale. A symmetric grid has no zero points."""

    bits: int
    group: int
    symmetric: bool = True

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def scale_bits(self) -> int:
        """Significant bits of a scale: bfloat16 has 8; times a zero point of 4 bits, 7 still fit float16's 11."""
        return 8 if self.symmetric else 7


@dataclass(frozen=True)
class Quantised:
    """codes int8 [R, C], scales float32 [R, G], zeros int8 [R, G] or None where all are zero."""

    codes: Codes
    scales: Floats
    zeros: Codes | None

    def dequantise(self) -> Floats:
        """The weights that these codes stand for, float32 [R, C], exactly."""
        rows, groups = self.scales.shape
        values = self.codes.reshape(rows, groups, -1).astype(np.float32)
        if self.zeros is not None:
            values -= self.zeros[:, :, None]
        return (values * self.scales[:, :, None]).reshape(self.codes.shape)


def exact_scale(scales: Floats, bits: int) -> Floats:
    """Round to `bits` significant bits within float16's range, so that float16 and bfloat16 hold it exactly."""
    mantissa, exponent = np.frexp(scales)
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    tiny = np.abs(scales) < _SMALLEST * (1 << bits)
    return np.asarray(np.where(tiny, np.rint(scales / _SMALLEST) * _SMALLEST, rounded), np.float32)


def quantise(
    weights_RC: Floats, grid: Grid, importance_C: Floats | None = None, *, search: bool = True, threads: int = 1
) -> Quantised:
    """Round a matrix to a grid.

    Args:
        weights_RC: finite float32; C is a multiple of the group.
        importance_C: weight of each column's squared error; all equal if None.
        search: False is plain rounding to nearest: the largest weight of each group on the last level.
        threads: how many blocks of rows are worked on at once; the result does not depend on it.
    """
    rows, cols = weights_RC.shape
    groups = cols // grid.group
    assert groups * grid.group == cols, "the group must divide the columns"
    importance_GK = np.ones((groups, grid.group), np.float32)
    if importance_C is not None:
        importance_GK = _normalised(importance_C.reshape(groups, grid.group))
    codes = np.empty((rows, groups, grid.group), np.int8)
    scales = np.empty((rows, groups), np.float32)
    zeros = None if grid.symmetric else np.empty((rows, groups), np.int8)
    step = max(1, _BLOCK_VALUES // max(cols, 1))

    def work(start: int) -> None:
        block_RGK = np.ascontiguousarray(weights_RC[start : start + step], np.float32).reshape(-1, groups, grid.group)
        zero_RG = None
        if zeros is None:
            scale_RG = _symmetric_scale(block_RGK, importance_GK, grid, search)
        else:
            scale_RG, zero_RG = _asymmetric_scale(block_RGK, importance_GK, grid, search)
            zeros[start : start + step] = zero_RG
        scale_RG = exact_scale(scale_RG, grid.scale_bits)
        scales[start : start + step] = scale_RG
        codes[start : start + step] = _round(block_RGK, scale_RG, zero_RG, grid)

    starts = range(0, rows, step)
    if threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts))
    else:
        for start in starts:
            work(start)
    return Quantised(codes.reshape(rows, cols), scales, zeros)


def _normalised(importance_GK: Floats) -> Floats:
    """Scaled to a mean of one within each group, with a floor: a column that the text left out may matter elsewhere."""
    mean_G = importance_GK.mean(axis=1, keepdims=True)
    shares_GK = np.divide(importance_GK, mean_G, out=np.ones_like(importance_GK), where=mean_G > 0)
    return np.asarray(shares_GK + _FLOOR, np.float32)


def _round(block_RGK: Floats, scale_RG: Floats, zero_RG: Codes | None, grid: Grid) -> Floats:
    """Codes (as floats) of the nearest levels."""
    inverse_RG = np.divide(1, scale_RG, out=np.zeros_like(scale_RG), where=scale_RG != 0)
    codes_RGK = block_RGK * inverse_RG[:, :, None]
    np.rint(codes_RGK, out=codes_RGK)
    if zero_RG is not None:
        codes_RGK += zero_RG[:, :, None]
    return np.clip(codes_RGK, grid.low, grid.high, out=codes_RGK)


def _symmetric_scale(block_RGK: Floats, importance_GK: Floats, grid: Grid, search: bool) -> Floats:
    if not search:
        return np.asarray(np.abs(block_RGK).max(axis=2) / np.float32(grid.high), np.float32)
    # The grid reaches one level further down than up: the scale takes the sign that puts the peak there.
    at = np.abs(block_RGK).argmax(axis=2)
    peak_RG = np.take_along_axis(block_RGK, at[:, :, None], axis=2)[:, :, 0]
    weighted_RGK = block_RGK * importance_GK
    best_RG, gain_RG = np.zeros_like(peak_RG), np.full_like(peak_RG, -1)
    for trial in _trials(peak_RG, grid):
        codes_RGK = _round(block_RGK, trial, None, grid)
        _keep_better(weighted_RGK, importance_GK, codes_RGK, best_RG, gain_RG)
    return best_RG


def _trials(peak_RG: Floats, grid: Grid) -> Iterator[Floats]:
    for share in _SYMMETRIC_TRIALS[grid.bits]:
        yield np.asarray(peak_RG / np.float32(grid.low * share), np.float32)


def _keep_better(
    weighted_RGK: Floats, importance_GK: Floats, levels_RGK: Floats, best_RG: Floats, gain_RG: Floats
) -> NDArray[np.bool_]:
    """Least-squares scale of the levels: Σhwq / Σhq², which takes (Σhwq)² / Σhq² off the error. Update where better."""
    hits_RG = np.einsum("rgk,rgk->rg", weighted_RGK, levels_RGK)
    norm_RG = np.einsum("rgk,rgk,gk->rg", levels_RGK, levels_RGK, importance_GK)
    scale_RG = np.divide(hits_RG, norm_RG, out=np.zeros_like(hits_RG), where=norm_RG > 0)
    better: NDArray[np.bool_] = np.asarray(hits_RG * scale_RG > gain_RG)
    np.copyto(best_RG, scale_RG, where=better)
    np.copyto(gain_RG, hits_RG * scale_RG, where=better)
    return better


def _asymmetric_scale(
    block_RGK: Floats, importance_GK: Floats, grid: Grid, search: bool
) -> tuple[Floats, NDArray[np.int8]]:
    low_RG, high_RG = np.minimum(block_RGK.min(axis=2), 0), np.maximum(block_RGK.max(axis=2), 0)
    weighted_RGK = block_RGK * importance_GK
    best_RG, gain_RG = np.zeros_like(low_RG), np.full_like(low_RG, -1)
    zero_RG = np.zeros_like(low_RG)
    for share in _ASYMMETRIC_TRIALS if search else np.ones(1):
        trial = (high_RG - low_RG) * np.float32(share / (grid.high - grid.low))
        middle = np.divide(low_RG * np.float32(share), trial, out=np.zeros_like(trial), where=trial > 0)
        for nudge in (-1, 0, 1) if search else (0,):
            zeros = np.clip(np.rint(grid.low - middle) + nudge, grid.low, grid.high)
            codes_RGK = _round(block_RGK, trial, zeros.astype(np.int8), grid)
            if not search:
                return trial, zeros.astype(np.int8)
            codes_RGK -= zeros[:, :, None]
            better = _keep_better(weighted_RGK, importance_GK, codes_RGK, best_RG, gain_RG)
            np.copyto(zero_RG, zeros, where=better)
    return best_RG, zero_RG.astype(np.int8)
