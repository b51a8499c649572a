"""A checkpoint with some of its tensors replaced by ones in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from shoal.config import ModelConfig
from shoal.formats.checkpoint import Array, Checkpoint, LazyTensor
from shoal.formats.layout import expected_tensors


def with_tensors(checkpoint: Checkpoint, config: ModelConfig, made: Mapping[str, Tensor]) -> Checkpoint:
    """The checkpoint under another configuration, with these tensors in place of or beside its own."""
    tensors = {}
    for name in expected_tensors(config):
        if name in made:
            tensors[name] = LazyTensor(
                name=name, shape=tuple(made[name].shape), dtype="F32", source=checkpoint.path,
                make_chunks=partial(_chunks, made[name].numpy()),
            )  # fmt: skip
        else:
            tensors[name] = checkpoint.tensors[name]
    return replace(checkpoint, config=config, tensors=tensors)


def _chunks(array: Array) -> Iterator[Array]:
    """The tensor in one piece, a stack of experts one expert at a time."""
    yield from np.split(array, len(array)) if array.ndim == 3 else [array]
