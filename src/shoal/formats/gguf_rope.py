"""Llama-3's rotary scaling, which GGUF stores as the tensor `rope_freqs.weight`: one divisor per frequency.

The divisor is 1 for wavelengths below original / high, `factor` above original / low, and the inverse of a linear blend
in between (Llama 3.1 model card). Only the two wavelengths matter, so a file fixes (original, low, high) up to a common
scale; the reader takes low = 1, as every published model has it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.config import RopeScaling
from shoal.errors import ConfigError, FileError
from shoal.formats.gguf_file import GGUFFile
from shoal.formats.gguf_quants import dequantize

NAME = "rope_freqs.weight"
# As published with Llama 3.1 to 3.3.
PUBLISHED = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama3_factors(scaling: RopeScaling, theta: float, dim: int) -> NDArray[np.float32]:
    """The divisors of the `dim // 2` rotary frequencies, fastest first."""
    original = scaling.original_max_position_embeddings
    assert scaling.rope_type == "llama3"
    assert original is not None
    turns = original / _wavelengths(theta, dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / scaling.factor + blend)).astype(np.float32)


def llama3_scaling(file: GGUFFile, theta: float, dim: int) -> RopeScaling | None:
    """Find the parameters that reproduce the stored divisors; None if all are 1.

    Raises:
        FileError: no Llama-3 scaling gives these numbers.
    """
    info = file.tensors[NAME]
    if info.shape != (dim // 2,) or info.dtype not in ("F32", "F16", "BF16"):
        problem = f"should be {dim // 2} plain numbers, is {info.dtype} {list(info.shape)}"
        raise FileError(file.path, problem, item=NAME)
    stored = dequantize(file.stored(NAME), info.dtype).reshape(-1).astype(np.float64)
    if not np.isfinite(stored).all() or stored.min() <= 0:
        raise FileError(file.path, "holds a value that is no positive number", item=NAME)
    if np.allclose(stored, 1, rtol=1e-4):
        return None
    factor = float(f"{stored.max():.6g}")
    for candidate in (PUBLISHED, _fit(stored, factor, theta, dim)):
        try:
            scaling = RopeScaling(rope_type="llama3", factor=factor, **candidate)  # type: ignore[arg-type]
        except ConfigError:
            continue
        if np.allclose(llama3_factors(scaling, theta, dim), stored, rtol=2e-3 if info.dtype != "F32" else 1e-4):
            return scaling
    raise FileError(file.path, "does not follow Llama 3's rotary scaling, the only one supported here", item=NAME)


def _wavelengths(theta: float, dim: int) -> NDArray[np.float64]:
    return np.asarray(2 * np.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim))


def _fit(stored: NDArray[np.float64], factor: float, theta: float, dim: int) -> dict[str, float]:
    """The blend is a line in 1 / wavelength: slope original / (high − low), intercept −low / (high − low)."""
    blend = (1 / stored - 1 / factor) / (1 - 1 / factor)
    inside = (blend > 1e-3) & (blend < 1 - 1e-3)
    if inside.sum() < 2:
        return dict(PUBLISHED)
    slope, intercept = np.polyfit(1 / _wavelengths(theta, dim)[inside], blend[inside], 1)
    if intercept >= 0:
        return dict(PUBLISHED)
    high = float(f"{1 - 1 / intercept:.4g}")
    return {
        "original_max_position_embeddings": round(slope * (high - 1)),
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
    }
