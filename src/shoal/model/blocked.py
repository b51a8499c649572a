"""Attention for training on a CPU in 16-bit types: a block of queries at a time, forwards and backwards.

PyTorch's own CPU kernel wants keys as wide as values, which MLA's are not, and otherwise multiplies in float32. Here a
block of queries meets only the keys it may see, in 16-bit products over a few heads that fit the cache; scores become
probabilities in float32. As in FlashAttention-2 (Dao, arXiv 2307.08691) nothing of size [T, S] is kept: the backward
pass makes the probabilities again from the logsumexp of each query,

    p = exp(scale q·k - lse)    dv = pᵀ do    ds = scale p (do·v - do·o)    dq = ds k    dk = dsᵀ q.

Shapes: B batch, N heads, T query, S keys (as many as queries), H head width, V value width, C queries of a block,
G heads at a time, R row masks (1 if shared by the batch, else B).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64
# Scores in float32 at a time, 1 MB: what a core keeps close.
SCORES = 1 << 18


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
        out, lse = torch.empty_like(v), q.new_empty((*q.shape[:-1], 1), dtype=torch.float32)
        spans = _spans(mask_RTS, q.shape[-2])
        for row, heads, block in _blocks(q, spans):
            at, over = (row, heads, block.queries), (row, heads, block.keys)
            s_GCS = _product(q[at], k[over].mT, scale).float()
            block.hide(s_GCS, float("-inf"))
            top_GC1 = s_GCS.amax(-1, keepdim=True)
            sum_GC1 = s_GCS.sub_(top_GC1).exp_().sum(-1, keepdim=True)
            out[at] = _product(s_GCS.to(v.dtype), v[over]) / sum_GC1
            lse[at] = top_GC1 + sum_GC1.log()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = d_out.contiguous()
        # do·o of each query: what the softmax takes off every one of its scores.
        center = (d_out * out).sum(-1, keepdim=True, dtype=torch.float32)
        d_q, d_k, d_v = (
            torch.empty_like(q),
            torch.zeros_like(k, dtype=torch.float32),
            torch.zeros_like(v, dtype=torch.float32),
        )
        for row, heads, block in _blocks(q, ctx.spans):
            at, over = (row, heads, block.queries), (row, heads, block.keys)
            p_GCS = _product(q[at], k[over].mT, ctx.scale).float().sub_(lse[at]).exp_()
            block.hide(p_GCS, 0.0)
            d_v[over] += _product(p_GCS.to(q.dtype).mT, d_out[at])
            d_s_GCS = _product(d_out[at], v[over].mT).float().sub_(center[at]).mul_(p_GCS).to(q.dtype)
            d_q[at] = _product(d_s_GCS, k[over], ctx.scale)
            d_k[over] += _product(d_s_GCS.mT, q[at], ctx.scale)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _product(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """factor · a b of every head; the factor costs nothing there, and is applied before rounding."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)


class Block(NamedTuple):
    """A run of queries and the run of keys that they see between them.

    Attributes:
        hidden_CS: which keys, from `hidden_from` on, which query may not see.
    """

    queries: slice
    keys: slice
    hidden_from: int
    hidden_CS: Tensor

    def hide(self, scores_GCS: Tensor, value: float) -> None:
        scores_GCS[..., self.hidden_from :].masked_fill_(self.hidden_CS, value)


def _blocks(q_BNTH: Tensor, spans: list[list[Block]]) -> Iterator[tuple[int, slice, Block]]:
    """Row, heads, and block: as many heads together as the cache holds scores of."""
    rows, heads, _, _ = q_BNTH.shape
    for row in range(rows):
        for block in spans[row if len(spans) > 1 else 0]:
            together = max(1, SCORES // (BLOCK * (block.keys.stop - block.keys.start)))
            for first in range(0, heads, together):
                yield row, slice(first, first + together), block


def _spans(mask_RTS: Tensor | None, length: int) -> list[list[Block]]:
    """The blocks of each row mask."""
    starts = range(0, length, BLOCK)
    if mask_RTS is None:
        return [[_past(start, min(start + BLOCK, length)) for start in starts]]
    return [[_seen(mask_TS, start) for start in starts] for mask_TS in mask_RTS]


def _past(start: int, end: int) -> Block:
    size = end - start
    return Block(slice(start, end), slice(0, end), start, torch.ones(size, size, dtype=torch.bool).triu_(1))


def _seen(mask_TS: Tensor, start: int) -> Block:
    queries = slice(start, min(start + BLOCK, len(mask_TS)))
    seen = mask_TS[queries].any(0).nonzero()
    # Whole blocks, since the matrix library makes a kernel for every size it meets.
    first, end = int(seen[0]) // BLOCK * BLOCK, -(-(int(seen[-1]) + 1) // BLOCK) * BLOCK
    keys = slice(first, min(end, mask_TS.shape[1]))
    return Block(queries, keys, 0, ~mask_TS[queries, keys])
