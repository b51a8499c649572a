"""Attention for training on a CPU in 16-bit types: a block of queries at a time, forwards and backwards.

PyTorch's own CPU kernel wants keys as wide as values, which MLA's are not, and otherwise multiplies in float32. Here a
block of queries meets only the keys it may see, in 16-bit products over a few heads that fit the cache. Scores become
probabilities in PyTorch's softmax, which counts in float32: one pass in place of six, and its exponential of 16-bit
values takes a fifth of the time of `exp` in float32. As in FlashAttention (Dao et al., arXiv 2205.14135) nothing of
size [T, S] is kept; the backward pass makes the probabilities again,

    p = softmax(scale q·k)    dv = pᵀ do    ds = scale p (do·v - Σ p (do·v))    dq = ds k    dk = dsᵀ q.

Shapes: B batch, N heads, T query, S keys (as many as queries), H head width, V value width, C queries of a block,
G heads at a time, R row masks (1 if shared by the batch, else B).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 128
# Scores at a time, 1 MB: what a core keeps close.
SCORES = 1 << 19


def attend_in_blocks(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSV: Tensor, mask_RTS: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over what `mask_RTS` shows, or over each query's past without one. out_BNTV.

    As many keys as queries, and as many key heads as query heads. Differentiable once.
    """
    out_BNTV: Tensor = _Blocked.apply(q_BNTH, k_BNSH, v_BNSV, mask_RTS, scale)  # type: ignore[no-untyped-call]
    return out_BNTV


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask_RTS: Tensor | None, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, spans = torch.empty_like(v), _spans(mask_RTS, q)
        for row in range(len(q)):
            for heads, block in _blocks(q, spans, row):
                at, over = (row, heads, block.queries), (row, heads, block.keys)
                out[at] = torch.bmm(_probabilities(q[at], k[over].contiguous(), block, scale), v[over])
        ctx.save_for_backward(q, k, v)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        wide = torch.promote_types(q.dtype, torch.float32)
        for row in range(len(q)):
            d_k_NSH, d_v_NSV = torch.zeros_like(k[row], dtype=wide), torch.zeros_like(v[row], dtype=wide)
            for heads, block in _blocks(q, ctx.spans, row):
                at, over = (row, heads, block.queries), (row, heads, block.keys)
                # The matrix library copies what does not lie together, each time; this is once.
                q_GCH, k_GSH, d_out_GCV = (x.contiguous() for x in (q[at], k[over], d_out[at]))
                p_GCS = _probabilities(q_GCH, k_GSH, block, ctx.scale)
                d_v_NSV[over[1:]] += torch.bmm(p_GCS.mT, d_out_GCV)
                d_p_GCS = torch.bmm(d_out_GCV, v[over].contiguous().mT)
                d_s_GCS = torch.ops.aten._softmax_backward_data(d_p_GCS, p_GCS, -1, q.dtype)
                d_q[at] = _product(d_s_GCS, k_GSH, ctx.scale)
                d_k_NSH[over[1:]] += _product(d_s_GCS.mT, q_GCH, ctx.scale)
            d_k[row], d_v[row] = d_k_NSH, d_v_NSV
        return d_q, d_k, d_v, None, None


def _probabilities(q_GCH: Tensor, k_GSH: Tensor, block: Block, scale: float) -> Tensor:
    """What each query of the block makes of each key, summing to one. [G, C, S]."""
    scores_GCS = _product(q_GCH, k_GSH.mT, scale)
    scores_GCS[..., block.hidden_from :] += block.hidden_CS
    return scores_GCS.softmax(-1)


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor · a b of every head; the factor costs nothing there, and is applied before rounding."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)


class Block(NamedTuple):
    """A run of queries and the run of keys that they see between them.

    Attributes:
        hidden_CS: for the keys from `hidden_from` on: minus infinity where a query may not see one, else 0.
    """

    queries: slice
    keys: slice
    hidden_from: int
    hidden_CS: Tensor


def _blocks(q_BNTH: Tensor, spans: list[list[Block]], row: int) -> Iterator[tuple[slice, Block]]:
    """Heads and blocks of a row: as many heads together as the cache holds scores of."""
    for block in spans[row if len(spans) > 1 else 0]:
        together = max(1, SCORES // (BLOCK * (block.keys.stop - block.keys.start)))
        for first in range(0, q_BNTH.shape[1], together):
            yield slice(first, first + together), block


def _spans(mask_RTS: Tensor | None, q_BNTH: Tensor) -> list[list[Block]]:
    """The blocks of each row mask."""
    length = q_BNTH.shape[2]
    starts = range(0, length, BLOCK)
    if mask_RTS is None:
        return [[_past(start, min(start + BLOCK, length), q_BNTH) for start in starts]]
    return [[_seen(mask_TS, start, q_BNTH) for start in starts] for mask_TS in mask_RTS]


def _past(start: int, end: int, like: Tensor) -> Block:
    size = end - start
    return Block(slice(start, end), slice(0, end), start, like.new_full((size, size), float("-inf")).triu_(1))


def _seen(mask_TS: Tensor, start: int, like: Tensor) -> Block:
    queries = slice(start, min(start + BLOCK, len(mask_TS)))
    seen = mask_TS[queries].any(0).nonzero()
    # Whole blocks, since the matrix library makes a kernel for every size it meets.
    first, end = int(seen[0]) // BLOCK * BLOCK, -(-(int(seen[-1]) + 1) // BLOCK) * BLOCK
    keys = slice(first, min(end, mask_TS.shape[1]))
    hidden_CS = ~mask_TS[queries, keys]
    return Block(queries, keys, 0, like.new_zeros(hidden_CS.shape).masked_fill_(hidden_CS, float("-inf")))
