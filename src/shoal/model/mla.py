"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1).

Keys and values of all heads come from one small latent c of C values a token, so that only c and one rotary key shared
by all heads need remembering: C + R values a token instead of N · (H + R + V).

    c = norm(W_kv_a x)[:C]      k_rope = rotate((W_kv_a x)[C:])      q = [q_nope | rotate(q_rope)] for each head
    k_nope = W_k c              v = W_v c                            (W_kv_b stacks [W_k; W_v] head by head)
    score = scale · (q_nope · k_nope + q_rope · k_rope)              out = W_o [softmax(score) v, all heads]

There are two ways to compute the same thing. Expanded: make k_nope and v for every head, then attend as usual; cheapest
when many queries share the work (training, prefill). Absorbed: since q_nope · (W_k c) = (W_kᵀ q_nope) · c, move W_k to
the query and W_v behind the sum, and attend over the latents themselves as if there were one key-value head; cheapest
when few queries meet a long cache (decoding), for the cache is read as it lies.

Shapes: B batch, T query, S cached, D model, N heads, H nope, R rope, C latent, V value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.config import MLAConfig, RopeConfig
from shoal.model.attend import attend, causal_mask
from shoal.model.cache import LatentLayer
from shoal.model.norm import RMSNorm
from shoal.model.rope import RopeTable, rotate
from shoal.positions import softmax_scale

# Every released model normalises its latents with this, whatever its rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    """Maps x_BTD to x_BTD; with a cache, the new tokens also see those already held."""

    def __init__(self, config: MLAConfig, hidden: int, rope: RopeConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config, rope)
        query = config.num_attention_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.cache_width, bias=config.attention_bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        per_head = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, config.num_attention_heads * per_head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.v_head_dim, hidden, bias=config.attention_bias)

    def forward(
        self,
        x_BTD: Tensor,
        rope: RopeTable,
        mask: Tensor | None,
        cache: LatentLayer | None = None,
        *,
        absorbed: bool = False,
    ) -> Tensor:
        q_nope_BTNH, q_rope_BTNR = self.queries(x_BTD, rope)
        latent_BSC, k_rope_BSR = self.latents(x_BTD, rope)
        if cache is not None:
            latent_BSC, k_rope_BSR = cache.append(latent_BSC, k_rope_BSR)
        over = self.attend_absorbed if absorbed else self.attend_expanded
        out_BTNV = over(q_nope_BTNH, q_rope_BTNR, latent_BSC, k_rope_BSR, mask)
        return self.o_proj(out_BTNV.flatten(-2))  # type: ignore[no-any-return]

    def queries(self, x_BTD: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor]:
        """Queries of every head: q_nope_BTNH and the rotated q_rope_BTNR."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BTNQ = q.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))
        q_nope_BTNH, q_rope_BTNR = q_BTNQ.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        return q_nope_BTNH, rotate(q_rope_BTNR, rope)

    def latents(self, x_BTD: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor]:
        """What the cache keeps: the normalised latent_BTC and the rotated k_rope_BTR."""
        both = self.kv_a_proj_with_mqa(x_BTD)
        latent_BTC, k_rope_BTR = both.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(latent_BTC), rotate(k_rope_BTR.unsqueeze(-2), rope).squeeze(-2)

    def attend_expanded(
        self, q_nope_BTNH: Tensor, q_rope_BTNR: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Make keys and values of every head from the latents, then attend as usual. out_BTNV."""
        kv_BSNX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.config.num_attention_heads, -1))
        k_nope_BSNH, v_BSNV = kv_BSNX.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=-1)
        k_rope_BSNR = k_rope_BSR.unsqueeze(-2).expand(-1, -1, self.config.num_attention_heads, -1)
        q, k = _join(q_nope_BTNH, q_rope_BTNR), _join(k_nope_BSNH, k_rope_BSNR)
        return attend(q, k, v_BSNV, mask, self.scale)

    def attend_absorbed(
        self, q_nope_BTNH: Tensor, q_rope_BTNR: Tensor, latent_BSC: Tensor, k_rope_BSR: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend over the latents themselves: W_k joins the query, W_v follows the weighted sum. out_BTNV."""
        w_NXC = self.kv_b_proj.weight.view(self.config.num_attention_heads, -1, self.config.kv_lora_rank)
        w_k_NHC, w_v_NVC = w_NXC[:, : self.config.qk_nope_head_dim], w_NXC[:, self.config.qk_nope_head_dim :]
        q_latent_BTNC = torch.einsum("btnh,nhc->btnc", q_nope_BTNH, w_k_NHC)
        scores_BNTS = torch.einsum("btnc,bsc->bnts", q_latent_BTNC, latent_BSC)
        scores_BNTS = scores_BNTS + torch.einsum("btnr,bsr->bnts", q_rope_BTNR, k_rope_BSR)
        num_query, num_cached = scores_BNTS.shape[-2:]
        visible = causal_mask(num_query, num_cached, scores_BNTS.device) if mask is None else mask
        scores_BNTS = (scores_BNTS * self.scale).masked_fill(~visible, float("-inf"))
        wide = torch.promote_types(scores_BNTS.dtype, torch.float32)
        probs_BNTS = scores_BNTS.softmax(-1, dtype=wide).to(latent_BSC.dtype)
        sum_BTNC = torch.einsum("bnts,bsc->btnc", probs_BNTS, latent_BSC)
        return torch.einsum("btnc,nvc->btnv", sum_BTNC, w_v_NVC)


def _join(nope_BTNH: Tensor, rope_BTNR: Tensor) -> Tensor:
    """[nope | rope] of every head, each head's lying together in memory, as attention reads them."""
    return torch.cat((nope_BTNH.transpose(1, 2), rope_BTNR.transpose(1, 2)), dim=-1).transpose(1, 2)
