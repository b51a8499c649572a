"""How much of the machine a run uses: operations of a token, and the rate of matrix products this machine reaches."""

from __future__ import annotations

import time

import torch

from shoal.config import MLAConfig, ModelConfig
from shoal.cost.model_cost import flops_per_token, params_by_part

PROBE_SIDE, PROBE_SECONDS = 1024, 0.2
GPU_PROBE_SIDE = 8192


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations that training spends on a token: three times the forward pass (backward is two), nothing recomputed.

    A token sees half the sequence on average. MLA is trained in its expanded form, 2 · N · (H + R + V) for each token
    seen. An MTP layer costs what its weights do, a share of attention, and the output head once more.
    """
    attention = config.attention
    if isinstance(attention, MLAConfig):
        per_seen = 2 * attention.num_attention_heads * (attention.qk_head_dim + attention.v_head_dim)
    else:
        per_seen = 4 * attention.num_attention_heads * attention.head_dim
    parts = flops_per_token(config)
    forward = sum(parts.values()) + 2 * _active_mtp(config) + config.num_nextn_predict_layers * parts["head"]
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return 3 * (forward + layers * per_seen * sequence_length / 2)


def _active_mtp(config: ModelConfig) -> int:
    """Weights of the MTP layers that a token multiplies."""
    held = params_by_part(config).get("mtp", 0)
    if config.moe is None:
        return held
    idle = config.moe.n_routed_experts - config.moe.num_experts_per_tok
    expert = 3 * config.hidden_size * config.moe.moe_intermediate_size
    return held - config.num_nextn_predict_layers * idle * expert


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large square product here: the best of as many as fit into a fifth of a second."""
    side = GPU_PROBE_SIDE if device.type == "cuda" else PROBE_SIDE
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best, spent = float("inf"), 0.0
    for turn in range(100):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        if turn:  # the first warms up
            best = min(best, seconds)
        spent += seconds
        if turn and spent > PROBE_SECONDS:
            break
    return 2 * side**3 / best
