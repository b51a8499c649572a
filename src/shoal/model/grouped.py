"""All experts of a layer, one after another, forwards and backwards, as one operator. What a CPU runs.

Written by hand, the sums need no operators of autograd for every expert. Rows are gathered in the experts' order, each
expert multiplies its run of rows, and a token collects its picks by gathering again: nothing is scattered, and every
sum has a fixed order.

    z = [W_gate; W_up] x      h = weight · silu(z_gate) · z_up      y = Σ over a token's picks of W_down h

The matrix library makes a kernel for every number of rows it meets, which for narrow experts takes longer than the
product. Runs of rows therefore start and end at multiples of a unit. A filling row repeats token 0 with weight 0: it
adds nothing to any result or gradient.

Shapes: T tokens, D model, E experts, K picked, F hidden, P rows in the experts' order, filling included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.model.precision import product_type

# The most rows a unit has. Runs of 512 rows grow by 6 % on average, and a run has one of a few dozen sizes.
UNIT = 64


class Runs(NamedTuple):
    """Which rows are whose.

    Attributes:
        bounds: first row and end of each expert's run.
        token_P: the token a row reads; 0 where it only fills a unit.
        row_TK: the row of each pick.
    """

    bounds: list[tuple[int, int]]
    token_P: Tensor
    row_TK: Tensor


def experts_in_turn(
    x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Σ over a token's picks of weight · down(silu(gate x) · up x). [T, D], in autocast's type or that of `x_TD`.

    Differentiable once, in everything but the picks.
    """
    low = product_type(x_TD)
    mean_rows = indices_TK.numel() // len(gate_EFD)
    # Only the CPU's kernels of 16-bit types are made to measure. Short runs get a smaller unit.
    made_to_measure = low.itemsize == 2 and x_TD.device.type == "cpu"
    unit = min(UNIT, 1 << max(0, mean_rows.bit_length() - 3)) if made_to_measure else 1
    runs = runs_of(indices_TK, len(gate_EFD), unit)
    out_TD: Tensor = _Experts.apply(x_TD.to(low), weights_TK, gate_EFD, up_EFD, down_EDF, runs)  # type: ignore[no-untyped-call]
    return out_TD


def runs_of(indices_TK: Tensor, experts: int, unit: int) -> Runs:
    """Sort picks by expert, each expert's rows rounded up to a multiple of `unit`."""
    expert_X = indices_TK.flatten()
    counts_E = expert_X.bincount(minlength=experts)
    room_E = (counts_E + unit - 1) // unit * unit
    ends_E = room_E.cumsum(0)
    starts_E = ends_E - room_E
    order_X = expert_X.argsort(stable=True)
    # A pick's row: the start of its expert's run, plus its place among the expert's picks.
    place_X = torch.arange(len(order_X), device=order_X.device) - (counts_E.cumsum(0) - counts_E).repeat_interleave(
        counts_E
    )
    sorted_rows_X = starts_E.repeat_interleave(counts_E) + place_X
    token_P = order_X.new_zeros(int(room_E.sum()))
    token_P[sorted_rows_X] = order_X // indices_TK.shape[-1]
    row_X = torch.empty_like(order_X)
    row_X[order_X] = sorted_rows_X
    return Runs(list(zip(starts_E.tolist(), ends_E.tolist(), strict=True)), token_P, row_X.view_as(indices_TK))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, runs: Runs
    ) -> Tensor:
        low, num_rows, (experts, width, hidden) = x_TD.dtype, len(runs.token_P), gate_EFD.shape
        both_EGD = x_TD.new_empty(experts, 2 * width, hidden)  # gate and up as one matrix: one product reads the rows
        # Another type first, another place then: copies that do both at once are not vectorised on a CPU.
        both_EGD[:, :width], both_EGD[:, width:] = gate_EFD.to(low), up_EFD.to(low)
        down_EDF = down_EDF.to(low)
        rows_PD = x_TD.index_select(0, runs.token_P)
        z_PG = _products(rows_PD, both_EGD.mT, runs, x_TD.new_empty(num_rows, 2 * width))
        weights_P1 = x_TD.new_zeros(num_rows, 1).index_copy_(0, runs.row_TK.flatten(), weights_TK.to(low).view(-1, 1))
        z_G_PF, z_U_PF = z_PG.tensor_split(2, dim=1)
        h_PF = F.silu(z_G_PF).mul_(z_U_PF).mul_(weights_P1)
        out_PD = _products(h_PF, down_EDF.mT, runs, rows_PD)
        ctx.save_for_backward(x_TD, weights_P1, both_EGD, down_EDF, z_PG)
        ctx.runs, ctx.weight_dtype, ctx.param_dtype = runs, weights_TK.dtype, gate_EFD.dtype
        return _collect(out_PD, runs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_P1, both_EGD, down_EDF, z_PG = ctx.saved_tensors
        runs, width = ctx.runs, down_EDF.shape[-1]
        z_G_PF, z_U_PF = z_PG.tensor_split(2, dim=1)
        silu_PF = F.silu(z_G_PF)
        unweighted_PF = silu_PF * z_U_PF

        rows_PD = grad_TD.to(x_TD.dtype).index_select(0, runs.token_P)
        d_h_PF = _products(rows_PD, down_EDF, runs, torch.empty_like(silu_PF))
        d_down_EDF = None
        if ctx.needs_input_grad[4]:
            d_down_EDF = _outer_products(rows_PD, unweighted_PF * weights_P1, runs, torch.empty_like(down_EDF))
            d_down_EDF = d_down_EDF.to(ctx.param_dtype)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        d_weights_P = (d_h_PF * unweighted_PF).sum(-1, dtype=wide)

        d_h_PF.mul_(weights_P1)
        d_z_PG = torch.empty_like(z_PG)
        torch.mul(d_h_PF, silu_PF, out=d_z_PG[:, width:])
        d_z_PG[:, :width] = torch.ops.aten.silu_backward(d_h_PF.mul_(z_U_PF), z_G_PF)
        d_gate_EFD = d_up_EFD = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            torch.index_select(x_TD, 0, runs.token_P, out=rows_PD)
            d_both_EGD = _outer_products(d_z_PG, rows_PD, runs, torch.empty_like(both_EGD))
            halves = d_both_EGD.tensor_split(2, dim=1)
            d_gate_EFD, d_up_EFD = (half.contiguous().to(ctx.param_dtype) for half in halves)
        d_x_TD = _collect(_products(d_z_PG, both_EGD, runs, rows_PD), runs)
        return d_x_TD, d_weights_P[runs.row_TK].to(ctx.weight_dtype), d_gate_EFD, d_up_EFD, d_down_EDF, None


def _products(rows_PA: Tensor, weight_EAB: Tensor, runs: Runs, out_PB: Tensor) -> Tensor:
    """Each run of rows times its expert's matrix."""
    for (start, end), weight_AB in zip(runs.bounds, weight_EAB.unbind(0), strict=True):
        if end > start:
            torch.mm(rows_PA[start:end], weight_AB, out=out_PB[start:end])
    return out_PB


def _outer_products(left_PA: Tensor, right_PB: Tensor, runs: Runs, out_EAB: Tensor) -> Tensor:
    """Σ over an expert's rows of left ⊗ right: the gradient of its matrix."""
    for (start, end), out_AB in zip(runs.bounds, out_EAB.unbind(0), strict=True):
        if end > start:
            torch.mm(left_PA[start:end].T, right_PB[start:end], out=out_AB)
        else:
            out_AB.zero_()
    return out_EAB


def _collect(rows_PD: Tensor, runs: Runs) -> Tensor:
    """Each token's sum over its picks, in float32 or wider, in the order of its picks."""
    return F.embedding_bag(runs.row_TK, rows_PD, mode="sum")
