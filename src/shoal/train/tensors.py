"""Batches on the device, and the precision that products run in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shoal.train.batches import Batch
from shoal.train.losses import TextBatch
from shoal.train.recipe import Recipe


def to_device(batch: Batch, device: torch.device) -> TextBatch:
    return TextBatch(*(torch.from_numpy(part).to(device, non_blocking=True) for part in batch))


def micro_batches(batch: Batch, size: int, device: torch.device) -> Iterator[TextBatch]:
    """The rows of a step in groups of `size`."""
    for start in range(0, len(batch.tokens_BT), size):
        yield to_device(Batch(*(part[start : start + size] for part in batch)), device)


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The context that forward passes run in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")
