"""Rotary positions (RoFormer, arXiv 2104.09864) and the three published ways to stretch them past the trained length.

A head's R dimensions form P = R/2 pairs; at position t, pair p turns by the angle t · frequency[p]. Scores between
rotated queries and keys then depend on the distance of their positions only.

Two layouts exist and a checkpoint fixes which one its weights were trained with. Interleaved (DeepSeek): the pairs are
(x0, x1), (x2, x3), …. Half-split (Llama, Qwen): (x0, x_P), (x1, x_P+1), …. The result keeps the layout of the input.

Scaling rules: linear (divide every frequency), llama3 (divide the slow ones, blend in a band between), YaRN (arXiv
2309.00071: a ramp between the pairs that turn `beta_fast` and `beta_slow` times within the trained length).

Shapes: B batch, T query, N heads, R rotary dimensions, P pairs (R/2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.config import RopeConfig, RopeScaling
from shoal.errors import ConfigError


class RopeTable(NamedTuple):
    """Cosines and sines for one batch of positions, shared by all layers."""

    cos_BTP: Tensor
    sin_BTP: Tensor
    interleave: bool


def rope_table(rope: RopeConfig, dim: int, positions_BT: Tensor) -> RopeTable:
    """Angles of every position, in float32. `dim` is R; `positions_BT` may also be [T], shared by the batch."""
    angles_BTP = positions_BT.to(torch.float32)[..., None] * frequencies(rope, dim, positions_BT.device)
    factor = attention_factor(rope.scaling)
    return RopeTable(angles_BTP.cos() * factor, angles_BTP.sin() * factor, rope.interleave)


def rotate(x_BTNR: Tensor, table: RopeTable) -> Tensor:
    """Turn every pair of every head by its position's angle. Computed in float32 or wider, returned in x's dtype."""
    cos, sin = table.cos_BTP.unsqueeze(-2), table.sin_BTP.unsqueeze(-2)
    if table.interleave:
        a, b = x_BTNR[..., 0::2], x_BTNR[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x_BTNR.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.to(x_BTNR.dtype)


def frequencies(rope: RopeConfig, dim: int, device: torch.device | None = None) -> Tensor:
    """Radians per position of each of the `dim` / 2 pairs, fastest first, after scaling. Float32 [P].

    Computed in float32 in the order of operations of the published implementations: at position 100 000 a frequency
    rounded differently by one bit already moves the angle by a hundredth.
    """
    turns = rope.rope_theta ** (torch.arange(0, dim, 2, device=device).to(torch.float32) / dim)
    scaling = rope.scaling
    if scaling is None:
        return 1.0 / turns
    if scaling.rope_type == "linear":
        return 1.0 / turns / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(1.0 / turns, scaling)
    keep = 1.0 - _yarn_ramp(rope.rope_theta, scaling, dim, device)
    return 1.0 / (scaling.factor * turns) * (1.0 - keep) + 1.0 / turns * keep


def attention_factor(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies cosines and sines by: √t of the paper (§3.4), or a ratio that is 1 in DeepSeek's models."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much longer contexts sharpen attention: 0.1 · mscale · ln(factor) + 1 (YaRN §3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _original_length(scaling: RopeScaling) -> int:
    assert scaling.original_max_position_embeddings is not None  # checked by RopeScaling
    return scaling.original_max_position_embeddings


def _llama3(freqs_P: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide pairs that turn fewer than `low_freq_factor` times within the trained length, keep those above `high`."""
    wavelengths = 2 * math.pi / freqs_P
    num_turns = _original_length(scaling) / wavelengths
    keep = (num_turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * freqs_P / scaling.factor + keep * freqs_P


def _yarn_ramp(theta: float, scaling: RopeScaling, dim: int, device: torch.device | None) -> Tensor:
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
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
    return ((pairs - low) / (high - low)).clamp(0, 1)
