"""Ways to look at a text that several rules share, each made once and forgotten when the text changes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.document import Document

_WORD = re.compile(r"\w+")


def rewrite(document: Document, text: str) -> None:
    """Give a document a new text."""
    if text != document.text:
        document.text = text
        document.views.clear()


def words(document: Document) -> list[str]:
    """What stands between white space: the words of Gopher's and C4's rules."""
    found = document.views.get("words")
    if found is None:
        found = document.views["words"] = document.text.split()
    return found


def word_ids(document: Document) -> tuple[list[str], NDArray[np.int64]]:
    """The different words in the order of their first places, and which of them each of `words` is."""
    found = document.views.get("word_ids")
    if found is None:
        found = document.views["word_ids"] = numbered(words(document))
    return found


def numbered(found: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The different ones of some strings in the order of their first places, and which of them each is."""
    different = list(dict.fromkeys(found))
    numbers = dict(zip(different, range(len(different)), strict=True))
    return different, np.fromiter(map(numbers.__getitem__, found), np.int64, len(found))


def lines(document: Document) -> list[str]:
    """Lines without their ends, empty ones too."""
    found = document.views.get("lines")
    if found is None:
        found = document.views["lines"] = document.text.split("\n")
    return found


def tokens(document: Document) -> list[str]:
    """Runs of letters, digits and underscores in lower case: what near duplicates and contamination are judged by."""
    found = document.views.get("tokens")
    if found is None:
        found = document.views["tokens"] = _WORD.findall(document.text.lower())
    return found


def token_hashes(document: Document) -> NDArray[np.uint64]:
    """A 64-bit hash of each of `tokens`."""
    found = document.views.get("token_hashes")
    if found is None:
        found = document.views["token_hashes"] = hash_words(tokens(document))
    return found


def hash_words(found: list[str]) -> NDArray[np.uint64]:
    """64-bit hashes of words, the same in every process and on every machine."""
    different, ids = numbered(found)
    [hashes] = rensa().RMinHash.hash_token_sets([different])
    return np.array(hashes, np.uint64)[ids]


def ngram_hashes(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hash of every run of n words: a polynomial in their hashes, modulo 2**64."""
    if len(hashes) < n:
        return np.empty(0, np.uint64)
    total: NDArray[np.uint64] = hashes[: len(hashes) - n + 1].copy()
    for k in range(1, n):
        total *= np.uint64(0x9E3779B97F4A7C15)
        total += hashes[k : len(hashes) - n + 1 + k]
    return total


def rensa() -> Any:
    """The module `rensa`, or MissingExtraError."""
    from shoal.errors import MissingExtraError

    try:
        import rensa as library
    except ImportError as error:
        raise MissingExtraError("data", "finding duplicates") from error
    return library
