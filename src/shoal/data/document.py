"""A document, and the three words the data room speaks in: a step, a rule, a reject."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Document:
    """One text and where it came from.

    Attributes:
        id: the row's own `id`, else `source/path` (`:line` for a row), the same in every run over the same input.
        text: what a model will read; steps may rewrite it.
        metadata: provenance, which travels with the text: `source`, `version`, `licence` (SPDX), `path`, `line`, `hash`
            (of the text as it was read), `kind` (`text` or `code`), `language`; a row's other columns under `row`.
        attributes: what was found out about it; stored beside the data, never in it (`shoal.data.store`).
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    views: dict[str, Any] = field(
        default_factory=dict, repr=False, compare=False
    )  # of the text, kept by shoal.data.views


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A document or row that goes no further: which step let it go, why, and where it stood."""

    step: str
    reason: str
    path: str
    line: int | None = None  # 1-based, of a row's file
    id: str | None = None
    text: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


# A step is a generator over documents; it tells `on_reject` about every document that it does not pass on.
OnReject = Callable[[Reject], None]
Step = Callable[[Iterable[Document], OnReject], Iterator[Document]]
# A rule says None to keep a document, or the reason to drop it: a few words, the same for every document it fits.
Rule = Callable[[Document], str | None]


def rejected(document: Document, step: str, reason: str) -> Reject:
    """The reject that `document` becomes."""
    meta = document.metadata
    return Reject(
        step=step, reason=reason, path=meta.get("path", ""), line=meta.get("line"), id=document.id, text=document.text,
        metadata=meta,
    )  # fmt: skip


def text_hash(text: str) -> str:
    """128 bits of BLAKE2b over the UTF-8 text, in hexadecimal: a document's fingerprint."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
