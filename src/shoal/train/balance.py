"""Keeping experts busy without a loss: move the router's selection bias against the measured load.

DeepSeek-V3 (arXiv 2412.19437 §2.1.2), after Wang et al. (arXiv 2408.15664, algorithm 1): after each step, the bias of
an expert that got more than the mean load falls by γ, of one that got less rises by γ. As there, it is not centred:
selection sees only differences. Nothing is dropped and no gradient is touched.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.model import Model, Routing
from shoal.model.moe import MoE


class LayerLoad(NamedTuple):
    """How a layer's picks of one step were spread.

    Attributes:
        load: picks each expert got.
        max_vio: largest load over the mean, less 1 (arXiv 2408.15664 §4.1): 0 when even, E/K - 1 when all tokens agree.
        entropy: of the shares, divided by log E: 1 when even, 0 when one expert got all.
        dead: experts nobody picked.
    """

    load: list[int]
    max_vio: float
    entropy: float
    dead: int


class RouterBalance:
    """Counts picks over the batches of a step (and over ranks), then moves the biases.

    Args:
        speed: γ, how far a bias moves in a step. Published: 0.001, and 0 at the end of training.
        total: sums the counts over the processes that share a step.
    """

    def __init__(self, speed: float = 1e-3, total: Callable[[Tensor], Tensor] = lambda counts: counts) -> None:
        self.speed = speed
        self.total = total
        self._counts: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}

    @torch.no_grad()
    def observe(self, routings: dict[int, Routing]) -> None:
        """Count the picks of one batch. Call once for each, whether or not the router has a bias."""
        for layer, routing in routings.items():
            counts_E = routing.indices_TK.flatten().bincount(minlength=routing.scores_TE.shape[-1])
            before = self._counts.get(layer)
            self._counts[layer] = counts_E if before is None else before + counts_E

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """End the step: sum the counts over the ranks, move the biases of `model`, and start counting anew."""
        if not self._counts:
            return
        layers = sorted(self._counts)
        counts_LE = self.total(torch.stack([self._counts[layer] for layer in layers]))
        self._last = dict(zip(layers, counts_LE, strict=True))
        self._counts = {}
        for layer, counts_E in self._last.items():
            mlp = model.model.layers[layer].mlp
            assert isinstance(mlp, MoE)
            if mlp.gate.config.has_selection_bias and self.speed:
                # E · load against the sum: the comparison with the mean, in whole numbers.
                above_E = torch.sign(counts_E.sum() - counts_E * len(counts_E))
                mlp.gate.e_score_correction_bias.add_(above_E, alpha=self.speed)

    def statistics(self) -> dict[int, LayerLoad]:
        """The loads of the last finished step, by layer index."""
        if not self._last:
            return {}
        loads = torch.stack(list(self._last.values())).cpu()
        return {layer: _layer_load(load_E) for layer, load_E in zip(self._last, loads, strict=True)}


def _layer_load(load_E: Tensor) -> LayerLoad:
    share_E = load_E.double() / load_E.sum().clamp(min=1)
    experts = len(load_E)
    entropy = float(torch.special.entr(share_E).sum()) / float(torch.log(torch.tensor(float(max(experts, 2)))))
    max_vio = float(share_E.max()) * experts - 1
    return LayerLoad([int(n) for n in load_E], max_vio, entropy, int((load_E == 0).sum()))
