"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 §2.2): a further layer that predicts one token further ahead.

From the main model's state at position i and the token after it, depth 1 predicts the token after that:

    x_i = W_eh [norm_e(Emb(t_{i+1})) ; norm_h(h_i)]        h'_i = norm(layer(x)_i)        logits of t_{i+2} = head(h'_i)

h is the state after the final norm, and depth k + 1 takes the h' of depth k. Embedding table and head are the main
model's. The released weights put the embedding first in the concatenation, where the paper writes it second.

Shapes: B batch, T query, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model.block import Block
from shoal.model.cache import KVLayer, LatentLayer
from shoal.model.moe import Routing
from shoal.model.norm import RMSNorm
from shoal.model.rope import RopeTable


class SharedHead(nn.Module):
    """The norm before the output head. The published files keep a copy of the head beside it; it is the main one."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden, eps)


class MTPBlock(Block):
    """A decoder layer that looks one token further ahead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, moe=config.moe is not None)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = SharedHead(hidden, eps)

    def forward(  # type: ignore[override]
        self,
        hidden_BTD: Tensor,
        next_BTD: Tensor,
        rope: RopeTable,
        mask: Tensor | None,
        cache: LatentLayer | KVLayer | None = None,
        *,
        absorbed: bool = False,
    ) -> tuple[Tensor, Routing | None]:
        """States h_i and embeddings of t_{i+1} to states h'_i, ready for the output head or the next depth."""
        x_BTD = self.eh_proj(torch.cat((self.enorm(next_BTD), self.hnorm(hidden_BTD)), dim=-1))
        x_BTD, routing = super().forward(x_BTD, rope, mask, cache, absorbed=absorbed)
        return self.shared_head.norm(x_BTD), routing
