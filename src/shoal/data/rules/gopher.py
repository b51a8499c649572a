"""Quality rules of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1), word by word."""

from __future__ import annotations

import re

import numpy as np

from shoal.data.document import Document, Rule
from shoal.data.views import lines, word_ids, words

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_LENGTH, MAX_MEAN_LENGTH = 3, 10
MAX_SYMBOLS = 0.1  # of hashes, or of ellipses, to words
MAX_BULLETS = 0.9  # of lines
MAX_ELLIPSES = 0.3  # of lines
MIN_ALPHABETIC = 0.8  # of words
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
MIN_STOP_WORDS = 2

_LETTER = re.compile(r"[^\W\d_]")


def word_count(document: Document) -> str | None:
    count = len(words(document))
    if count < MIN_WORDS:
        return f"gopher: fewer than {MIN_WORDS} words"
    return f"gopher: more than {MAX_WORDS} words" if count > MAX_WORDS else None


def word_length(document: Document) -> str | None:
    found = words(document)
    mean = sum(map(len, found)) / len(found) if found else 0
    if mean < MIN_MEAN_LENGTH:
        return f"gopher: mean word shorter than {MIN_MEAN_LENGTH}"
    return f"gopher: mean word longer than {MAX_MEAN_LENGTH}" if mean > MAX_MEAN_LENGTH else None


def symbols(document: Document) -> str | None:
    text, most = document.text, MAX_SYMBOLS * len(words(document))
    if text.count("#") > most:
        return "gopher: too many hashes"
    return "gopher: too many ellipses" if text.count("...") + text.count("…") > most else None


def bullets(document: Document) -> str | None:
    found = lines(document)
    count = sum(line.lstrip().startswith(("•", "-", "*")) for line in found)
    return "gopher: nearly all lines are bullets" if count > MAX_BULLETS * len(found) else None


def ellipses(document: Document) -> str | None:
    if "..." not in document.text and "…" not in document.text:
        return None
    found = lines(document)
    count = sum(line.rstrip().endswith(("...", "…")) for line in found)
    return "gopher: many lines end in an ellipsis" if count > MAX_ELLIPSES * len(found) else None


def alphabetic(document: Document) -> str | None:
    different, ids = word_ids(document)
    # isalpha() is quick and true of most words; the others are searched for one letter.
    lettered = np.array([word.isalpha() or _LETTER.search(word) is not None for word in different], bool)
    count = np.count_nonzero(lettered[ids])
    return "gopher: too few words with letters" if count < MIN_ALPHABETIC * len(ids) else None


def stop_words(document: Document) -> str | None:
    """English only: other languages are let through, as their own lists would be needed."""
    if document.metadata.get("language", "en") != "en":
        return None
    missing = len(STOP_WORDS.intersection(word_ids(document)[0])) < MIN_STOP_WORDS
    return f"gopher: fewer than {MIN_STOP_WORDS} of the common words" if missing else None


RULES: tuple[Rule, ...] = (word_count, word_length, symbols, bullets, ellipses, alphabetic, stop_words)
