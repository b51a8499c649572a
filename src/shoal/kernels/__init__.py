"""The CPU kernels: checked arrays in, new arrays out. NumPy does the work, with one warning, where the compiled
extension is absent.

Every function computes in float32 along the last axis, accepts any leading axes and any strides, and allocates its
result unless `out` is given. Letters: T rows, D model, S scores of one query, F hidden.
The instruction set is chosen once; the setting `SHOAL_ISA` forces one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shoal.kernels import extension, reference
from shoal.kernels.arrays import apart, checked, flat, output

__all__ = ["available_isas", "rms_norm", "select_isa", "selected_isa", "silu_mul", "softmax"]

F32 = npt.NDArray[np.float32]


def available_isas() -> list[str]:
    """Instruction sets that this build holds and this machine runs, best first; `["numpy"]` without the extension."""
    native = extension.load()
    return list(native.available_isas()) if native else ["numpy"]


def selected_isa() -> str:
    """The instruction set in force."""
    native = extension.load()
    return str(native.selected_isa()) if native else "numpy"


def select_isa(name: str) -> None:
    """Put another instruction set in force, for the whole process. ConfigError if the machine or build lacks it."""
    extension.select(extension.load(), name)


def rms_norm(x: F32, weight: F32, eps: float, out: F32 | None = None) -> F32:
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis (Zhang and Sennrich 2019, §4).

    Args:
        x: [..., D]. weight: [D]. eps: added to the mean square. out: [..., D], may be `x`.
    """
    native = extension.load()
    y = output(x, out)
    weight = np.ascontiguousarray(checked("weight", weight))
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: shape {weight.shape}, expected {x.shape[-1:]}")
    if native is None:
        y[...] = reference.rms_norm(x, weight, eps)
    else:
        y_TD = flat(y)
        native.rms_norm(apart(flat(x), y_TD), apart(weight, y_TD), eps, y_TD)
    return y


def softmax(x: F32, scale: float = 1.0, out: F32 | None = None) -> F32:
    """`exp(scale·x - max) / sum` over the last axis. An entry of -inf gets exactly 0; a row of only -inf gives NaN.

    Args:
        x: [..., S]. scale: multiplies the scores first. out: [..., S], may be `x`.
    """
    native = extension.load()
    y = output(x, out)
    if native is None:
        y[...] = reference.softmax(x, scale)
    else:
        y_TS = flat(y)
        native.softmax(apart(flat(x), y_TS), scale, y_TS)
    return y


def silu_mul(gate: F32, up: F32, out: F32 | None = None) -> F32:
    """`gate / (1 + exp(-gate)) * up`, the gate of SwiGLU (Shazeer 2020). gate, up: [..., F]; `out` may be either."""
    native = extension.load()
    y = output(gate, out)
    if checked("up", up).shape != gate.shape:
        raise ValueError(f"up: shape {up.shape}, expected {gate.shape}")
    if native is None:
        y[...] = reference.silu_mul(gate, up)
    else:
        y_TF = flat(y)
        native.silu_mul(apart(flat(gate), y_TF), apart(flat(up), y_TF), y_TF)
    return y
