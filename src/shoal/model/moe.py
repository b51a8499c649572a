"""A layer of many small experts, few per token, beside shared experts that all take (DeepSeekMoE, arXiv 2401.06066).

The router scores every expert for every token, picks K, and returns the picks as plain values, so that training can add
its balance losses and tracing can record them. The experts of a layer are stacked tensors [E, F, D]; tokens are sorted
by expert, so each expert reads its weights once: on a GPU in grouped products, elsewhere one expert after another
(`grouped`). Every pick is computed: there is no capacity and nothing is dropped.

Shapes: T tokens (batch and time flattened), D model, E experts, K active experts, G groups, F hidden, X = T · K picks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.config import MoEConfig
from shoal.model.grouped import experts_in_turn
from shoal.model.mlp import MLP
from shoal.model.precision import product_type


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        weights_TK: what each picked expert's output is multiplied by. Differentiable.
        indices_TK: the picked experts, in no particular order.
        scores_TE: softmax or sigmoid scores of all experts before bias and selection. Differentiable.
    """

    weights_TK: Tensor
    indices_TK: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Scores experts in float32 and picks K of them by the configuration's `topk_method`.

    Weights are the picked scores, divided by their sum if `norm_topk_prob`, times `routed_scaling_factor`: the rule of
    DeepSeek-V3, here for every method. Released V2 models do not normalise, and transformers ignores the flag for them;
    a V2 configuration that sets it is normalised here.

    `e_score_correction_bias` (noaux_tc) steers selection only. It has no gradient: training moves it by measured load
    (DeepSeek-V3 §2.1.2), so it is a buffer. Keep it in float32: its steps vanish in bfloat16.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: MoEConfig, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, hidden))
        if config.has_selection_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_TD: Tensor) -> Routing:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        # Near-ties are common among many experts, and a bfloat16 product would break them differently on every machine.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        scores_TE = logits_TE.softmax(-1) if self.config.scoring_func == "softmax" else logits_TE.sigmoid()
        with torch.no_grad():
            indices_TK = self.select(scores_TE)
        weights_TK = scores_TE.gather(-1, indices_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights_TK * self.config.routed_scaling_factor, indices_TK, scores_TE)

    def select(self, scores_TE: Tensor) -> Tensor:
        """Indices of the K experts each token goes to. [T, K]."""
        moe = self.config
        if moe.topk_method == "noaux_tc":
            biased_TE = scores_TE + self.e_score_correction_bias
            best_TG2 = _by_group(biased_TE, moe.n_group).topk(min(2, moe.n_routed_experts // moe.n_group), dim=-1)
            scores_TE = _keep_groups(biased_TE, best_TG2.values.sum(-1), moe.topk_group, float("-inf"))
        elif moe.topk_method == "group_limited_greedy":
            best_TG = _by_group(scores_TE, moe.n_group).amax(-1)
            scores_TE = _keep_groups(scores_TE, best_TG, moe.topk_group, 0.0)
        return scores_TE.topk(moe.num_experts_per_tok, dim=-1, sorted=False).indices


def _by_group(scores_TE: Tensor, num_groups: int) -> Tensor:
    return scores_TE.view(*scores_TE.shape[:-1], num_groups, -1)


def _keep_groups(scores_TE: Tensor, group_scores_TG: Tensor, num_kept: int, floor: float) -> Tensor:
    """Set the scores of all experts outside each token's `num_kept` best groups to `floor`."""
    kept = group_scores_TG.topk(num_kept, dim=-1, sorted=False).indices
    dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(-1, kept, False)
    return _by_group(scores_TE, group_scores_TG.shape[-1]).masked_fill(dropped_TG[..., None], floor).flatten(-2)


class StackedLinear(nn.Module):
    """The same linear map of every expert: weight [E, out, in]. Holds the tensor; `Experts` does the sums."""

    def __init__(self, experts: int, out_dim: int, in_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_dim, in_dim))


class Experts(nn.Module):
    """E gated MLPs of hidden width F, applied to the tokens that picked them."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate_proj = StackedLinear(experts, width, hidden)
        self.up_proj = StackedLinear(experts, width, hidden)
        self.down_proj = StackedLinear(experts, hidden, width)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Σ over a token's picks of weight · expert(x). Summed in float32 or wider, in a fixed order. [T, D]."""
        if can_group(x_TD, self.gate_proj.weight):
            return in_expert_order(x_TD.to(torch.bfloat16), routing, self.num_experts, self.run_grouped)
        weights = (part.weight for part in (self.gate_proj, self.up_proj, self.down_proj))
        return experts_in_turn(x_TD, routing.weights_TK, routing.indices_TK, *weights)

    def run_grouped(self, sorted_XD: Tensor, counts_E: Tensor) -> Tensor:
        """All experts in three grouped products, without waiting for the counts on the host."""
        ends_E = counts_E.cumsum(0).to(torch.int32)

        def linear(rows: Tensor, part: StackedLinear) -> Tensor:
            return F.grouped_mm(rows, part.weight.to(rows.dtype).transpose(1, 2), offs=ends_E)

        hidden_XF = F.silu(linear(sorted_XD, self.gate_proj)) * linear(sorted_XD, self.up_proj)
        return linear(hidden_XF, self.down_proj)


def in_expert_order(
    x_TD: Tensor, routing: Routing, num_experts: int, run: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Sort picks by expert, `run` the rows [X, D] of which each expert has counts_E, weigh and sum what comes out."""
    num_picks = routing.indices_TK.shape[-1]
    expert_X = routing.indices_TK.flatten()
    order_X = expert_X.argsort(stable=True)
    out_XD = run(x_TD[order_X // num_picks], expert_X.bincount(minlength=num_experts))
    back_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
    out_TKD = out_XD[back_X].view(-1, num_picks, x_TD.shape[-1])
    return (out_TKD * routing.weights_TK[..., None]).sum(1).to(x_TD.dtype)


def can_group(x_TD: Tensor, weight_EFD: Tensor) -> bool:
    """Whether grouped products apply: on a GPU, in bfloat16, with rows of whole 16-byte units."""
    aligned = all(size % 8 == 0 for size in weight_EFD.shape[1:])
    return x_TD.is_cuda and product_type(x_TD) == torch.bfloat16 and aligned


class MoE(nn.Module):
    """Routed experts plus the shared ones. Maps x_BTD to x_BTD and says where each token went."""

    def __init__(self, config: MoEConfig, hidden: int) -> None:
        super().__init__()
        self.gate = Router(config, hidden)
        self.experts = Experts(config.n_routed_experts, hidden, config.moe_intermediate_size)
        self.shared_experts = MLP(hidden, config.shared_intermediate_size) if config.n_shared_experts else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_TD = x_BTD.flatten(0, -2)
        routing = self.gate(x_TD)
        out_BTD = self.experts(x_TD, routing).view_as(x_BTD)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return out_BTD, routing
