"""Grouped-query attention (Ainslie et al., arXiv 2305.13245), the attention of Llama and Qwen.

Every group of query heads shares one key-value head. Qwen2 adds biases to q, k and v; Qwen3 normalises each head of
q and k before the rotation.

Shapes: B batch, T query, S cached, D model, N query heads, G key-value heads, H head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from shoal.config import GQAConfig
from shoal.model.attend import attend
from shoal.model.cache import KVLayer
from shoal.model.norm import RMSNorm
from shoal.model.rope import RopeTable, rotate


class GQA(nn.Module):
    """Maps x_BTD to x_BTD; with a cache, the new tokens also see those already held."""

    def __init__(self, config: GQAConfig, hidden: int, eps: float) -> None:
        super().__init__()
        self.config = config
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, key, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps) if config.qk_norm else None
        self.o_proj = nn.Linear(query, hidden, bias=config.o_bias)
        self.scale = config.head_dim**-0.5

    def forward(self, x_BTD: Tensor, rope: RopeTable, mask: Tensor | None, cache: KVLayer | None = None) -> Tensor:
        q_BTNH = self._heads(self.q_proj(x_BTD), self.q_norm)
        k_BTGH = self._heads(self.k_proj(x_BTD), self.k_norm)
        v_BTGH = self._heads(self.v_proj(x_BTD), None)
        q_BTNH, k_BTGH = rotate(q_BTNH, rope), rotate(k_BTGH, rope)
        k_BSGH, v_BSGH = cache.append(k_BTGH, v_BTGH) if cache is not None else (k_BTGH, v_BTGH)
        out_BTNH = attend(q_BTNH, k_BSGH, v_BSGH, mask, self.scale)
        return self.o_proj(out_BTNH.flatten(-2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        x = x.view(*x.shape[:-1], -1, self.config.head_dim)
        return x if norm is None else norm(x)
