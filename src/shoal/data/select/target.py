"""The sample of the domain that is wanted: read, parted in two, and kept apart from what the result is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.data.contamination import contaminated, fingerprints
from shoal.data.document import Document, text_hash
from shoal.data.normalise import normalise
from shoal.data.read import ReadOptions, read_documents
from shoal.errors import ConfigError, FileError

LEAST = 4  # documents of a sample


@dataclass(frozen=True, kw_only=True)
class Target:
    """A sample of the domain in two halves that share no document.

    Attributes:
        learn: what the methods compare with.
        judge: what proxies' losses are measured on, and nothing else.
        overlap: names of documents left out because the held-out set holds them too.
    """

    learn: list[Document]
    judge: list[Document]
    overlap: tuple[str, ...] = ()


def read_texts(paths: Sequence[Path], text_field: str = "text") -> list[Document]:
    """Documents of files and folders, normalised as a run normalises them, exact copies once.

    Raises:
        FileError: a file is missing, unreadable or holds no text.
    """
    options = ReadOptions(text_field=text_field)
    found: dict[str, Document] = {}
    for path in paths:
        before = len(found)
        for document in read_documents(path, options):
            document.text = normalise(document.text, document.metadata["kind"])
            if document.text.strip():
                found.setdefault(text_hash(document.text), document)
        if len(found) == before:
            raise FileError(path, "holds no text that was not read already")
    return list(found.values())


def read_target(
    paths: Sequence[Path],
    held_out: Sequence[Document] = (),
    *,
    seed: int = 0,
    drop_overlap: bool = False,
    text_field: str = "text",
) -> Target:
    """Read a sample and part it by the hash of each text.

    Args:
        held_out: documents that the result will be judged by; no document of the sample may hold a piece of them.
        drop_overlap: leave such documents out instead of refusing.

    Raises:
        ConfigError: the sample is too small, or shares text with the held-out set.
    """
    documents = read_texts(paths, text_field)
    wrong = overlaps(documents, held_out) if held_out else {}
    if wrong and not drop_overlap:
        number, reason = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ConfigError("target", f"{documents[number].id}{more} of the sample overlap the held-out set ({reason})")
    left_out = tuple(documents[number].id for number in wrong)
    documents = [one for number, one in enumerate(documents) if number not in wrong]
    if len(documents) < LEAST:
        raise ConfigError("target", f"must hold at least {LEAST} documents, got {len(documents)}")
    order = sorted(documents, key=lambda one: hashlib.blake2b(f"{seed} {text_hash(one.text)}".encode()).digest())
    half = len(order) // 2
    return Target(learn=order[half:], judge=order[:half], overlap=left_out)


def overlaps(documents: Iterable[Document], held_out: Sequence[Document]) -> dict[int, str]:
    """Which documents hold a piece of the held-out ones, by place, and how that shows.

    An equal text, or what `shoal.data.contamination` finds: 13 words in a row, or most telling lines of code.
    """
    known = {text_hash(one.text) for one in held_out}
    evaluations = fingerprints([one.text] for one in held_out)
    found = {}
    for number, document in enumerate(documents):
        reason = "the same text" if text_hash(document.text) in known else contaminated(document, evaluations)
        if reason is not None:
            found[number] = reason
    return found
