"""One decoder layer: normalise, attend, add; normalise, feed forward, add.

Shapes: B batch, T query, S cached, D model.
"""

from __future__ import annotations

from torch import Tensor, nn

from shoal.config import MLAConfig, ModelConfig
from shoal.model.cache import KVLayer, LatentLayer
from shoal.model.gqa import GQA
from shoal.model.mla import MLA
from shoal.model.mlp import MLP
from shoal.model.moe import MoE, Routing
from shoal.model.norm import RMSNorm
from shoal.model.rope import RopeTable


class Block(nn.Module):
    """A decoder layer, dense or with experts; returns its output and, with experts, where the tokens went."""

    def __init__(self, config: ModelConfig, *, moe: bool) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn: MLA | GQA
        if isinstance(config.attention, MLAConfig):
            self.self_attn = MLA(config.attention, hidden, config.rope)
        else:
            self.self_attn = GQA(config.attention, hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp: MoE | MLP
        if moe:
            assert config.moe is not None
            self.mlp = MoE(config.moe, hidden)
        else:
            self.mlp = MLP(hidden, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self,
        x_BTD: Tensor,
        rope: RopeTable,
        mask: Tensor | None,
        cache: LatentLayer | KVLayer | None = None,
        *,
        absorbed: bool = False,
    ) -> tuple[Tensor, Routing | None]:
        h_BTD = self.input_layernorm(x_BTD)
        if isinstance(self.self_attn, MLA):
            x_BTD = x_BTD + self.self_attn(h_BTD, rope, mask, cache, absorbed=absorbed)
        else:
            x_BTD = x_BTD + self.self_attn(h_BTD, rope, mask, cache)
        h_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            out_BTD, routing = self.mlp(h_BTD)
            return x_BTD + out_BTD, routing
        return x_BTD + self.mlp(h_BTD), None
