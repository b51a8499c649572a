"""This process among those that train together. Alone, most of this does nothing; `train.parallel` has company.

The loop asks here for everything that depends on how many processes there are, and for nothing of that kind elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal import settings
from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.machine import available_bytes
from shoal.model import Model, random_model
from shoal.train import checkpoint
from shoal.train.checkpoint import Saved, Say, State
from shoal.train.recipe import Recipe


class Process:
    """A process that trains alone.

    Attributes:
        rank, world: this process's number, and how many there are.
        device: where it computes.
    """

    rank = 0
    world = 1

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def begin(self, recipe: Recipe) -> None:
        """Get ready for a run.

        Raises:
            ConfigError: so many processes cannot share it, or it is the work of one and there are several.
        """
        place = settings.launched()
        if place is not None and place.world != self.world:
            raise ConfigError("WORLD_SIZE", f"is {place.world}, but this takes one process; start it without torchrun")
        recipe.check_world(self.world)

    def require_memory(self, needed: int) -> None:
        """Raise ConfigError, with the numbers, if a run that takes `needed` bytes at the very least cannot fit.

        Only a process alone with the machine's own memory can tell.
        """
        left = available_bytes()
        if self.world == 1 and self.device.type == "cpu" and needed > left:
            problem = f"takes at least {needed / 1e9:.2f} GB of memory to train, {left / 1e9:.2f} GB are available"
            raise ConfigError("model", problem)

    def make(self, config: ModelConfig, seed: int) -> Model:
        """This process's part of a freshly drawn model, on its device; the same model for any number of processes."""
        return self.wrap(random_model(config, seed))

    def wrap(self, model: Model) -> Model:
        """Take the whole model, on the CPU, and give back this process's part of it, on its device."""
        return model.to(self.device)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes."""
        return value

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes have."""
        return number

    def clip(self, model: Model, limit: float) -> Tensor:
        """Shorten the gradient of the whole model to `limit` (0: leave it); its length before. float32."""
        return nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))

    def settle(self, model: Model) -> None:
        """Call after forward passes that no backward pass follows."""

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the leading process do what is inside before the others do it, however long it takes."""
        yield

    def lost(self, error: RuntimeError) -> str | None:
        """After a failure that may be another process's: whose it is, in words; None if it is this one's own."""
        return None

    def newest(self, folder: Path, say: Say) -> Saved | None:
        """The newest whole checkpoint, as `checkpoint.newest`."""
        return checkpoint.newest(folder, say)

    def save(self, folder: Path, step: int, state: State, meta: Mapping[str, Any], *, keep: int) -> None:
        """Save a checkpoint, as `checkpoint.save`. Every process calls it with its part of the state."""
        checkpoint.save(folder, step, state, meta, keep=keep)

    def load(self, saved: Saved, part: str, targets: Mapping[str, Tensor]) -> None:
        """Fill `targets`, which have the names and shapes of that part of a checkpoint."""
        for name, value in saved.tensors(part).items():
            targets[name].copy_(value)

    def whole(self, tensor: Tensor) -> Tensor:
        """The same memory, but as a piece of the tensor that all processes hold together, where it is one."""
        return tensor


@contextlib.contextmanager
def launched() -> Iterator[Process]:
    """This process as it was started: alone, or by torchrun as one of several.

    What goes wrong inside is told once, by one of them; the others end with the same exit code and say nothing.
    """
    place = settings.launched()
    if place is None:
        yield Process()
        return
    from shoal.train.parallel import company

    with company(place) as process:
        yield process
