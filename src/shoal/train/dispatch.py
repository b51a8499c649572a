"""Experts dealt out over processes: tokens travel to the owners of the experts they picked, and their outputs back.

Each process of a group keeps E / S experts of a layer, in order. Picks sorted by expert are sorted by owner too, so
these exchanges do: how many rows each expert gets from whom, the rows and their weights, the outputs. Every pick is
computed; nothing is padded or dropped. `model` knows nothing of it: an instance's `forward` is replaced from outside.

Shapes: S processes of the group, E experts, L experts of this process, T tokens, K picked, D model, X = T · K picks of
this process's tokens, R rows that this process's experts get.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.model import Routing
from shoal.model.moe import Experts
from shoal.model.precision import product_type


def deal_out(experts: Experts, group: dist.ProcessGroup) -> None:
    """Keep this process's share of a layer's experts, and send tokens to the owners of the others from now on."""
    size, rank = group.size(), group.rank()
    share = experts.num_experts // size
    for part in (experts.gate_proj, experts.up_proj, experts.down_proj):
        mine = part.weight.detach()[rank * share : (rank + 1) * share].clone()
        part.weight = nn.Parameter(mine, requires_grad=part.weight.requires_grad)
    experts.num_experts = share
    experts.forward = functools.partial(run_dealt, experts.forward, share, group)  # type: ignore[method-assign]


def run_dealt(
    run: Callable[[Tensor, Routing], Tensor], share: int, group: dist.ProcessGroup, x_TD: Tensor, routing: Routing
) -> Tensor:
    """As `Experts.forward`, where `run` is that of the `share` experts that this process has. [T, D]."""
    low, size, num_picks = product_type(x_TD), group.size(), routing.indices_TK.shape[-1]
    expert_X = routing.indices_TK.flatten()
    order_X = expert_X.argsort(stable=True)
    counts_SL = expert_X.bincount(minlength=share * size).view(size, share)
    arriving_SL = torch.empty_like(counts_SL)
    dist.all_to_all_single(arriving_SL, counts_SL, group=group)
    sent, got = counts_SL.sum(1).tolist(), arriving_SL.sum(1).tolist()

    rows_RD = exchange(x_TD.to(low)[order_X // num_picks], sent, got, group)
    weights_R = exchange(routing.weights_TK.flatten()[order_X], sent, got, group)
    local_R = torch.arange(share, device=x_TD.device).repeat(size).repeat_interleave(arriving_SL.flatten())
    # A row that arrived is a token with a single pick.
    out_RD = run(rows_RD, Routing(weights_R[:, None], local_R[:, None], weights_R[:, None]))

    out_XD = exchange(out_RD, got, sent, group)
    back_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
    out_TKD = out_XD[back_X].view(-1, num_picks, x_TD.shape[-1])
    return out_TKD.sum(1, dtype=torch.promote_types(low, torch.float32)).to(low)


def exchange(rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `sent[0]` rows to process 0 of the group, and so on; what the others sent here, in their order.

    Gradients go the way back.
    """
    out: Tensor = _Exchange.apply(rows, sent, got, group)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return _swap(rows, sent, got, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(grad, ctx.got, ctx.sent, ctx.group), None, None, None


def _swap(rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(got), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), got, sent, group=group)
    return out
