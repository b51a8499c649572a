"""Scaled dot-product attention with a causal mask, and optionally a wall between documents packed into one row.

Shapes: B batch, T query, S cached (keys), N heads, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.model.blocked import attend_in_blocks


def attention_mask(num_query: int, num_cached: int, documents_BT: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may see; True means visible. [T, S] or, with documents, [B, 1, T, S].

    The queries are the last `num_query` of `num_cached` tokens. None stands for the two cases that need no mask in
    memory: the plain causal square, and a single newest token that sees everything.

    Args:
        documents_BT: a whole number for each token; tokens see only those of the same document. Needs T == S.
    """
    if documents_BT is None:
        return None if num_query in (1, num_cached) else causal_mask(num_query, num_cached, device)
    if num_query != num_cached:
        raise ValueError("documents_BT goes with whole rows, not with a cache that already holds tokens")
    same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
    return (same_BTS & causal_mask(num_query, num_cached, device))[:, None]


def causal_mask(num_query: int, num_cached: int, device: torch.device) -> Tensor:
    """Query t is the token at num_cached - num_query + t and sees itself and all before it. Bool [T, S]."""
    queries_T = torch.arange(num_cached - num_query, num_cached, device=device)
    keys_S = torch.arange(num_cached, device=device)
    return keys_S <= queries_T[:, None]


def attend(q_BTNH: Tensor, k_BSNH: Tensor, v_BSNV: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over what `mask` shows, [B, T, N, V]. Key heads, if fewer, are shared in order."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSNH, v_BSNV))
    if trains_on_cpu(q, k, mask):
        shared = q.shape[1] // k.shape[1]
        if shared > 1:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        mask_RTS = None if mask is None else mask.reshape(-1, *mask.shape[-2:])
        out_BNTV = attend_in_blocks(q, k, v, mask_RTS, scale)
        return out_BNTV.transpose(1, 2)
    out_BNTV = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[-2] > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out_BNTV.transpose(1, 2)


def trains_on_cpu(q_BNTH: Tensor, k_BGSH: Tensor, mask: Tensor | None) -> bool:
    """Whether this is a case that `blocked` is for: a CPU, 16-bit types, gradients, whole rows; with shared key heads
    only under a mask, most of which PyTorch's kernel would compute to no end."""
    wanted = torch.is_grad_enabled() and q_BNTH.requires_grad
    whole = q_BNTH.device.type == "cpu" and q_BNTH.dtype.itemsize == 2 and q_BNTH.shape[2] == k_BGSH.shape[2]
    return wanted and whole and (mask is not None or q_BNTH.shape[1] == k_BGSH.shape[1])
