"""This process among those that train together. Alone, every method does nothing; `train.parallel` has company.

The loop asks here for everything that depends on how many processes there are, and for nothing of that kind elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.model import Model


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

    def wrap(self, model: Model) -> Model:
        """Take the whole model, on the CPU, and give back this process's part of it, on its device."""
        return model.to(self.device)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return flag

    def clip(self, model: Model, limit: float) -> Tensor:
        """Shorten the gradient of the whole model to `limit` (0: leave it); its length before. float32."""
        return nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))

    def barrier(self) -> None:
        """Wait for all processes."""
