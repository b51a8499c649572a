"""Repetition rules of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1).

The same measures as in other pipelines, found another way: a run of n words can only repeat where its first n - 1 words
repeat, so each n looks at what the one before has left, which is soon next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shoal.data.document import Document, Rule
from shoal.data.views import words

MAX_DUPLICATE_LINES = MAX_DUPLICATE_PARAGRAPHS = 0.3
MAX_DUPLICATE_LINE_CHARACTERS = MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.2
MAX_TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # characters within the most frequent run of n words
MAX_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # characters within any run met before

_PARAGRAPH, _LINE = re.compile(r"\n{2,}"), re.compile(r"\n+")
Ints = NDArray[np.int64]


def repeated_paragraphs(document: Document) -> str | None:
    return _repeated(
        _PARAGRAPH.split(document.text.strip()), "paragraphs", len(document.text), MAX_DUPLICATE_PARAGRAPHS,
        MAX_DUPLICATE_PARAGRAPH_CHARACTERS,
    )  # fmt: skip


def repeated_lines(document: Document) -> str | None:
    return _repeated(
        _LINE.split(document.text), "lines", len(document.text), MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS
    )


def _repeated(pieces: list[str], what: str, length: int, most: float, most_characters: float) -> str | None:
    seen = set(pieces)
    if len(seen) == len(pieces):
        return None
    if len(pieces) - len(seen) > most * len(pieces):
        return f"gopher: repeated {what}"
    characters = sum(map(len, pieces)) - sum(map(len, seen))
    return f"gopher: characters in repeated {what}" if characters > most_characters * length else None


def repeated_words(document: Document) -> str | None:
    """The most frequent run of 2, 3, 4 words, and all runs of 5 to 10 words that stand more than once."""
    found, length = words(document), len(document.text)
    if len(found) < 2:
        return None
    ends = np.cumsum(np.fromiter(map(len, found), np.int64, len(found)))
    for n, starts, runs in _repeats(found):
        if n in MAX_TOP and _top_characters(n, starts, runs, ends) > MAX_TOP[n] * length:
            return f"gopher: one run of {n} words is too frequent"
        if n in MAX_REPEATED and _repeated_characters(n, starts, runs, ends, MAX_REPEATED[n] * length):
            return f"gopher: repeated runs of {n} words"
    return None


def _repeats(found: list[str]) -> Iterator[tuple[int, Ints, Ints]]:
    """(n, starts, runs) for n from 2 to 10: where each run of n words that stands more than once starts, in order, and
    which run it is. Ends early once there is none."""
    vocabulary: dict[str, int] = {}
    ids = np.fromiter((vocabulary.setdefault(word, len(vocabulary)) for word in found), np.int64, len(found))
    starts, runs = np.arange(len(ids)), ids
    for n in range(2, 11):
        inside = starts + n <= len(ids)
        starts = starts[inside]
        keys = runs[inside] * len(vocabulary) + ids[starts + n - 1]
        _, runs, counts = np.unique(keys, return_inverse=True, return_counts=True)
        again = counts[runs] > 1
        starts, runs = starts[again], runs[again]
        if not len(starts):
            return
        yield n, starts, runs


def _characters(n: int, starts: Ints, ends: Ints) -> Ints:
    """Letters of n words from each start, without the blanks between them."""
    before = np.where(starts > 0, ends[starts - 1], 0)
    return np.asarray(ends[starts + n - 1] - before)


def _top_characters(n: int, starts: Ints, runs: Ints, ends: Ints) -> int:
    counts = np.bincount(runs)
    first = int(starts[np.argmax(counts[runs])])  # of equally frequent runs, the one that stands first
    return int(counts.max()) * (int(_characters(n, np.array([first]), ends)[0]) + n - 1)


def _repeated_characters(n: int, starts: Ints, runs: Ints, ends: Ints, most: float) -> bool:
    """Whether runs met before hold more than `most` characters; from left to right, none counted twice."""
    sizes = _characters(n, starts, ends)
    if sizes.sum() <= most:
        return False
    seen: set[int] = set()
    total = free = 0
    for start, run, size in zip(starts.tolist(), runs.tolist(), sizes.tolist(), strict=True):
        if start < free:
            continue
        if run in seen:
            total, free = total + size, start + n
        else:
            seen.add(run)
    return total > most


RULES: tuple[Rule, ...] = (repeated_paragraphs, repeated_lines, repeated_words)
