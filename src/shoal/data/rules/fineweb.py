"""Rules found by FineWeb (Penedo et al. 2024, arXiv 2406.17557, section 3.6), for web pages."""

from __future__ import annotations

from shoal.data.document import Document, Rule
from shoal.data.views import lines, words

MIN_PUNCTUATED = 0.12  # of lines
SHORT, MAX_SHORT = 30, 0.67  # characters of a short line; share of lines
MAX_DUPLICATE_CHARACTERS = 0.01  # in repeated lines
MAX_NEWLINES = 0.3  # to words
TERMINAL = (".", "!", "?", "…", "。", "！", "？", "।", "۔", "؟", '"', "'", "”", "’", "»")


def punctuated_lines(document: Document) -> str | None:
    found = _full(document)
    ended = sum(line.endswith(TERMINAL) for line in found)
    return "fineweb: few lines end with punctuation" if ended < MIN_PUNCTUATED * len(found) else None


def short_lines(document: Document) -> str | None:
    found = _full(document)
    short = sum(len(line) <= SHORT for line in found)
    return "fineweb: most lines are short" if short > MAX_SHORT * len(found) else None


def duplicate_characters(document: Document) -> str | None:
    found = _full(document)
    twice = sum(map(len, found)) - sum(map(len, set(found)))
    length = len(document.text) - document.text.count("\n")
    return "fineweb: characters in repeated lines" if twice > MAX_DUPLICATE_CHARACTERS * length else None


def newlines(document: Document) -> str | None:
    many = document.text.count("\n") > MAX_NEWLINES * len(words(document))
    return "fineweb: a list rather than text" if many else None


def _full(document: Document) -> list[str]:
    return [line for line in lines(document) if line.strip()]


RULES: tuple[Rule, ...] = (punctuated_lines, short_lines, duplicate_characters, newlines)
