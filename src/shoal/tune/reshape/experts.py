"""A dense feed-forward layer as a mixture of experts in DeepSeek-V3's form.

`split`: the hidden units are shared out. Those that matter for every token become the shared experts, the others are
grouped by how they are active together on a text (MoEfication, arXiv 2110.01786; LLaMA-MoE, arXiv 2406.16554), and the
router predicts from the layer's input, linearly, how much of the output each group makes. With every expert
active the layer computes what it did; with fewer it leaves the smallest parts out.

`copy`: every expert is the whole layer (sparse upcycling, arXiv 2212.05055). Weights of the active ones sum to one, so
the layer computes what it did until training drives the copies apart.

The weight of an active expert of a split layer must be 1. DeepSeek's weights are sigmoid scores over their sum times
`routed_scaling_factor`; so the router's logits are kept tiny, which orders the experts all the same, and the factor is
the number of active experts.

Letters: T tokens, D model, F hidden units, E experts, W hidden units of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.config import ModelConfig, MoEConfig
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint
from shoal.model import Model
from shoal.model.mlp import MLP
from shoal.model.rope import rope_table
from shoal.tune.reshape.layer import block_of
from shoal.tune.reshape.tensors import with_tensors

TINY = 1e-3  # standard deviation of a split router's logits: weights then differ from 1 by a few in ten thousand
RIDGE = 1e-2  # of the router's regression, beside the mean square of its inputs
ROUNDS = 20  # of clustering


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """How to make experts: `how` is split or copy; of `experts` routed ones `active` work on each token."""

    how: str
    experts: int
    active: int
    shared: int = 0
    first_k_dense_replace: int = 0

    def config(self, source: ModelConfig) -> MoEConfig:
        """The published fields. ConfigError names what does not fit."""
        if self.how not in ("split", "copy"):
            raise ConfigError("moe", f"{self.how!r} is not one of split, copy")
        if self.how == "copy" and self.shared:
            raise ConfigError("shared", "copies of the whole layer leave nothing to share")
        if not 0 <= self.first_k_dense_replace < source.num_hidden_layers:
            problem = f"{self.first_k_dense_replace} leaves none of the {source.num_hidden_layers} layers to reshape"
            raise ConfigError("first_k_dense_replace", problem)
        parts = self.experts + self.shared if self.how == "split" else 1
        if source.intermediate_size % parts:
            raise ConfigError("experts", f"{parts} parts do not divide the {source.intermediate_size} hidden units")
        return MoEConfig(
            n_routed_experts=self.experts, num_experts_per_tok=self.active, n_shared_experts=self.shared,
            moe_intermediate_size=source.intermediate_size // parts, first_k_dense_replace=self.first_k_dense_replace,
            routed_scaling_factor=float(self.active) if self.how == "split" else 1.0,
        )  # fmt: skip


def with_experts(
    checkpoint: Checkpoint,
    model: Model,
    shape: ExpertShape,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """A dense deepseek_v3 checkpoint with experts in place of its feed-forward layers.

    Args:
        checkpoint: with the feed-forward weights of `model`, which may still have its own kind of attention.
        windows: token ids of a text, all of one length; not needed for copies.
    """
    config = checkpoint.config
    if config.model_type != "deepseek_v3" or config.moe is not None:
        raise ConfigError("model_type", "experts are made of a dense deepseek_v3 model; reshape its attention first")
    moe = shape.config(config)
    seen = iter(observe(model, windows)) if shape.how == "split" else None
    made: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        units = next(seen) if seen is not None else None
        if layer >= shape.first_k_dense_replace:
            mlp = block_of(model, layer).mlp
            assert isinstance(mlp, MLP)
            tensors = split(mlp, moe, units) if units is not None else copy(mlp, moe, layer)
            made.update({f"model.layers.{layer}.mlp.{name}": value for name, value in tensors.items()})
        if progress is not None:
            progress(layer + 1, config.num_hidden_layers)
    return with_tensors(checkpoint, replace(config, moe=moe), made)


class Units(NamedTuple):
    """One layer's feed-forward on a sample of tokens: its inputs h_TD and hidden units units_TF."""

    h_TD: Tensor
    units_TF: Tensor


@torch.no_grad()
def observe(model: Model, windows: Sequence[Sequence[int]]) -> Iterator[Units]:
    """Run the model layer by layer over windows of equal length."""
    tokens_BT = torch.tensor([list(window) for window in windows])
    rope = rope_table(model.config.rope, model.config.attention.rope_dim, torch.arange(tokens_BT.shape[1]))
    x_BTD = model.model.embed_tokens(tokens_BT)
    for index in range(model.config.num_hidden_layers):
        block = block_of(model, index)
        assert isinstance(block.mlp, MLP)
        x_BTD = x_BTD + block.self_attn(block.input_layernorm(x_BTD), rope, None)
        h_TD = block.post_attention_layernorm(x_BTD).flatten(0, 1)
        units_TF = F.silu(block.mlp.gate_proj(h_TD)) * block.mlp.up_proj(h_TD)
        yield Units(h_TD, units_TF)
        x_BTD = x_BTD + block.mlp.down_proj(units_TF).view_as(x_BTD)


@torch.no_grad()
def split(mlp: MLP, moe: MoEConfig, units: Units) -> dict[str, Tensor]:
    """The `mlp` tensors of a layer whose hidden units are shared out, under Shoal's names."""
    gate_FD, up_FD, down_DF = (part.weight.detach() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    share_TF = units.units_TF.square() * down_DF.square().sum(0)  # of the squared output, cross terms left out
    by_use_F = share_TF.mean(0).argsort(descending=True)
    shared_F, routed_F = by_use_F[: moe.shared_intermediate_size], by_use_F[moe.shared_intermediate_size :]
    profile_FT = F.normalize(share_TF[:, routed_F].T.sqrt(), dim=1)
    group_F = _balanced_groups(profile_FT, moe.n_routed_experts)
    members_EW = torch.stack([routed_F[group_F == index].sort().values for index in range(moe.n_routed_experts)])
    weight_ED, bias_E = _router(units.h_TD, share_TF[:, members_EW].sum(-1).sqrt(), moe)
    out = {
        "gate.weight": weight_ED, "gate.e_score_correction_bias": bias_E,
        "experts.gate_proj.weight": gate_FD[members_EW], "experts.up_proj.weight": up_FD[members_EW],
        "experts.down_proj.weight": down_DF.T[members_EW].mT,
    }  # fmt: skip
    if moe.n_shared_experts:
        out |= {
            "shared_experts.gate_proj.weight": gate_FD[shared_F], "shared_experts.up_proj.weight": up_FD[shared_F],
            "shared_experts.down_proj.weight": down_DF[:, shared_F],
        }  # fmt: skip
    return {name: value.contiguous() for name, value in out.items()}


@torch.no_grad()
def copy(mlp: MLP, moe: MoEConfig, seed: int) -> dict[str, Tensor]:
    """The `mlp` tensors of a layer whose experts are all alike; the router is random and small."""
    parts = {f"{name}.weight": getattr(mlp, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj")}
    hidden = parts["gate_proj.weight"].shape[1]
    router_ED = torch.randn(moe.n_routed_experts, hidden, generator=torch.Generator().manual_seed(seed))
    out = {f"experts.{name}": value.expand(moe.n_routed_experts, -1, -1).contiguous() for name, value in parts.items()}
    bias_E = torch.zeros(moe.n_routed_experts)
    return {"gate.weight": router_ED * hidden**-0.5, "gate.e_score_correction_bias": bias_E, **out}


def _balanced_groups(profile_FT: Tensor, groups: int) -> Tensor:
    """k-means in which every group has the same size; a point takes the best group that still has room. [F]."""
    room = len(profile_FT) // groups
    generator = torch.Generator().manual_seed(0)
    centre_GT = profile_FT[torch.randperm(len(profile_FT), generator=generator)[:groups]]
    group_F = torch.full((len(profile_FT),), -1)
    for _ in range(ROUNDS):
        before_F, group_F = group_F, _fill(profile_FT @ centre_GT.T, room)
        if torch.equal(before_F, group_F):
            break
        centre_GT = F.normalize(torch.stack([profile_FT[group_F == g].mean(0) for g in range(groups)]), dim=1)
    return group_F


def _fill(likeness_FG: Tensor, room: int) -> Tensor:
    """Pairs in falling likeness, as long as the point is free and the group has room."""
    groups = likeness_FG.shape[1]
    left = [room] * groups
    out = [-1] * len(likeness_FG)
    for pair in likeness_FG.flatten().argsort(descending=True).tolist():
        point, group = divmod(pair, groups)
        if out[point] < 0 and left[group]:
            out[point] = group
            left[group] -= 1
    return torch.tensor(out)


def _router(h_TD: Tensor, size_TE: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Ridge regression of each expert's share of the output on the input, as tiny logits and a selection bias."""
    if moe.num_experts_per_tok == moe.n_routed_experts:
        return h_TD.new_zeros(moe.n_routed_experts, h_TD.shape[1]), h_TD.new_zeros(moe.n_routed_experts)
    x_TD, y_TE = h_TD.double(), size_TE.double()
    middle_D, middle_E = x_TD.mean(0), y_TE.mean(0)
    moment_DD = (x_TD - middle_D).T @ (x_TD - middle_D) / len(x_TD)
    moment_DD += RIDGE * moment_DD.diagonal().mean() * torch.eye(len(moment_DD), dtype=torch.float64)
    weight_DE = torch.linalg.solve(moment_DD, (x_TD - middle_D).T @ (y_TE - middle_E) / len(x_TD))
    scale = TINY / (x_TD @ weight_DE).std().clamp_min(1e-12)
    bias_E = middle_E - middle_D @ weight_DE
    # Selection adds the bias to σ(logit) = ½ + logit / 4.
    return (scale * weight_DE.T).float(), (scale * bias_E / 4).float()
