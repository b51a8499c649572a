"""Which tokens a step sees: a pure function of (seed, step, rank, world), so that resuming needs nothing but the step.

The tokens of the training part are cut into windows of T, one after another. Each epoch visits every window once, in an
order of its own. A step's rows are the same whatever the number of processes: each takes its share of them.

Shapes: B sequences of this process in a step, T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.data.shards import Shards
from shoal.errors import ConfigError

IGNORE = -100  # the target of a token whose successor belongs to another document; what torch's losses skip
FEISTEL_ROUNDS = 6
Array = NDArray[np.int64]


class Batch(NamedTuple):
    """Whole numbers [B, T].

    Attributes:
        tokens_BT: what the model reads.
        targets_BT: the token after each, or IGNORE where that is another document's.
        documents_BT: counts the documents of each row from 0; tokens see only their own document.
    """

    tokens_BT: Array
    targets_BT: Array
    documents_BT: Array


class Rows(Protocol):
    """Anything that holds rows of tokens by number, such as `Windows`."""

    def __len__(self) -> int: ...

    def read(self, numbers: list[int]) -> Batch:
        """The rows of these numbers."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Tokens `start` to `stop` of some shards, cut into windows of `length` that each know one token more.

    Attributes:
        name: the part's name, for errors.
    """

    shards: Shards
    start: int
    stop: int
    length: int
    name: str = "data"

    def __post_init__(self) -> None:
        if len(self) < 1:
            problem = (
                f"{self.stop - self.start} tokens in {self.shards.folder} are too few for a sequence of {self.length}"
            )
            raise ConfigError(self.name, problem)

    def __len__(self) -> int:
        return max(0, self.stop - self.start - 1) // self.length

    def read(self, numbers: list[int]) -> Batch:
        """The windows of these numbers, one a row."""
        rows = [self._row(self.start + number * self.length) for number in numbers]
        return Batch(*(np.stack(part) for part in zip(*rows, strict=True)))

    def _row(self, at: int) -> tuple[Array, Array, Array]:
        tokens, documents = self.shards.read(at, at + self.length + 1)
        targets = np.where(documents[1:] == documents[:-1], tokens[1:], IGNORE)
        return tokens[:-1], targets, documents[:-1] - documents[0]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The training batches: `batch` rows a step over all processes, in an order that `seed` decides."""

    windows: Rows
    batch: int
    seed: int

    def batch_at(self, step: int, *, rank: int = 0, world: int = 1) -> Batch:
        """The rows that process `rank` of `world` sees in step `step` (from 0)."""
        if self.batch % world:
            raise ConfigError("batch", f"{self.batch} sequences cannot be shared evenly by {world} processes")
        share = self.batch // world
        first = step * self.batch + rank * share
        return self.windows.read([self.window_at(sample) for sample in range(first, first + share)])

    def window_at(self, sample: int) -> int:
        """The window that the sample of this number (counted over all steps) reads."""
        epoch, index = divmod(sample, len(self.windows))
        return permute(index, len(self.windows), f"{self.seed}/{epoch}")


def split(shards: Shards, length: int, held_out: float) -> tuple[Windows, Windows | None]:
    """Training and held-out windows: the last documents that make up the share `held_out` of the tokens.

    No document is in both. Writers shuffle their documents, so the last ones are like the others.
    """
    if held_out == 0:
        return Windows(shards=shards, start=0, stop=shards.num_tokens, length=length), None
    at = min(int(shards.num_tokens * (1 - held_out)), shards.num_tokens - 1)
    border = shards.document_end(at) if shards.num_tokens else 0
    if border == shards.num_tokens:  # the last document is larger than the share: it is the held-out part
        border = shards.document_start(shards.num_tokens - 1)
    return (
        Windows(shards=shards, start=0, stop=border, length=length),
        Windows(shards=shards, start=border, stop=shards.num_tokens, length=length, name="data.held_out"),
    )


def permute(index: int, size: int, key: str) -> int:
    """Where `index` goes in a shuffle of `size` things that `key` decides; every index goes somewhere else.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002): no list to hold, the same on every machine and with every version of NumPy.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < size:
            return index
