"""Rotary frequencies as numbers: what the readable network and the engine's plan both start from.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), DeepSeek-V2 §2.1.3. P pairs = half the rotary dimensions.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shoal.config import GQAConfig, MLAConfig, RopeConfig, RopeScaling
from shoal.errors import ConfigError

Floats = NDArray[np.float32]


def frequencies(rope: RopeConfig, dim: int) -> Floats:
    """Radians per position of each of the `dim` / 2 pairs, fastest first, after scaling. Float32 [P].

    Computed in float32 in the order of operations of the published implementations: at position 100 000 a frequency
    rounded differently by one bit already moves the angle by a hundredth.
    """
    turns_P: Floats = np.float32(rope.rope_theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    one = np.float32(1)
    plain_P: Floats = one / turns_P
    scaling = rope.scaling
    if scaling is None:
        return plain_P
    factor = np.float32(scaling.factor)
    out_P: Floats
    if scaling.rope_type == "linear":
        out_P = plain_P / factor
    elif scaling.rope_type == "llama3":
        out_P = _llama3(plain_P, scaling)
    elif scaling.rope_type == "longrope":
        out_P = one / (np.asarray(scaling.short_factor, np.float32) * turns_P)
    else:
        keep_P = one - _yarn_ramp(rope.rope_theta, scaling, dim)
        out_P = one / (factor * turns_P) * (one - keep_P) + plain_P * keep_P
    return out_P


def attention_factor(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies cosines and sines by: √t of the paper (§3.4), or a ratio that is 1 in DeepSeek's models.

    LongRoPE (arXiv 2402.13753 §3.2) has a rule of its own."""
    if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.rope_type == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(_original_length(scaling)))
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much longer contexts sharpen attention: 0.1 · mscale · ln(factor) + 1 (YaRN §3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(attention: GQAConfig | MLAConfig, rope: RopeConfig) -> float:
    """What scores are multiplied by: 1 / sqrt(width of a key), times mscale² where MLA's positions are stretched.

    The trap: YaRN scales q and k by mscale each. DeepSeek's `mscale_all_dim` extends that to the unrotated dimensions,
    which no cosine touches, so it enters here, squared; the cosines get only mscale / mscale_all_dim.
    """
    if isinstance(attention, GQAConfig):
        return float(attention.head_dim**-0.5)
    scale = float(attention.qk_head_dim**-0.5)
    if rope.scaling is not None and rope.scaling.mscale_all_dim:
        scale *= yarn_mscale(rope.scaling.factor, rope.scaling.mscale_all_dim) ** 2
    return scale


def _original_length(scaling: RopeScaling) -> int:
    assert scaling.original_max_position_embeddings is not None  # checked by RopeScaling
    return scaling.original_max_position_embeddings


def _llama3(freqs_P: Floats, scaling: RopeScaling) -> Floats:
    """Divide pairs that turn fewer than `low_freq_factor` times within the trained length, keep those above `high`."""
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    num_turns_P = np.float32(_original_length(scaling)) * freqs_P / np.float32(2 * math.pi)
    keep_P: Floats = np.clip((num_turns_P - low) / (high - low), np.float32(0), np.float32(1))
    blended_P: Floats = (np.float32(1) - keep_P) * freqs_P / np.float32(scaling.factor) + keep_P * freqs_P
    return blended_P


def _yarn_ramp(theta: float, scaling: RopeScaling, dim: int) -> Floats:
    """0 for pairs that keep their frequency, 1 for those that are divided by the factor, linear between. [P]."""
    if theta == 1.0:
        raise ConfigError("rope_theta", "must exceed 1 for rope_type 'yarn', got 1.0")

    def pair_that_turns(num_turns: float) -> float:
        """Index (in dimensions, fractional) of the pair that turns `num_turns` times within the trained length."""
        return dim * math.log(_original_length(scaling) / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low = float(max(math.floor(pair_that_turns(scaling.beta_fast)), 0))
    high = float(min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1))
    if low == high:
        high += 0.001  # a step rather than a division by zero
    pairs_P = np.arange(dim // 2, dtype=np.float32)
    ramp_P: Floats = (pairs_P - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp_P, np.float32(0), np.float32(1))
