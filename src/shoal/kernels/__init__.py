"""The CPU kernels: checked arrays in, new arrays out. NumPy does the work, with one warning, where the compiled
extension is absent.

Every function computes in float32 along the last axis, accepts any leading axes and any strides, and allocates its
result unless `out` is given. Letters: T rows, D model, S scores of one query, F hidden.
The instruction set is chosen once; the setting `SHOAL_ISA` forces one.
"""

from __future__ import annotations

import functools
import importlib
import types
import warnings

import numpy as np
import numpy.typing as npt

from shoal import settings
from shoal.errors import ConfigError
from shoal.kernels import reference

__all__ = ["available_isas", "rms_norm", "select_isa", "selected_isa", "silu_mul", "softmax"]

F32 = npt.NDArray[np.float32]


def available_isas() -> list[str]:
    """Instruction sets that this build holds and this machine runs, best first; `["numpy"]` without the extension."""
    native = _extension()
    return list(native.available_isas()) if native else ["numpy"]


def selected_isa() -> str:
    """The instruction set in force."""
    native = _extension()
    return str(native.selected_isa()) if native else "numpy"


def select_isa(name: str) -> None:
    """Put another instruction set in force, for the whole process. ConfigError if the machine or build lacks it."""
    _select(_extension(), name)


def rms_norm(x: F32, weight: F32, eps: float, out: F32 | None = None) -> F32:
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis (Zhang and Sennrich 2019, §4).

    Args:
        x: [..., D]. weight: [D]. eps: added to the mean square. out: [..., D], may be `x`.
    """
    native = _extension()
    y = _output(x, out)
    weight = np.ascontiguousarray(_checked("weight", weight))
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: shape {weight.shape}, expected {x.shape[-1:]}")
    if native is None:
        y[...] = reference.rms_norm(x, weight, eps)
    else:
        y_TD = _flat(y)
        native.rms_norm(_apart(_flat(x), y_TD), _apart(weight, y_TD), eps, y_TD)
    return y


def softmax(x: F32, scale: float = 1.0, out: F32 | None = None) -> F32:
    """`exp(scale·x - max) / sum` over the last axis. An entry of -inf gets exactly 0; a row of only -inf gives NaN.

    Args:
        x: [..., S]. scale: multiplies the scores first. out: [..., S], may be `x`.
    """
    native = _extension()
    y = _output(x, out)
    if native is None:
        y[...] = reference.softmax(x, scale)
    else:
        y_TS = _flat(y)
        native.softmax(_apart(_flat(x), y_TS), scale, y_TS)
    return y


def silu_mul(gate: F32, up: F32, out: F32 | None = None) -> F32:
    """`gate / (1 + exp(-gate)) * up`, the gate of SwiGLU (Shazeer 2020). gate, up: [..., F]; `out` may be either."""
    native = _extension()
    y = _output(gate, out)
    if _checked("up", up).shape != gate.shape:
        raise ValueError(f"up: shape {up.shape}, expected {gate.shape}")
    if native is None:
        y[...] = reference.silu_mul(gate, up)
    else:
        y_TF = _flat(y)
        native.silu_mul(_apart(_flat(gate), y_TF), _apart(_flat(up), y_TF), y_TF)
    return y


@functools.cache
def _extension() -> types.ModuleType | None:
    """The compiled module with the setting applied, or None after one warning."""
    try:
        native: types.ModuleType | None = importlib.import_module("shoal.kernels._native")
    except ModuleNotFoundError as error:
        if error.name != "shoal.kernels._native":
            raise
        native = None
        warnings.warn("the CPU kernels are not compiled; NumPy stands in, slowly", RuntimeWarning, stacklevel=3)
    wanted = settings.isa()
    if wanted is not None:
        _select(native, wanted)
    return native


def _select(native: types.ModuleType | None, name: str) -> None:
    names = native.available_isas() if native else ["numpy"]
    if name not in names:
        raise ConfigError("SHOAL_ISA", f"{name!r} is not available here; choose from {', '.join(names)}")
    if native:
        native.select_isa(name)


def _checked(name: str, a: object) -> F32:
    if not isinstance(a, np.ndarray) or a.dtype != np.float32:
        raise TypeError(f"{name}: expected a float32 array, got {getattr(a, 'dtype', type(a).__name__)}")
    if a.ndim == 0:
        raise ValueError(f"{name}: expected at least one axis")
    return a


def _output(x: F32, out: F32 | None) -> F32:
    """Checks both; the result's array is `out` or a new one of x's shape."""
    _checked("x", x)
    if out is None:
        return np.empty(x.shape, np.float32)
    if _checked("out", out).shape != x.shape:
        raise ValueError(f"out: shape {out.shape}, expected {x.shape}")
    if not out.flags.writeable or (out.ndim > 2 and not out.flags.c_contiguous) or not _rows_contiguous(out):
        raise ValueError("out: must be writeable with contiguous rows, and wholly contiguous past two axes")
    return out


def _rows_contiguous(a: F32) -> bool:
    return a.shape[-1] <= 1 or a.strides[-1] == a.itemsize


def _flat(a: F32) -> F32:
    """[..., D] as [T, D] with contiguous rows: a view where the strides allow it, else a copy."""
    rows = a.reshape(a.size // max(a.shape[-1], 1), a.shape[-1])
    return rows if _rows_contiguous(rows) else np.ascontiguousarray(rows)


def _apart(a: F32, y: F32) -> F32:
    """`a`, copied if it shares memory with `y` in any way but element upon element."""
    if not np.may_share_memory(a, y):
        return a
    same = a.shape == y.shape and a.strides == y.strides and a.ctypes.data == y.ctypes.data
    return a if same else a.copy()
