"""Where a step sent the tokens of a sequence: which experts, how strongly, how undecided the router was.

Letters: L layers with experts, T tokens, E experts, K picked ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.config import ModelConfig
from shoal.kernels import native

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of the network: its number, its rows over all sequences, and when it ran (`time.perf_counter`)."""

    number: int
    rows: int
    started: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Neighbouring tokens of one sequence that ran in one step.

    Attributes:
        first: position of the first of them.
        prompt_tokens: positions from here on are the answer's.
        tokens: their ids.
        experts_LTK: picked experts, best first, of each layer in `routed_layers`.
        weights_LTK: the factors of their outputs, scaling included.
        scores_LTE: what the router gave every expert, from which `entropy_LT` is made where it is wanted: the engine's
            thread has no time for it.
        sigmoid: whether its probabilities are sigmoids divided by their sum, or a softmax.
    """

    first: int
    prompt_tokens: int
    tokens: tuple[int, ...]
    experts_LTK: Ids
    weights_LTK: Floats
    scores_LTE: Floats
    sigmoid: bool
    step: Step

    @property
    def entropy_LT(self) -> Floats:
        """Of the router's probabilities over all experts, in nats."""
        return router_entropy(self.scores_LTE, sigmoid=self.sigmoid)


OnRouting = Callable[[Routing], None]


def routed_layers(config: ModelConfig) -> list[int]:
    """The layers with experts, without the prediction layers."""
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


def read_routing(engine: native.Engine, config: ModelConfig, rows: int) -> tuple[Ids, Floats, Floats]:
    """Experts and weights [L, T, K] and scores [L, T, E] of the `rows` that the engine ran last."""
    assert config.moe is not None
    shape = (len(routed_layers(config)), rows, config.moe.num_experts_per_tok)
    experts_LTK, weights_LTK = np.empty(shape, np.int32), np.empty(shape, np.float32)
    scores_LTE = np.empty((*shape[:2], config.moe.n_routed_experts), np.float32)
    engine.routing(experts_LTK, weights_LTK, scores_LTE)
    return experts_LTK, weights_LTK, scores_LTE


def router_entropy(scores_LTE: Floats, *, sigmoid: bool) -> Floats:
    """Of p / total: ln total − Σ p ln p / total, in nats [L, T]."""
    if sigmoid:
        odds = np.exp(np.minimum(-scores_LTE, 80.0))  # beyond, p ln p is 0 in float32
        p, logs = 1 / (1 + odds), -np.log(1 + odds)
    else:
        logs = scores_LTE - scores_LTE.max(axis=-1, keepdims=True)
        p = np.exp(logs)
    total = p.sum(axis=-1)
    out: Floats = np.log(total) - np.einsum("lte,lte->lt", p, logs) / total
    return out
