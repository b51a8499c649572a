"""Repetition rules of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1).

The same measures as in other pipelines, found another way: a run of n words can only repeat where its first n - 1 words
repeat, so each n looks at what the one before has left, which is soon next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shoal.data.document import Document, Rule
from shoal.data.views import lines, word_ids

MAX_DUPLICATE_LINES = MAX_DUPLICATE_PARAGRAPHS = 0.3
MAX_DUPLICATE_LINE_CHARACTERS = MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.2
MAX_TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # characters within the most frequent run of n words
MAX_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # characters within any run met before

Ints = NDArray[np.int64]


def repeated_paragraphs(document: Document) -> str | None:
    # What two or more line ends part; of more than two, the others stand at the beginning of the next piece.
    pieces = [piece for one in document.text.strip().split("\n\n") if (piece := one.lstrip("\n"))]
    return _repeated(
        pieces, "paragraphs", len(document.text), MAX_DUPLICATE_PARAGRAPHS, MAX_DUPLICATE_PARAGRAPH_CHARACTERS
    )


def repeated_lines(document: Document) -> str | None:
    found = lines(document)
    pieces = [line for line in found if line]
    pieces += [""] * ((not found[0]) + (len(found) > 1 and not found[-1]))  # before a first line end, after a last one
    return _repeated(pieces, "lines", len(document.text), MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS)


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
    (different, ids), length = word_ids(document), len(document.text)
    if len(ids) < 2:
        return None
    ends = np.cumsum(np.fromiter(map(len, different), np.int64, len(different))[ids])
    for n, starts, runs in _repeats(ids, len(different)):
        if n in MAX_TOP and _top_characters(n, starts, runs, ends) > MAX_TOP[n] * length:
            return f"gopher: one run of {n} words is too frequent"
        if n in MAX_REPEATED and _repeated_characters(n, starts, runs, ends, MAX_REPEATED[n] * length):
            return f"gopher: repeated runs of {n} words"
    return None


def _repeats(ids: Ints, different: int) -> Iterator[tuple[int, Ints, Ints]]:
    """(n, starts, runs) for n from 2 to 10: where each run of n words that stands more than once starts, in order, and
    which run it is. Ends early once there is none.

    Args:
        ids: which of the `different` words stands at each place.
    """
    starts, runs = np.arange(len(ids)), ids
    for n in range(2, 11):
        inside = starts + n <= len(ids)
        starts = starts[inside]
        keys = runs[inside] * different + ids[starts + n - 1]
        ordered = np.sort(keys)
        again = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(again):
            return
        repeated = again[np.concatenate([[True], again[1:] != again[:-1]])]
        runs = np.minimum(np.searchsorted(repeated, keys), len(repeated) - 1)
        here = repeated[runs] == keys
        starts, runs = starts[here], runs[here]
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
