"""Real English and code that every Python has, and ways to damage them."""

from __future__ import annotations

import random
import re
import sysconfig
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from shoal.data.document import Document

STDLIB = Path(sysconfig.get_path("stdlib"))


@cache
def english() -> tuple[str, ...]:
    """About 150 texts of 200 to 400 words from Python's language reference."""
    found = []
    for text in topics.values():
        words = re.sub(r"\*{2}|[`\"]", "", text).split()
        found += [" ".join(words[at : at + 300]) for at in range(0, len(words) - 200, 300)]
    return tuple(dict.fromkeys(found))


@cache
def code() -> dict[str, str]:
    """Some 100 modules of the standard library by name."""
    paths = sorted(p for p in STDLIB.glob("*.py") if 2000 < p.stat().st_size < 40_000)
    return {p.name: p.read_text() for p in paths}


def edited(text: str, share: float, rng: random.Random) -> str:
    """`text` with a share of its words replaced, in a few runs as an editor would."""
    words = text.split()
    left = round(share * len(words))
    while left > 0:
        run = min(left, rng.randint(2, 6))
        at = rng.randrange(len(words) - run)
        words[at : at + run] = [f"edit{rng.randrange(10**6)}" for _ in range(run)]
        left -= run
    return " ".join(words)


def document(text: str, kind: str = "text", **metadata: object) -> Document:
    return Document(id="d", text=text, metadata={"kind": kind, "path": "d", "source": "s", **metadata})
