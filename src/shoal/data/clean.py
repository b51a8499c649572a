"""One shard from raw files to clean documents: a pure function of the plan, the recipe and the shard's number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.data import signatures, store
from shoal.data.document import Document, Reject
from shoal.data.ledger import Ledger
from shoal.data.plan import Part
from shoal.data.read import read_part
from shoal.data.recipe import Recipe
from shoal.data.steps import Steps, standard_steps
from shoal.data.streams import arrow

STAGE = "clean"
ATTRIBUTES = "measures"
MEASURES = ("characters", "compression", "masked", "kind")
COMPRESSED = 1 << 20  # characters of a document whose compressibility is measured


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What every shard of a run shares."""

    folder: Path
    recipe: Recipe
    shards: tuple[tuple[Part, ...], ...]
    steps: Steps = standard_steps


def clean_shard(job: Cleaning, shard: int) -> dict[str, Any]:
    """Read, clean, measure and sign one shard: `documents/`, `attributes/measures/`, `signatures/`, `rejects/`.

    Returns:
        the shard's ledger. The same files byte for byte, whoever runs it and however often.
    """
    recipe, ledger = job.recipe, Ledger(seed=job.recipe.seed)
    signer = signatures.Signer(recipe.seed)
    measured: list[tuple[int, float, int, str]] = []
    with contextlib.ExitStack() as files:
        write = files.enter_context(store.document_writer(job.folder, shard))
        on_reject = _rejects(job, shard, ledger, files)
        documents = _described(_read(job.shards[shard], recipe, on_reject), ledger)
        documents = ledger.counted("read", lambda found, _: iter(found), documents, on_reject)
        for name, step in job.steps(recipe):
            documents = ledger.counted(name, step, documents, on_reject)
        for document in documents:
            ratio = _compression(document)
            masked = document.attributes.get("masked", {})
            ledger.describe("after", document, ratio)
            ledger.mask(masked)
            ledger.sample("kept", document.id, document.text)
            signer.add(document)
            write(document)
            measured.append((len(document.text), ratio, sum(masked.values()), document.metadata["kind"]))
    columns = {name: [row[at] for row in measured] for at, name in enumerate(MEASURES)}
    store.write_attributes(job.folder, ATTRIBUTES, shard, columns)
    signatures.save(signature_path(job.folder, shard), signer.finish())
    return ledger.data


def files(folder: Path, shard: int) -> list[Path]:
    """What `clean_shard` always leaves."""
    return [
        store.document_path(folder, shard), store.attribute_path(folder, ATTRIBUTES, shard),
        signature_path(folder, shard),
    ]  # fmt: skip


def signature_path(folder: Path, shard: int) -> Path:
    return folder / "signatures" / f"{shard:05d}.npy"


def compression(text: str) -> float:
    """Size of the text after zstd to its size before: near 0 for repetition, towards 1 for noise."""
    if not text:
        return 0.0
    content = text[:COMPRESSED].encode()
    return len(_codec().compress(content, asbytes=True)) / len(content)


def _compression(document: Document) -> float:
    """Of a text that no step has changed, the same before and after: measured once."""
    found = document.views.get("compression")
    if found is None:
        found = document.views["compression"] = compression(document.text)
    return float(found)


def _codec() -> Any:
    return arrow().Codec("zstd", compression_level=3)


def _read(parts: Iterable[Part], recipe: Recipe, on_reject: Callable[[Reject], None]) -> Iterator[Document]:
    for part in parts:
        yield from read_part(part, recipe.read_options, on_reject)


def _described(documents: Iterable[Document], ledger: Ledger) -> Iterator[Document]:
    for document in documents:
        ledger.describe("before", document, _compression(document))
        yield document


def _rejects(job: Cleaning, shard: int, ledger: Ledger, files: contextlib.ExitStack) -> Callable[[Reject], None]:
    """Count rejects, and write them down if the recipe says so; what could not be read is always written down."""
    path = job.folder / "rejects" / f"{shard:05d}{store.SUFFIX}"
    out: list[Callable[[Any], None]] = []

    def on_reject(reject: Reject) -> None:
        ledger.reject(reject)
        if job.recipe.keep_rejects or reject.step == "read":
            if not out:
                out.append(files.enter_context(store.line_writer(path)))
            out[0](asdict(reject))

    path.unlink(missing_ok=True)
    return on_reject
