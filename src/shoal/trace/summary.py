"""What a trace says: how evenly the experts worked, how sure the routers were, who works with whom, what has changed.

Letters: L layers with experts, E experts, T tokens, K picked experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import FileError
from shoal.trace.table import TraceFile

Counts = NDArray[np.int64]
TOP_PAIRS = 5
MAX_PAIR_CELLS = 1 << 26  # of the table that counts pairs, 512 MiB


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two experts of a layer that met on `tokens` tokens, `lift` times as often as if picked independently."""

    experts: tuple[int, int]
    tokens: int
    lift: float


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """How the experts of a layer were used.

    Attributes:
        load: tokens that each expert got.
        max_vio: largest load over the mean, less 1 (arXiv 2408.15664 §4.1): 0 when even.
        load_entropy: of the shares of the load, divided by ln E: 1 when even, 0 when one expert got all.
        router_entropy: of the router's probabilities, averaged over tokens and divided by ln E: 1 when it has no
            opinion; None where the source does not say.
        dead: experts that no token went to.
        together: the pairs that meet most beyond chance, the strongest first.
    """

    layer: int
    tokens: int
    load: tuple[int, ...]
    max_vio: float
    load_entropy: float
    router_entropy: float | None
    dead: tuple[int, ...]
    together: tuple[Pair, ...]


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """How far the loads of two traces are apart in a layer.

    Attributes:
        divergence: Jensen–Shannon, in bits: 0 for equal shares, 1 for experts in common with nobody.
        chance: what to expect of two samples of these sizes from one distribution, to first order, if picks were
            independent; only more than that is a difference.
        most: (expert, share in the first, share in the second) of those whose share changed most.
    """

    layer: int
    divergence: float
    chance: float
    most: tuple[tuple[int, float, float], ...]


def summarise(trace: TraceFile) -> list[LayerSummary]:
    """Layer by layer, in one pass and in memory that does not grow with the trace."""
    layers, experts = trace.shape.layers, trace.shape.n_routed_experts
    place = np.full(max(layers) + 1, -1)
    place[list(layers)] = np.arange(len(layers))
    load_LE = np.zeros((len(layers), experts), np.int64)
    tokens_L, entropy_L = np.zeros(len(layers), np.int64), np.zeros(len(layers))
    pairs = np.zeros(load_LE.size * experts if load_LE.size * experts <= MAX_PAIR_CELLS else 0, np.int64)
    for batch in trace.batches(["layer", "experts", "entropy"]):
        index, picks = place[batch["layer"]], batch["experts"].astype(np.int64)
        cells = index[:, None] * experts + picks
        load_LE += np.bincount(cells.ravel(), minlength=load_LE.size).reshape(load_LE.shape)
        tokens_L += np.bincount(index, minlength=len(layers))
        entropy_L += np.bincount(index, weights=batch["entropy"], minlength=len(layers))
        for one, other in itertools.combinations(np.sort(picks).T, 2) if len(pairs) else ():
            np.add.at(pairs, (index * experts + one) * experts + other, 1)
    pairs_LEE = pairs.reshape(-1, experts, experts) if len(pairs) else [None] * len(layers)
    return [
        layer_summary(layer, load_LE[i], tokens=int(tokens_L[i]), entropy=entropy_L[i], pairs_EE=pairs_LEE[i])
        for i, layer in enumerate(layers)
    ]


def layer_summary(
    layer: int, load_E: Counts, *, tokens: int, entropy: float | None = None, pairs_EE: Any = None
) -> LayerSummary:
    """From counts: `entropy` summed over the tokens, `pairs_EE` how often two experts met."""
    total, scale = int(load_E.sum()), math.log(max(len(load_E), 2))
    share_E = load_E / max(total, 1)
    spread = -float((share_E[share_E > 0] * np.log(share_E[share_E > 0])).sum())
    return LayerSummary(
        layer=layer,
        tokens=tokens,
        load=tuple(load_E.tolist()),
        max_vio=float(share_E.max() * len(load_E) - 1) if total else 0.0,
        load_entropy=spread / scale,
        router_entropy=None if entropy is None or not tokens else float(entropy) / tokens / scale,
        dead=tuple(np.flatnonzero(load_E == 0).tolist()),
        together=_strongest(pairs_EE, load_E, tokens) if pairs_EE is not None and tokens else (),
    )


def _strongest(pairs_EE: Counts, load_E: Counts, tokens: int) -> tuple[Pair, ...]:
    """Pairs by how far their count lies above chance, in standard deviations, so that rare ones do not come first."""
    expected_EE = np.outer(load_E, load_E) / tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        surplus_EE = np.where(pairs_EE > 0, (pairs_EE - expected_EE) / np.sqrt(expected_EE), -np.inf)
    out = []
    for cell in np.argsort(surplus_EE, axis=None)[::-1][:TOP_PAIRS]:
        one, other = divmod(int(cell), len(load_E))
        if surplus_EE[one, other] <= 0:
            break
        lift = float(pairs_EE[one, other] / expected_EE[one, other])
        out.append(Pair(experts=(one, other), tokens=int(pairs_EE[one, other]), lift=lift))
    return tuple(out)


def drift(before: Sequence[LayerSummary], after: Sequence[LayerSummary], *, most: int = 3) -> list[LayerDrift]:
    """Compare the loads of two traces of models with the same experts.

    Raises:
        ValueError: their layers or experts differ.
    """
    if [(one.layer, len(one.load)) for one in before] != [(one.layer, len(one.load)) for one in after]:
        raise ValueError("the two have different layers or experts")
    return [_layer_drift(one, other, most) for one, other in zip(before, after, strict=True)]


def _layer_drift(before: LayerSummary, after: LayerSummary, most: int) -> LayerDrift:
    first_E, second_E = np.array(before.load, float), np.array(after.load, float)
    picks = first_E.sum(), second_E.sum()
    p_E, q_E = first_E / max(picks[0], 1), second_E / max(picks[1], 1)
    middle_E = (p_E + q_E) / 2
    divergence = sum(_bits(part_E, middle_E) for part_E in (p_E, q_E)) / 2
    # Around equal shares it is Σ (p - q)² / (8 m), and the variance of p - q is m (1 / n1 + 1 / n2).
    used = int((middle_E > 0).sum())
    chance = (used - 1) / 8 * sum(1 / max(n, 1) for n in picks) / math.log(2) if used else 0.0
    changed = np.argsort(-np.abs(p_E - q_E), kind="stable")[:most]
    return LayerDrift(
        layer=before.layer,
        divergence=max(0.0, divergence),
        chance=min(1.0, chance),
        most=tuple((int(e), float(p_E[e]), float(q_E[e])) for e in changed),
    )


def _bits(p_E: NDArray[np.float64], middle_E: NDArray[np.float64]) -> float:
    some = p_E > 0
    return float((p_E[some] * np.log2(p_E[some] / middle_E[some])).sum())


def check_comparable(before: TraceFile, after: TraceFile) -> None:
    """FileError if two traces are not of models with the same experts."""
    one, other = before.shape, after.shape
    if (one.layers, one.n_routed_experts) != (other.layers, other.n_routed_experts):
        raise FileError(after.path, f"is of a model with other layers or experts than {before.path}")
