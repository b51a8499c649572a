"""Where a step sent the tokens of a sequence: which experts, how strongly, how undecided the router was.

Letters: L layers with experts, T tokens, K picked experts.
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
        entropy_LT: of the router's probabilities over all experts (sigmoid scores divided by their sum), in nats.
    """

    first: int
    prompt_tokens: int
    tokens: tuple[int, ...]
    experts_LTK: Ids
    weights_LTK: Floats
    entropy_LT: Floats
    step: Step


OnRouting = Callable[[Routing], None]


def routed_layers(config: ModelConfig) -> list[int]:
    """The layers with experts, without the prediction layers."""
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


def read_routing(engine: native.Engine, config: ModelConfig, rows: int) -> tuple[Ids, Floats, Floats]:
    """Experts and weights [L, T, K] and entropy [L, T] of the `rows` that the engine ran last."""
    assert config.moe is not None
    shape = (len(routed_layers(config)), rows, config.moe.num_experts_per_tok)
    experts_LTK, weights_LTK = np.empty(shape, np.int32), np.empty(shape, np.float32)
    entropy_LT = np.empty(shape[:2], np.float32)
    engine.routing(experts_LTK, weights_LTK, entropy_LT)
    return experts_LTK, weights_LTK, entropy_LT
