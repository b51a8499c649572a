"""What a method of selection is given, and how it may ask small models; all of it plain data and two protocols."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.data.select.corpus import Corpus, Pool
from shoal.formats.atomic import atomic_file

Numbers = NDArray[np.int64]


class Learner(Protocol):
    """A small model that can be taught documents of the pool. Equal calls give equal models."""

    def read(self, documents: Numbers, tokens: int) -> None:
        """Train on so many tokens of these documents, over and over if they hold fewer."""

    def loss(self) -> float:
        """Nats a token on the half of the target sample that judges."""

    def surprise(self, documents: Numbers) -> NDArray[np.float64]:
        """Bits a byte of the beginning of each of these documents."""

    def fork(self) -> Learner:
        """A copy that goes its own way."""


class Proxies(Protocol):
    """Where small models come from. `tokens` is what one of them reads."""

    @property
    def tokens(self) -> int: ...

    def __call__(self, seed: int) -> Learner: ...


class Journal:
    """What is finished of a long selection: one file a round, written whole or not at all.

    A journal with another key (other documents, target or settings) counts for nothing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def get(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        data = json.loads(path.read_bytes())
        return data["data"] if data["key"] == self.key else None

    def put(self, name: str, data: dict[str, Any]) -> dict[str, Any]:
        """Write and return `data`, as it will be read: plain values only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"key": self.key, "data": data})
        with atomic_file(self.folder / f"{name}.json") as out:
            out.write(content.encode())
        return dict(json.loads(content)["data"])


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to choose from, for what, and how much.

    Attributes:
        target: the half of the target sample that methods compare with.
        budget: tokens to keep.
        rounds: of the methods that have some.
        proxies: small models; None where the method needs none.
    """

    pool: Pool
    target: Corpus
    budget: int
    seed: int
    rounds: int
    journal: Journal
    proxies: Proxies | None = None
    notice: Callable[[str, int, int], None] = lambda *_: None

    @property
    def alive(self) -> Numbers:
        """Numbers of the documents there are to choose from."""
        return np.flatnonzero(self.pool.alive_N)

    def asked(self) -> Proxies:
        assert self.proxies is not None, "this method asks small models"
        return self.proxies
