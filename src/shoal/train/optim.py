"""The two optimisers: AdamW for everything, or Muon for matrices and AdamW for the rest.

Muon (Keller Jordan, 2024; Liu et al., arXiv 2502.16982) turns a matrix's momentum into the nearest orthogonal matrix by
a few Newton-Schulz steps, so that every direction moves equally far. Multiplied by 0.2 · sqrt(max(rows, columns)) its
update has the size of AdamW's, and one learning rate and weight decay serve both. A stack of experts [E, F, D] is E
matrices, worked on together.

Shapes: E experts, F rows, D columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ConfigError
from shoal.model import Model
from shoal.train.shards import by_mesh, local, on_whole_matrices, rounds

# Jordan's coefficients: a steep start, singular values that end between about 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
OPTIMISERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """Which optimiser, and its constants. The learning rate is the peak; the loop's schedule sets `group["lr"]`.

    Attributes:
        optimiser: `adamw`, or `muon` for matrices with AdamW for embedding, output head, norms and biases.
        weight_decay: of matrices; norms and biases never decay, the embedding only if `decay_embedding`.
        muon_momentum: Nesterov momentum of Muon.
        muon_steps: Newton-Schulz steps.
    """

    optimiser: str = "adamw"
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embedding: bool = False
    muon_momentum: float = 0.95
    muon_steps: int = 5

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise ConfigError("optimiser.optimiser", f"{self.optimiser!r} is not one of {', '.join(OPTIMISERS)}")
        for name, low, high in (
            ("lr", 0.0, 10.0),
            ("eps", 0.0, 1.0),
            ("weight_decay", 0.0, 10.0),
            ("muon_steps", 1, 50),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"optimiser.{name}", f"must lie between {low} and {high}, got {getattr(self, name)!r}"
                )
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimiser.{name}", f"must lie between 0 and 1, got {getattr(self, name)!r}")


def make_optimisers(model: Model, settings: OptimiserSettings) -> list[torch.optim.Optimizer]:
    """Optimisers that together hold every trainable parameter of `model` once. Muon, if any, comes first."""
    matrices, tables, vectors = split_parameters(model)
    optimisers: list[torch.optim.Optimizer] = []
    if settings.optimiser == "muon":
        optimisers.append(
            Muon(
                matrices,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=settings.muon_momentum,
                steps=settings.muon_steps,
            )
        )
        matrices = []
    embedding = model.model.embed_tokens.weight
    decayed, plain = list(matrices), list(vectors)
    for table in tables:
        (decayed if table is not embedding or settings.decay_embedding else plain).append(table)
    optimisers.append(
        torch.optim.AdamW(
            [
                {"params": params, "weight_decay": decay}
                for every, decay in ((decayed, settings.weight_decay), (plain, 0.0))
                for params in by_mesh(every)
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
    )
    return optimisers


def split_parameters(model: Model) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as matrices, tables over the vocabulary (embedding and output head), and vectors."""
    tables = {model.model.embed_tokens.weight, *([] if model.lm_head is None else [model.lm_head.weight])}
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if p not in tables]
    return [p for p in rest if p.dim() > 1], [p for p in trained if p in tables], [p for p in rest if p.dim() <= 1]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, decoupled weight decay and AdamW-sized updates, for matrices [F, D] and stacks.

    As `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which takes no stacks. Newton-Schulz runs in bfloat16. Of
    matrices that several processes hold in rows, each process works on its share, whole (`shards`).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 3e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps})
        for group in self.param_groups:
            for param in group["params"]:
                if param.dim() not in (2, 3):
                    raise ValueError(f"Muon is for matrices and stacks of them, not for shape {list(param.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, work = float(group["lr"]), functools.partial(orthogonalise, steps=group["steps"])
            for params in rounds([param for param in group["params"] if param.grad is not None]):
                moves = [self._momentum(param, group["momentum"]).bfloat16() for param in params]
                for param, update in zip(params, on_whole_matrices(params, moves, work), strict=True):
                    mine = local(param).mul_(1 - lr * group["weight_decay"])
                    mine.add_(update, alpha=-lr * 0.2 * math.sqrt(max(param.shape[-2:])))
        return loss

    def _momentum(self, param: Tensor, momentum: float) -> Tensor:
        """This process's piece of the gradient with Nesterov momentum."""
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        grad = local(param.grad)
        return grad.lerp(local(state["momentum_buffer"]).lerp_(grad, 1 - momentum), momentum)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of every matrix U S Vᵀ in [..., F, D], by Newton-Schulz in the matrix's own type.

    Each step maps singular values by s → a s + b s³ + c s⁵, which drives all of them into a band around 1.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).reshape(-1, *sorted(matrix.shape[-2:]))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(*matrix.shape[:-2], *x.shape[-2:])
    return x.mT if tall else x
