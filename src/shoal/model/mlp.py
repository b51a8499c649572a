"""The gated feed-forward layer SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) · up(x))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Two projections up to `width`, one gating the other through SiLU, and one back down."""

    def __init__(self, hidden: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        return self.down_proj(hidden_BTF)  # type: ignore[no-any-return]
