"""The runs that test_parallel.py makes twice: alone, and by two processes (`together.py`)."""

from __future__ import annotations

from pathlib import Path

from tests_train_conftest import tiny_recipe

from shoal.train.losses import LossSettings
from shoal.train.optim import OptimiserSettings
from shoal.train.recipe import Recipe, SampleSettings, ValidationSettings


def BASE(data: Path) -> Recipe:
    """Float32, for its rounding is small; three held-out rows for two processes, one row at a time."""
    return tiny_recipe(
        data,
        precision="fp32",
        micro_batch=1,
        losses=LossSettings(balance_weight=0.01, z_weight=1e-3),
        validation=ValidationSettings(every=3, sequences=3),
        samples=SampleSettings(prompts=("number",), every=6, max_tokens=4),
    )


# What changes, and over how many processes the experts are dealt out.
CASES = {
    "cut": ({}, 1),
    "dealt": ({}, 2),
    "bf16": ({"precision": "bf16", "steps": 3}, 2),
    "recomputed": ({"activation_checkpointing": True, "steps": 2}, 2),
    "muon": ({"optimiser": OptimiserSettings(optimiser="muon", lr=1e-2), "steps": 4}, 2),
}
# Over how many the experts are dealt out until step 3, and then to the end; 0: the test itself does that part, alone.
RESUMED = {"alone, dealt": (0, 2), "dealt, alone": (2, 0), "dealt, cut": (2, 1)}
