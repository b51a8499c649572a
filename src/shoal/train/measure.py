"""The rate of matrix products that this machine reaches, beside which a run's use of it is stated."""

from __future__ import annotations

import time

import torch

PROBE_SIDE, PROBE_SECONDS = 1024, 0.2
GPU_PROBE_SIDE = 8192


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
