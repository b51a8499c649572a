"""Low-rank adapters over a frozen `Model`: W x becomes W x + scale · B A x, with A and B alone trained (LoRA).

A target is named as PEFT names it (`formats.adapter`): a linear layer, or a stack of experts, whose gate and up halves
share A. Each expert of a stack has a rank of its own, 0 for most: ESFT (arXiv 2407.01906) found that a task uses few.
The factors of a stack lie behind one another, A [ΣR, I] and B [O, ΣR], and each expert knows its slice.

Factors are float32 whatever the base is, and enter the products in the base's type.

Shapes: E experts, O out, I in, R rank, X picked rows, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ConfigError
from shoal.formats.adapter import Adapter, LowRank, own_ranks
from shoal.model.model import Model
from shoal.model.moe import Experts, MoE, Routing, StackedLinear, in_expert_order
from shoal.tune.frozen import FrozenMatrix

SCALE = 1.0
Ranks = Mapping[str, tuple[int, ...]]  # by target: one rank, or one for each expert


class Factors(nn.Module):
    """A and B of one target. B starts at zero, so the model starts as it was."""

    def __init__(self, ranks: tuple[int, ...], out_dim: int, in_dim: int, scale: float = SCALE) -> None:
        super().__init__()
        self.ranks, self.scale = ranks, scale
        self.starts = (0, *accumulate(ranks))
        self.a = nn.Parameter(torch.empty(self.starts[-1], in_dim))
        self.b = nn.Parameter(torch.zeros(out_dim, self.starts[-1]))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def slice(self, expert: int) -> slice:
        return slice(self.starts[expert], self.starts[expert + 1])

    def add(self, y: Tensor, x: Tensor, expert: int = 0) -> Tensor:
        """y + scale · B A x over the last axis."""
        part = self.slice(expert)
        a, b = (self.a, self.b) if len(self.ranks) == 1 else (self.a[part], self.b[:, part])
        low = F.linear(x, a.to(x.dtype))
        flat = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.to(x.dtype).T, alpha=self.scale)
        return flat.view_as(y)

    def delta(self, expert: int = 0) -> Tensor:
        """[O, I] in float32."""
        part = self.slice(expert)
        return self.scale * (self.b[:, part] @ self.a[part])


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its factors."""

    def __init__(self, base: nn.Linear | FrozenMatrix, factors: Factors) -> None:
        super().__init__()
        self.base, self.factors = base, factors

    def forward(self, x: Tensor) -> Tensor:
        return self.factors.add(self.base(x), x)

    @property
    def weight(self) -> Tensor:
        """The sum, which absorbed attention reads instead of calling the layer."""
        weight = self.base.weight
        return weight + self.factors.delta().to(weight.dtype)


class AdaptedExperts(Experts):
    """Frozen experts, some with factors. Runs expert by expert."""

    def __init__(self, base: Experts) -> None:
        nn.Module.__init__(self)
        self.num_experts = base.num_experts
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj
        self.gate_up_factors: Factors | None = None
        self.down_factors: Factors | None = None

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return in_expert_order(x_TD, routing, self.num_experts, self.run)

    def run(self, sorted_XD: Tensor, counts_E: Tensor) -> Tensor:
        outputs = []
        for expert, rows in enumerate(torch.split(sorted_XD, counts_E.tolist())):
            if len(rows):
                outputs.append(self._run(rows, expert))
        return torch.cat(outputs) if outputs else torch.empty_like(sorted_XD)

    def _run(self, rows_XD: Tensor, expert: int) -> Tensor:
        gate_XF, up_XF = _linear(self.gate_proj, rows_XD, expert), _linear(self.up_proj, rows_XD, expert)
        factors = self.gate_up_factors
        if factors is not None and factors.ranks[expert]:
            gate_XF, up_XF = factors.add(torch.cat((gate_XF, up_XF), -1), rows_XD, expert).chunk(2, -1)
        hidden_XF = F.silu(gate_XF) * up_XF
        out_XD = _linear(self.down_proj, hidden_XF, expert)
        factors = self.down_factors
        if factors is not None and factors.ranks[expert]:
            out_XD = factors.add(out_XD, hidden_XF, expert)
        return out_XD


def _linear(part: StackedLinear | FrozenMatrix, rows: Tensor, expert: int) -> Tensor:
    return part.linear(rows, expert) if isinstance(part, FrozenMatrix) else F.linear(rows, part.weight[expert])


# ---- putting them on, and taking them off


def targets(model: Model) -> dict[str, tuple[int, int, int]]:
    """Everything an adapter can sit on, as (experts, out, in): linear layers and stacks of the main layers, no router,
    no embedding, no output head, no prediction layers."""
    out: dict[str, tuple[int, int, int]] = {}
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        for name, module in model.get_submodule(prefix).named_modules():
            if isinstance(module, Experts):
                experts, width, hidden = _shape(module.gate_proj)
                out[f"{prefix}.{name}.gate_up_proj"] = (experts, 2 * width, hidden)
                out[f"{prefix}.{name}.down_proj"] = (experts, hidden, width)
            elif isinstance(module, (nn.Linear, FrozenMatrix)) and ".experts" not in name:
                rows, cols = _shape(module)
                out[f"{prefix}.{name}"] = (1, rows, cols)
    return out


def _shape(module: nn.Module) -> tuple[int, ...]:
    return module.shape if isinstance(module, FrozenMatrix) else tuple(cast(Tensor, module.weight).shape)


def attach(model: Model, ranks: Ranks, *, scale: float = SCALE) -> dict[str, Factors]:
    """Freeze the model and put factors on it, in place. Targets whose ranks are all 0 get none.

    Raises:
        ConfigError: a target is no part of the model, or has another number of experts.
    """
    known = targets(model)
    model.requires_grad_(False)
    out: dict[str, Factors] = {}
    for module in model.modules():  # a frozen stack can only run expert by expert
        if isinstance(module, MoE) and not isinstance(module.experts, AdaptedExperts):
            module.experts = AdaptedExperts(module.experts)
    for target, each in ranks.items():
        if target not in known:
            raise ConfigError("adapter", f"{target} is no matrix of this model")
        experts, rows, cols = known[target]
        if len(each) != experts:
            raise ConfigError("adapter", f"{target} has {experts} matrices, not {len(each)}")
        if not any(each):
            continue
        out[target] = factors = Factors(each, rows, cols, scale)
        module_name, _, leaf = target.rpartition(".")
        parent = model.get_submodule(module_name)
        if isinstance(parent, AdaptedExperts):
            setattr(parent, "gate_up_factors" if leaf == "gate_up_proj" else "down_factors", factors)
        else:
            setattr(parent, leaf, AdaptedLinear(cast("nn.Linear | FrozenMatrix", getattr(parent, leaf)), factors))
    return out


def detach(model: Model) -> None:
    """Take the factors off again, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base)
        elif isinstance(module, AdaptedExperts):
            module.gate_up_factors = module.down_factors = None


def factors_of(model: Model) -> dict[str, Factors]:
    """What `attach` put on, by target."""
    out: dict[str, Factors] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            out[name] = module.factors
        elif isinstance(module, AdaptedExperts):
            for leaf, factors in (("gate_up_proj", module.gate_up_factors), ("down_proj", module.down_factors)):
                if factors is not None:
                    out[f"{name}.{leaf}"] = factors
    return out


def count(ranks: Ranks, shapes: Mapping[str, tuple[int, int, int]]) -> int:
    """Trained parameters."""
    return sum(sum(each) * (shapes[target][1] + shapes[target][2]) for target, each in ranks.items())


# ---- to and from disk


def as_adapter(factors: Mapping[str, Factors], *, base: str | None = None) -> Adapter:
    """The factors as `formats.adapter` writes them. PEFT gives every expert of a stack the same rank: the smaller ones
    are filled up with zeros, which change nothing."""
    return Adapter(parts={t: _as_low_rank(f) for t, f in factors.items()}, path=Path("adapter in memory"), base=base)


def _as_low_rank(factors: Factors) -> LowRank:
    rank = max(factors.ranks)
    a = np.zeros((len(factors.ranks), rank, factors.a.shape[1]), np.float32)
    b = np.zeros((len(factors.ranks), factors.b.shape[0], rank), np.float32)
    for expert, own in enumerate(factors.ranks):
        part = factors.slice(expert)
        a[expert, :own] = factors.a.detach()[part].cpu().numpy()
        b[expert, :, :own] = factors.b.detach()[:, part].cpu().numpy()
    return LowRank(a=a, b=b, scale=factors.scale)


def attach_adapter(model: Model, adapter: Adapter) -> dict[str, Factors]:
    """Put a loaded adapter on, ready to be trained further. Experts that it leaves alone get no factors.

    Raises:
        ConfigError: it does not fit the model (`formats.adapter.check_adapter` says it of a file).
    """
    out = attach(model, {target: tuple(own_ranks(part)) for target, part in adapter.parts.items()})
    with torch.no_grad():
        for target, factors in out.items():
            part = adapter.parts[target]
            factors.scale = part.scale
            for expert, own in enumerate(factors.ranks):
                factors.a[factors.slice(expert)] = torch.from_numpy(np.array(part.a[expert, :own]))
                factors.b[:, factors.slice(expert)] = torch.from_numpy(np.array(part.b[expert, :, :own]))
    return out
