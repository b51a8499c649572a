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

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.config import RopeConfig
from shoal.positions import attention_factor, frequencies


class RopeTable(NamedTuple):
    """Cosines and sines for one batch of positions, shared by all layers."""

    cos_BTP: Tensor
    sin_BTP: Tensor
    interleave: bool


def rope_table(rope: RopeConfig, dim: int, positions_BT: Tensor) -> RopeTable:
    """Angles of every position, in float32. `dim` is R; `positions_BT` may also be [T], shared by the batch."""
    angles_BTP = positions_BT.to(torch.float32)[..., None] * torch.from_numpy(frequencies(rope, dim)).to(
        positions_BT.device
    )
    factor = attention_factor(rope.scaling)
    return RopeTable(angles_BTP.cos() * factor, angles_BTP.sin() * factor, rope.interleave)


def rotate(x_BTNR: Tensor, table: RopeTable) -> Tensor:
    """Turn every pair of every head by its position's angle. Computed in float32 or wider, returned in x's dtype."""
    cos, sin = table.cos_BTP.unsqueeze(-2), table.sin_BTP.unsqueeze(-2)
    if table.interleave and x_BTNR.device.type == "cpu" and not torch.compiler.is_compiling():
        # Neighbours are a complex number, and one product turns it: a quarter of the time of the sums below.
        wide = x_BTNR.contiguous().to(torch.promote_types(x_BTNR.dtype, cos.dtype))
        pairs_BTNP = torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs_BTNP * torch.complex(cos, sin)).flatten(-2)
    elif table.interleave:
        a, b = x_BTNR[..., 0::2], x_BTNR[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x_BTNR.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.to(x_BTNR.dtype)
