"""What shrinking cost: sizes, and how far the small model's predictions lie from the large one's on held-out text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shoal.formats.checkpoint import Checkpoint
from shoal.formats.compressed_tensors import PARTS
from shoal.formats.hf_shards import open_shards
from shoal.formats.layout import count_params
from shoal.quant.recipes import ROLES, role

if TYPE_CHECKING:
    from shoal.engine import LLM

_ROWS = 64  # positions compared at a time, so that a large vocabulary needs little memory
_PART = re.compile(rf"(.*\.)({'|'.join(PARTS)})$")


@dataclass(frozen=True, kw_only=True)
class RoleSize:
    """Weights of one role: how many, in how many bytes (scales and zero points included), stored as what."""

    role: str
    weights: int
    bytes: int
    dtypes: tuple[str, ...]

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`bytes_before` and `bytes_after` are files; `weights` counts every stored weight once, MTP layers included."""

    bytes_before: int
    bytes_after: int
    weights: int
    roles: tuple[RoleSize, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(one.bytes for one in self.roles) / sum(one.weights for one in self.roles)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Teacher-forced comparison over `tokens` positions, in nats.

    `kl` is the mean of KL(large ‖ small) over all positions, `kl_99` its 99th percentile; `top1` the share of positions
    where both find the same token likeliest; perplexities are of the text itself, each window read without what came
    before it.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl: float
    kl_99: float
    top1: float


def measure_sizes(source: Checkpoint, small: Checkpoint) -> Sizes:
    """Sizes on disk, by role. Only headers are read."""
    stored: dict[str, tuple[int, int, set[str]]] = {name: (0, 0, set()) for name in ROLES}
    dtypes = {name: tensor.dtype for name, tensor in small.tensors.items()}
    for name, file in open_shards(small.path).items():
        entry = file.entries[name]
        part = _PART.match(name)
        whole = f"{part[1]}weight" if part else name
        key = role(whole)
        weights, nbytes, kinds = stored[key]
        if part is None:
            weights += math.prod(entry.shape)
        elif part[2] == "weight_packed":
            weights += math.prod(int(n) for n in file.view(f"{part[1]}weight_shape"))
        kinds.add(dtypes.get(re.sub(r"\.experts\.\d+\.", ".experts.", whole), "") or entry.dtype)
        stored[key] = weights, nbytes + entry.end - entry.begin, kinds
    roles = tuple(
        RoleSize(role=key, weights=weights, bytes=nbytes, dtypes=tuple(sorted(kinds)))
        for key, (weights, nbytes, kinds) in stored.items()
        if weights
    )
    return Sizes(
        bytes_before=_file_bytes(source.path),
        bytes_after=_file_bytes(small.path),
        weights=count_params(small.config, mtp=True),
        roles=roles,
    )


def _file_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def measure_quality(
    large: LLM,
    small: LLM,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Compare two models with the same vocabulary on windows of token ids. Both are in memory meanwhile."""
    divergences: list[NDArray[np.float64]] = []
    agreed, losses, predicted = 0, np.zeros(2), 0
    total = sum(len(window) for window in windows)
    for window in windows:
        ids = np.asarray(window)
        logits = [model.logits(window) for model in (large, small)]
        for start, ours, theirs in _log_probabilities(*logits):
            divergences.append((np.exp(ours) * (ours - theirs)).sum(axis=1))
            agreed += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
            follow = ids[start + 1 : start + 1 + len(ours)]  # the last position has nothing to predict
            rows = np.arange(len(follow))
            losses -= [ours[rows, follow].sum(), theirs[rows, follow].sum()]
            predicted += len(follow)
        if progress is not None:
            progress(sum(map(len, divergences)), total)
    every = np.concatenate(divergences)
    before, after = np.exp(losses / max(predicted, 1))
    return Quality(
        tokens=len(every),
        perplexity_before=float(before),
        perplexity_after=float(after),
        kl=float(every.mean()),
        kl_99=float(np.quantile(every, 0.99)),
        top1=agreed / len(every),
    )


def _log_probabilities(
    large_TV: NDArray[np.float32], small_TV: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
    """(first row, log-probabilities of both) for some rows at a time, in float64."""
    for start in range(0, len(large_TV), _ROWS):
        pair = []
        for logits_TV in (large_TV, small_TV):
            rows = logits_TV[start : start + _ROWS].astype(np.float64)
            rows -= rows.max(axis=1, keepdims=True)
            rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
            pair.append(rows)
        yield start, pair[0], pair[1]
