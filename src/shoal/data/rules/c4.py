"""Document rules of C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2), for web pages.

C4 also deletes lines; here a document that would lose most of them goes as a whole, and others stay as they are.
"""

from __future__ import annotations

import re

from shoal.data.document import Document, Rule
from shoal.data.views import lines

MIN_SENTENCES = 5
MIN_WORDS_A_LINE = 3
MIN_GOOD_LINES = 0.5  # of characters
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?:\s|$)")


def lorem_ipsum(document: Document) -> str | None:
    return "c4: lorem ipsum" if "lorem ipsum" in document.text.lower() else None


def curly_bracket(document: Document) -> str | None:
    return "c4: a curly bracket" if "{" in document.text else None


def sentences(document: Document) -> str | None:
    few = len(_SENTENCE_END.findall(document.text)) < MIN_SENTENCES
    return f"c4: fewer than {MIN_SENTENCES} sentences" if few else None


def good_lines(document: Document) -> str | None:
    """Lines that end like sentences, have some words, and speak neither of JavaScript nor of cookies."""
    good = total = 0
    for line in lines(document):
        total += len(line)
        good += len(line) if _is_good(line.strip()) else 0
    return "c4: most lines are no sentences" if good < MIN_GOOD_LINES * total else None


def _is_good(line: str) -> bool:
    if not line.endswith((".", "?", "!", '"', "'")) or line.endswith("..."):
        return False
    lower = line.lower()
    return len(line.split()) >= MIN_WORDS_A_LINE and "javascript" not in lower and not any(p in lower for p in POLICY)


RULES: tuple[Rule, ...] = (lorem_ipsum, curly_bracket, sentences, good_lines)
