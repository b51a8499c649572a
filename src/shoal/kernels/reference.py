"""What each CPU kernel computes, in NumPy and double precision: the truth that the kernels are tested against, and what
runs where the compiled extension is absent. Results are rounded to float32 once, at the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x [..., D], weight [D] → [..., D]."""
    wide = x.astype(np.float64)
    scale = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps)
    y: F32 = (wide * scale * weight).astype(np.float32)
    return y


def softmax(x: F32, scale: float = 1.0) -> F32:
    """x [..., S] → [..., S], each row summing to 1."""
    wide = x.astype(np.float64) * scale
    with np.errstate(invalid="ignore"):  # a row of only -inf is NaN, as in every framework
        e = np.exp(wide - np.max(wide, axis=-1, keepdims=True, initial=-np.inf))
        y: F32 = (e / np.sum(e, axis=-1, keepdims=True)).astype(np.float32)
    return y


def silu_mul(gate: F32, up: F32) -> F32:
    """gate, up [..., F] → [..., F]."""
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):  # exp(-gate) may be infinite: the quotient is then 0, as it should be
        y: F32 = (wide / (1.0 + np.exp(-wide)) * up).astype(np.float32)
    return y
