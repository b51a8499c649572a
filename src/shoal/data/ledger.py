"""What a step did with how much: numbers that add up over shards, and a few samples that do not depend on order."""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

from shoal.data.document import Document, OnReject, Reject, Step

SAMPLES = 4  # kept by reason
EXCERPT = 1200  # characters of a sample
BINS = 48
# Where a histogram's bins lie: of documents' characters (a logarithm), and of compressed size to size.
SCALES = {"characters": (1.0, 7.0), "compression": (0.0, 1.2)}
GROUPS = ("kind", "language", "licence", "source")


class Ledger:
    """Counts of one shard, or of many after `add`. `data` is what is stored as JSON.

    Attributes:
        data: `steps` {name: [documents in, characters in, documents out, characters out]} in order; `dropped` {step:
            {reason: [documents, characters]}}; `masked` {what: findings}; `groups` {before or after: {of: {value:
            [documents, characters]}}}; `histograms` {before or after: {of: counts}}; `samples` {reason: a few rows}.
    """

    def __init__(self, data: dict[str, Any] | None = None, *, seed: int = 0) -> None:
        self.seed = seed
        self.data: dict[str, Any] = data or {
            "steps": {}, "dropped": {}, "masked": {}, "groups": {"before": {}, "after": {}},
            "histograms": {"before": {}, "after": {}}, "samples": {},
        }  # fmt: skip

    def counted(self, name: str, step: Step, documents: Iterable[Document], on_reject: OnReject) -> Iterator[Document]:
        """`step` over documents, with what goes in and what comes out written down."""
        row = self.data["steps"].setdefault(name, [0, 0, 0, 0])
        return self._counting(row, step, documents, on_reject)

    def _counting(
        self, row: list[int], step: Step, documents: Iterable[Document], on_reject: OnReject
    ) -> Iterator[Document]:
        def count_in() -> Iterator[Document]:
            for document in documents:
                row[0] += 1
                row[1] += len(document.text)
                yield document

        for document in step(count_in(), on_reject):
            row[2] += 1
            row[3] += len(document.text)
            yield document

    def reject(self, reject: Reject) -> None:
        """Count a reject under its step and reason, and perhaps keep it as a sample."""
        row = self.data["dropped"].setdefault(reject.step, {}).setdefault(reject.reason, [0, 0])
        row[0] += 1
        row[1] += len(reject.text)
        where = reject.id or (reject.path if reject.line is None else f"{reject.path}:{reject.line}")
        self.sample(reject.reason, where, reject.text)

    def sample(self, reason: str, where: str, text: str) -> None:
        """Offer a text as a sample: those with the smallest keyed hash of their place stay, in any order of offers."""
        key = hashlib.blake2b(f"{self.seed} {reason} {where}".encode("utf-8", "replace"), digest_size=8).hexdigest()
        rows = self.data["samples"].setdefault(reason, [])
        if len(rows) < SAMPLES or key < rows[-1][0]:
            bisect.insort(rows, [key, where, text[:EXCERPT]])
            del rows[SAMPLES:]

    def describe(self, when: str, document: Document, compression: float | None = None) -> None:
        """Enter a document in the groups and histograms of `before` or `after`."""
        size = len(document.text)
        for name in GROUPS:
            value = document.metadata.get(name, "unknown")
            row = self.data["groups"][when].setdefault(name, {}).setdefault(str(value), [0, 0])
            row[0] += 1
            row[1] += size
        self.measure(when, "characters", math.log10(max(size, 1)))
        if compression is not None:
            self.measure(when, "compression", compression)

    def measure(self, when: str, name: str, value: float) -> None:
        """Enter a value in a histogram; what lies outside counts at its edge."""
        low, high = SCALES[name]
        counts = self.data["histograms"][when].setdefault(name, [0] * BINS)
        counts[min(BINS - 1, max(0, int((value - low) / (high - low) * BINS)))] += 1

    def mask(self, counts: dict[str, int]) -> None:
        for kind, count in counts.items():
            self.data["masked"][kind] = self.data["masked"].get(kind, 0) + count

    def add(self, other: dict[str, Any]) -> None:
        """Add the `data` of another ledger."""
        samples = self.data.pop("samples")
        theirs = {key: value for key, value in other.items() if key != "samples"}
        self.data = {**_sum(self.data, theirs), "samples": samples}
        for reason, rows in other.get("samples", {}).items():
            mine = samples.setdefault(reason, [])
            mine[:] = sorted([*mine, *rows])[:SAMPLES]


def _sum(left: Any, right: Any) -> Any:
    """Numbers add, lists add place by place, dictionaries key by key; order is that of first appearance."""
    if isinstance(left, dict):
        return {key: _sum(left[key], right[key]) if key in left and key in right else left.get(key, right.get(key))
                for key in [*left, *(key for key in right if key not in left)]}  # fmt: skip
    if isinstance(left, list):
        return [_sum(a, b) for a, b in zip(left, right, strict=True)]
    return left + right
