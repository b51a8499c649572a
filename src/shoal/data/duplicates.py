"""Which documents say the same, over all shards: equal digests, or MinHash values that agree (Broder 1997).

Documents whose band of values is equal are candidates; a candidate counts if the share of all its values that agree
reaches the threshold. Copies of copies form one group, whose first document is kept: the one of the earliest source.

Memory: 24 bytes a document, and one slice of one band at a time, as many as the budget asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.data import store
from shoal.data.clean import signature_path
from shoal.data.signatures import BANDS, ROWS, WIDTH, Signatures
from shoal.errors import ConfigError, FileError

ATTRIBUTES = "duplicates"
CHUNK = 1 << 14  # documents whose values are compared at once
KEY_COST = 64  # bytes that a document in the slice at hand may cost: key, number, their order
DEFAULT_BUDGET = 1 << 30

Numbers = NDArray[np.int64]
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Found:
    """By document, over all shards in order: the first document of its group (itself if it is that), and how it was
    found: 0 not a duplicate, 1 exact, 2 near."""

    keeper: Numbers
    how: NDArray[np.uint8]


def find_duplicates(folder: Path, threshold: float, budget: int | None = None) -> Found:
    """Groups of equal and nearly equal documents of a folder.

    Args:
        threshold: share of MinHash values, an estimate of the Jaccard similarity of five-word runs; 0 for exact only.
        budget: bytes of working memory.

    Raises:
        FileError: signatures are missing or damaged.
        ConfigError: the budget does not even hold a number for each document.
    """
    budget = budget or DEFAULT_BUDGET
    every = _Every([_open(signature_path(folder, shard)) for shard in store.shard_numbers(folder)])
    if 24 * every.total > budget:
        raise ConfigError("memory", f"{every.total} documents need {24 * every.total >> 20} MiB to be deduplicated")
    slices = max(1, -(-KEY_COST * every.total // max(budget - 24 * every.total, 1)))
    parent: Numbers = np.arange(every.total)
    exact: Numbers = np.arange(every.total)
    for groups in every.groups(_exact_keys, slices):
        for head, members in groups:
            exact[members] = head
            _join(parent, head, members)
    if threshold > 0:
        for band in range(BANDS):
            for groups in every.groups(lambda rows, band=band: _band_keys(rows, band), slices):  # type: ignore[misc]
                for head, members in groups:
                    _verify(every, parent, np.concatenate([[head], members]), threshold)
    keeper = _roots(parent)
    numbers = np.arange(every.total)
    how = np.where(exact != numbers, 1, np.where(keeper != numbers, 2, 0)).astype(np.uint8)
    return Found(keeper, how)


def write_duplicates(folder: Path, found: Found) -> None:
    """`attributes/duplicates`: the verdict, and `duplicate_of`, the kept document's number over all shards, or null."""
    start = 0
    for shard in store.shard_numbers(folder):
        stop = start + len(_open(signature_path(folder, shard)))
        how = found.how[start:stop]
        keeper = [int(one) if h else None for one, h in zip(found.keeper[start:stop], how, strict=True)]
        reasons = [(None, "duplicate: exact", "duplicate: near")[h] for h in how.tolist()]
        store.write_verdict(folder, ATTRIBUTES, shard, reasons, {"duplicate_of": keeper})
        start = stop


class _Every:
    """The signatures of all shards, read through memory maps."""

    def __init__(self, shards: list[Signatures]) -> None:
        self.shards = shards
        self.starts: Numbers = np.cumsum([0, *map(len, shards)])
        self.total = int(self.starts[-1])

    def groups(
        self, keys_of: Callable[[Signatures], tuple[Keys, NDArray[np.bool_]]], slices: int
    ) -> Iterator[Iterator[tuple[int, Numbers]]]:
        """For each slice of the keys: (first document, the others) of every key that several documents have."""
        for number in range(slices):
            keys, documents = [], []
            for start, rows in zip(self.starts.tolist(), self.shards, strict=False):
                for at in range(0, len(rows), CHUNK):
                    found, usable = keys_of(rows[at : at + CHUNK])
                    here = np.flatnonzero(usable & (found % np.uint64(slices) == number))
                    keys.append(found[here])
                    documents.append(here + (start + at))
            if keys:
                yield _equal_runs(np.concatenate(keys), np.concatenate(documents))

    def values(self, documents: Numbers) -> Signatures:
        """MinHash values of some documents, [documents, VALUES]."""
        out = np.empty((len(documents), BANDS * ROWS), np.uint32)
        shard = np.searchsorted(self.starts, documents, side="right") - 1
        for number in np.unique(shard).tolist():
            here = shard == number
            out[here] = self.shards[number][documents[here] - self.starts[number], 5:]
        return out


def _equal_runs(keys: Keys, documents: Numbers) -> Iterator[tuple[int, Numbers]]:
    order = np.argsort(keys, kind="stable")  # documents came in order, so each run stays in order
    keys, documents = keys[order], documents[order]
    edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
    for i in np.flatnonzero(np.diff(edges) > 1).tolist():
        run = documents[edges[i] : edges[i + 1]]
        yield int(run[0]), run[1:]


def _exact_keys(rows: Signatures) -> tuple[Keys, NDArray[np.bool_]]:
    # Half of the 128-bit digest: among 10**9 documents one pair in 37 such runs would meet by chance.
    return np.ascontiguousarray(rows[:, :2]).view(np.uint64)[:, 0], np.ones(len(rows), bool)


def _band_keys(rows: Signatures, band: int) -> tuple[Keys, NDArray[np.bool_]]:
    values = rows[:, 5 + band * ROWS : 5 + (band + 1) * ROWS].astype(np.uint64)
    key = values[:, 0].copy()
    for column in range(1, ROWS):
        key = key * np.uint64(0x9E3779B97F4A7C15) + values[:, column]
    return key, rows[:, 4] == 1


def _verify(every: _Every, parent: Numbers, members: Numbers, threshold: float) -> None:
    """Join those members of a bucket that really resemble its first; then the rest by themselves."""
    while len(members) > 1:
        roots = np.array([_root(parent, int(one)) for one in members.tolist()])
        members = members[np.sort(np.unique(roots, return_index=True)[1])]  # one of each group already known
        if len(members) < 2:
            return
        head = every.values(members[:1])
        alike = np.concatenate(
            [(every.values(members[at : at + CHUNK]) == head).mean(axis=1) >= threshold
             for at in range(1, len(members), CHUNK)]
        )  # fmt: skip
        _join(parent, int(members[0]), members[1:][alike])
        members = members[1:][~alike]


def _join(parent: Numbers, head: int, members: Numbers) -> None:
    for member in members.tolist():
        low, high = sorted((_root(parent, head), _root(parent, member)))
        parent[high] = low


def _root(parent: Numbers, document: int) -> int:
    while parent[document] != document:
        parent[document] = document = int(parent[parent[document]])  # halve the way for whoever comes next
    return document


def _roots(parent: Numbers) -> Numbers:
    while True:
        above = parent[parent]
        if (above == parent).all():
            return above
        parent = above


def _open(path: Path) -> Signatures:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FileError(path, f"cannot be read: {error}") from error
    if rows.dtype != np.uint32 or rows.ndim != 2 or rows.shape[1] != WIDTH:
        raise FileError(path, f"holds {rows.dtype} {list(rows.shape)}, not signatures of {WIDTH} values")
    return np.asarray(rows)
