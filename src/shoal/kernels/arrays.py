"""Float32 arrays as the kernels take them: rows of contiguous elements, results apart from what they are made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def checked(name: str, a: object) -> F32:
    """`a` if it is a float32 array of one axis or more."""
    if not isinstance(a, np.ndarray) or a.dtype != np.float32:
        raise TypeError(f"{name}: expected a float32 array, got {getattr(a, 'dtype', type(a).__name__)}")
    if a.ndim == 0:
        raise ValueError(f"{name}: expected at least one axis")
    return a


def output(x: F32, out: F32 | None) -> F32:
    """Checks both; the result's array is `out` or a new one of x's shape."""
    checked("x", x)
    if out is None:
        return np.empty(x.shape, np.float32)
    if checked("out", out).shape != x.shape:
        raise ValueError(f"out: shape {out.shape}, expected {x.shape}")
    if not out.flags.writeable or (out.ndim > 2 and not out.flags.c_contiguous) or not rows_contiguous(out):
        raise ValueError("out: must be writeable with contiguous rows, and wholly contiguous past two axes")
    return out


def rows_contiguous(a: F32) -> bool:
    return a.size == 0 or a.shape[-1] <= 1 or a.strides[-1] == a.itemsize


def flat(a: F32) -> F32:
    """[..., D] as [T, D] with contiguous rows: a view where the strides allow it, else a copy."""
    rows = a.reshape(a.size // max(a.shape[-1], 1), a.shape[-1])
    return rows if rows_contiguous(rows) else np.ascontiguousarray(rows)


def apart(a: F32, y: F32) -> F32:
    """`a`, copied if it shares memory with `y` in any way but element upon element."""
    if not np.may_share_memory(a, y):
        return a
    same = a.shape == y.shape and a.strides == y.strides and a.ctypes.data == y.ctypes.data
    return a if same else a.copy()
