"""Where a parameter budget goes: which matrices get an adapter, of what rank, pointing where.

1. Routing statistics on the user's own data keep, of every layer, the fewest experts that do a given share of its work
   (ESFT, arXiv 2407.01906: its gate score).
2. The loss's gradient G of every matrix is found as its leading singular triplets. A rank-one piece σ u vᵀ lowers the
   loss most for its size, to first order; pieces are taken by σ for each parameter they cost, over the whole model,
   until the budget is spent (ranks by gradient, as in GoRA, arXiv 2502.12171, but spent as a knapsack).
3. A begins as the right singular vectors that were taken and B as zero, so the model begins as it was, and the first
   step of B is the best low-rank step there is (LoRA-GA, arXiv 2407.05000; LoRA-One, arXiv 2502.01235).

No gradient of a whole matrix is ever held: adapters themselves sketch it. With B = 0 and A random, the gradient of B is
G Aᵀ, a random range of G; with B an orthonormal basis of that and A = 0, the gradient of A is Bᵀ G, exactly (randomised
SVD, Halko et al., arXiv 0909.4061). It works on quantised bases and stacks of experts, in the memory of an adapter.

Shapes: E experts, O out, I in, K probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.model.model import Model
from shoal.tune.adapters import SCALE, Factors, Ranks, attach, count, detach, targets

PROBES = 8
EXPERT_SHARE = 0.3
PROBE_SEED = 20240705
Shapes = Mapping[str, tuple[int, int, int]]


class Piece(NamedTuple):
    """The leading part of one matrix's gradient: σ [K], falling, and the right singular vectors [K, I]."""

    sigma: Tensor
    right: Tensor


class Probed(NamedTuple):
    """What the data said.

    Attributes:
        pieces: by target and number in its stack.
        shares: for each layer with experts, the share of its gate weight that each expert got.
    """

    pieces: dict[tuple[str, int], Piece]
    shares: dict[int, Tensor]


def parse_budget(text: str, total: int) -> int:
    """`0.3%` of `total` parameters, or a count such as `400000`.

    Raises:
        ConfigError: neither, or outside 1 to half of all.
    """
    try:
        wanted = float(text[:-1]) / 100 * total if text.endswith("%") else float(text.replace("_", ""))
    except ValueError:
        raise ConfigError("budget", f"{text!r} is no share like 0.3% and no count of parameters") from None
    if not math.isfinite(wanted) or not 1 <= wanted <= total / 2:
        raise ConfigError("budget", f"{text} is {wanted:g} parameters of {total}; it must lie between 1 and half")
    return int(wanted)


def probe(
    model: Model,
    backward: Callable[[], None],
    routing: Callable[[], dict[int, Tensor]],
    *,
    probes: int = PROBES,
    expert_share: float = EXPERT_SHARE,
) -> Probed:
    """Leading singular triplets of the gradient of every matrix worth a look.

    Args:
        backward: runs the data forward and backward once.
        routing: the share of gate weight of each expert, by layer.
        probes: K, the most rank that a matrix can be given.
        expert_share: share of a layer's gate weight that the experts looked at must have together.
    """
    shares = routing()
    chosen = {layer: choose_experts(share_E, expert_share) for layer, share_E in shares.items()}
    ranks = {target: _probe_ranks(target, shape, chosen, probes) for target, shape in targets(model).items()}
    generator = torch.Generator().manual_seed(PROBE_SEED)
    factors = attach(model, ranks, scale=1.0)
    try:
        with torch.no_grad():
            for one in factors.values():
                one.a.copy_(torch.randn(one.a.shape, generator=generator) / one.a.shape[1] ** 0.5)
        backward()
        with torch.no_grad():
            for one in factors.values():
                one.a.zero_()
                for expert in range(len(one.ranks)):
                    part = one.slice(expert)
                    one.b[:, part] = torch.linalg.qr(_grad(one.b)[:, part]).Q
                one.a.grad = one.b.grad = None
        backward()
        pieces = {
            (target, expert): _decompose(one, expert)
            for target, one in factors.items()
            for expert, rank in enumerate(one.ranks)
            if rank
        }
    finally:
        detach(model)
    return Probed(pieces, shares)


def _grad(parameter: torch.nn.Parameter) -> Tensor:
    """Zero where no token of the data came by."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _decompose(one: Factors, expert: int) -> Piece:
    _, sigma, right = torch.linalg.svd(_grad(one.a)[one.slice(expert)].float(), full_matrices=False)
    return Piece(sigma, right)


def _probe_ranks(
    target: str, shape: tuple[int, int, int], chosen: Mapping[int, set[int]], most: int
) -> tuple[int, ...]:
    experts, rows, cols = shape
    rank = min(most, rows, cols)
    if experts == 1:
        return (rank,)
    keep = chosen.get(int(target.split(".")[2]), set())
    return tuple(rank if expert in keep else 0 for expert in range(experts))


def choose_experts(share_E: Tensor, enough: float) -> set[int]:
    """The fewest experts that together got `enough` of the layer's gate weight."""
    order = share_E.argsort(descending=True, stable=True)
    cumulative = share_E[order].cumsum(0) / share_E.sum().clamp(min=1e-30)
    return set(order[: int((cumulative < enough).sum()) + 1].tolist())


def allocate(pieces: Mapping[tuple[str, int], Piece], shapes: Shapes, budget: int) -> dict[str, tuple[int, ...]]:
    """Ranks by target: the pieces of most σ for each parameter, as many as the budget holds.

    Raises:
        ConfigError: not even the cheapest piece fits.
    """
    found = sorted(
        (
            (float(sigma) / _cost(shapes, target), target, expert)
            for (target, expert), piece in pieces.items()
            for sigma in piece.sigma
            if sigma > 0
        ),
        key=lambda item: (-item[0], item[1], item[2]),
    )
    ranks: dict[str, list[int]] = {}
    left = budget
    full: set[tuple[str, int]] = set()
    for _, target, expert in found:
        cost = _cost(shapes, target)
        if cost > left:
            full.add((target, expert))
        if (target, expert) in full:
            continue
        ranks.setdefault(target, [0] * shapes[target][0])[expert] += 1
        left -= cost
    if not ranks:
        cheapest = min((_cost(shapes, target) for target, _ in pieces), default=0)
        raise ConfigError("budget", f"{budget} parameters are too few: the smallest adapter takes {cheapest}")
    return {target: tuple(each) for target, each in ranks.items()}


def _cost(shapes: Shapes, target: str) -> int:
    return shapes[target][1] + shapes[target][2]


def place(model: Model, probed: Probed, budget: int, *, scale: float = SCALE) -> dict[str, Factors]:
    """Put adapters of `budget` parameters on the model where the probes say, A along the gradient, B at zero."""
    shapes = targets(model)
    ranks = allocate(probed.pieces, shapes, budget)
    assert count(ranks, shapes) <= budget
    factors = attach(model, ranks, scale=scale)
    with torch.no_grad():
        for target, one in factors.items():
            for expert, rank in enumerate(one.ranks):
                if rank:
                    one.a[one.slice(expert)] = probed.pieces[target, expert].right[:rank]
    return factors


def uniform_ranks(shapes: Shapes, budget: int, names: Sequence[str]) -> Ranks:
    """Plain LoRA of at most `budget` parameters: the same rank for every target that ends in one of `names`, each
    expert of a stack counted.

    Raises:
        ConfigError: no target has such a name, or rank 1 is over the budget.
    """
    chosen = {target: shape for target, shape in shapes.items() if target.endswith(tuple(names))}
    if not chosen:
        raise ConfigError("targets", f"no matrix of this model ends in one of {', '.join(names)}")
    each = count({target: (1,) * shape[0] for target, shape in chosen.items()}, shapes)
    if each > budget:
        raise ConfigError("budget", f"{budget} parameters are too few: rank 1 of {', '.join(names)} takes {each}")
    return {target: (budget // each,) * shape[0] for target, shape in chosen.items()}


def summarise(factors: Mapping[str, Factors]) -> list[dict[str, object]]:
    """What was placed, a line for each kind of matrix: how many have an adapter, ranks, parameters."""
    kinds: dict[str, list[Factors]] = {}
    for target, one in factors.items():
        kind = target.split(".", 3)[3]
        kinds.setdefault(kind, []).append(one)
    return [
        {
            "matrix": kind,
            "adapters": sum(1 for one in those for rank in one.ranks if rank),
            "ranks": sum(sum(one.ranks) for one in those),
            "most": max(max(one.ranks) for one in those),
            "parameters": sum(one.a.numel() + one.b.numel() for one in those),
        }
        for kind, those in kinds.items()
    ]
