"""Look for numbers that no model should hold: NaN and infinities in the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shoal.formats.checkpoint import Checkpoint, LazyTensor
from shoal.formats.safetensors import slices


@dataclass(frozen=True, kw_only=True)
class BadTensor:
    """The first value of a tensor that is not finite."""

    name: str
    index: tuple[int, ...]
    value: float

    def __str__(self) -> str:
        return f"{self.name}{list(self.index)} is {self.value}"


def check_tensors(checkpoint: Checkpoint) -> Iterator[BadTensor]:
    """Read every weight once and yield, for each tensor with NaN or infinity in it, where the first one is."""
    for tensor in checkpoint.tensors.values():
        bad = _first_bad(tensor)
        if bad is not None:
            yield bad


def _first_bad(tensor: LazyTensor) -> BadTensor | None:
    position = 0
    for chunk in tensor.chunks():
        for part in slices(chunk):
            wrong = ~np.isfinite(part)
            if wrong.any():
                first = int(wrong.argmax())
                index = tuple(int(n) for n in np.unravel_index(position + first, tensor.shape))
                return BadTensor(name=tensor.name, index=index, value=float(part[first]))
            position += part.size
    return None
