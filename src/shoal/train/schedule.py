"""The learning rate over a run, as a factor of its peak."""

from __future__ import annotations

import math

from shoal.train.recipe import ScheduleSettings


def lr_factor(step: int, steps: int, settings: ScheduleSettings) -> float:
    """What step `step` (from 0) of `steps` multiplies the peak learning rate by.

    All kinds rise in a straight line over `warmup` steps. `cosine` then falls along half a wave to `floor`. `wsd` stays
    at the peak and falls over the last `decay` of the steps as 1 - sqrt, which ends lower than a straight line (Hägele
    et al., arXiv 2405.18392 §4). `constant` stays.
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.kind == "constant":
        return 1.0
    start = (
        settings.warmup if settings.kind == "cosine" else max(settings.warmup, steps - round(settings.decay * steps))
    )
    if step < start:
        return 1.0
    # The last step is one short of the floor: an update at a floor of nothing would be one for nothing.
    progress = min(1.0, (step - start + 1) / (steps - start + 1))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if settings.kind == "cosine" else 1 - math.sqrt(progress)
    return settings.floor + (1 - settings.floor) * left
