"""Documents that hold pieces of evaluation sets.

Text: any run of 13 words shared with an evaluation item, as GPT-3 did (Brown et al. 2020, arXiv 2005.14165, app. C);
an item of 8 to 12 words is looked for as a whole, a shorter one not at all. Code: most of the telling lines of an item,
as runs of words in code are common property.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.document import Document
from shoal.data.normalise import normalise
from shoal.data.plan import find_parts
from shoal.data.read import ReadOptions, has_rows, read_part, read_rows
from shoal.data.views import hash_words, lines, ngram_hashes, token_hashes, tokens
from shoal.errors import FileError

RUN, MIN_RUN = 13, 8  # words
MIN_LINE = 12  # characters of a line that tells something
MIN_LINES = 3  # telling lines of an item that is looked for in code
MOST_LINES = 0.6  # of them, in one document
COMMENTS = ("#", "//", "/*", "*", "--")


@dataclass(frozen=True)
class Evaluations:
    """What to look for: sorted hashes of runs of n words by n, and which items each telling line of code belongs to."""

    runs: dict[int, NDArray[np.uint64]]
    lines: dict[str, list[int]] = field(repr=False)
    telling: list[int]  # lines that item i has
    items: int


@functools.lru_cache(maxsize=4)
def load_evaluations(paths: tuple[Path, ...]) -> Evaluations:
    """Fingerprints of evaluation sets: every string of every row of JSON lines or Parquet, or whole text files.

    Raises:
        FileError: a file is missing, damaged, or holds nothing to look for.
    """

    def items() -> Iterator[list[str]]:
        for path in paths:
            item = None
            for item in _items(path):
                yield item
            if item is None:
                raise FileError(path, "holds no evaluation items")

    return fingerprints(items())


def fingerprints(evaluation: Iterable[list[str]]) -> Evaluations:
    """Fingerprints of evaluation items, each the texts that it consists of."""
    runs: dict[int, list[NDArray[np.uint64]]] = {}
    by_line: dict[str, list[int]] = {}
    telling: list[int] = []
    items = 0
    for strings in evaluation:
        items += 1
        for text in strings:
            hashes = hash_words(tokens(Document(id="", text=normalise(text, "text"))))  # as documents are
            if len(hashes) >= MIN_RUN:
                n = min(RUN, len(hashes))
                runs.setdefault(n, []).append(ngram_hashes(hashes, n))
        found = {line for text in strings for line in _telling_lines(normalise(text, "code"))}
        if len(found) >= MIN_LINES:
            for line in found:
                by_line.setdefault(line, []).append(len(telling))
            telling.append(len(found))
    return Evaluations(
        {n: np.unique(np.concatenate(found)) for n, found in sorted(runs.items())}, by_line, telling, items
    )


def contaminated(document: Document, evaluations: Evaluations) -> str | None:
    """The reason to drop a document that holds a piece of an evaluation item, or None."""
    if document.metadata.get("kind") == "code":
        hits: Counter[int] = Counter()
        for line in {line.strip() for line in lines(document)} & evaluations.lines.keys():
            hits.update(evaluations.lines[line])
        found = any(count >= max(MIN_LINES, MOST_LINES * evaluations.telling[item]) for item, count in hits.items())
        return "contaminated: lines of an evaluation item" if found else None
    for n, known in evaluations.runs.items():
        hashes = ngram_hashes(token_hashes(document), n)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        if (known[places] == hashes).any():
            return f"contaminated: {n} words of an evaluation item"
    return None


def _telling_lines(text: str) -> Iterator[str]:
    """Lines with something of their own: not imports, closing brackets or a bare `return result`, and no comments, as
    the heads of whole projects' files are one licence."""
    for line in map(str.strip, text.split("\n")):
        if len(line) >= MIN_LINE and not line.startswith(("import ", "from ", *COMMENTS)):
            yield line


def _items(path: Path) -> Iterator[list[str]]:
    options = ReadOptions(strict=True)
    for part in find_parts(path):
        if not has_rows(part.path.name):
            yield from ([document.text] for document in read_part(part, options, lambda _: None))
            continue
        for _, row in read_rows(part, options, functools.partial(_refuse, part.path)):
            yield list(_strings(row))


def _refuse(path: Path, line: int | None, reason: str, _: bytes | str = "") -> None:
    raise FileError(path, reason, item=None if line is None else f"line {line}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
