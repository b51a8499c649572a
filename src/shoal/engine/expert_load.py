"""How evenly the experts are used, from a sample of the engine's steps."""

from __future__ import annotations

import numpy as np

from shoal.config import ModelConfig
from shoal.engine.routing import Ids, routed_layers


class ExpertLoad:
    """Counts [layers with experts, experts], added to by the engine's thread and read by any."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.moe is not None
        self.layers = routed_layers(config)
        self.counts_LE = np.zeros((len(self.layers), config.moe.n_routed_experts), np.int64)

    def add(self, experts_LTK: Ids) -> None:
        """One step: the experts that its tokens were sent to."""
        experts = self.counts_LE.shape[1]
        for layer, picked_TK in enumerate(experts_LTK):
            self.counts_LE[layer] += np.bincount(picked_TK.ravel(), minlength=experts)

    def imbalance(self) -> dict[int, float]:
        """By layer: the busiest expert's share over the mean one; 1 is perfect balance. Empty before any step."""
        totals_L = self.counts_LE.sum(axis=1)
        ratios_L = self.counts_LE.max(axis=1) * self.counts_LE.shape[1] / np.maximum(totals_L, 1)
        return {layer: float(r) for layer, r, total in zip(self.layers, ratios_L, totals_L, strict=True) if total}
