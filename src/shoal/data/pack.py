"""Kept documents to packed tokens: each shard by itself, then one after another into the folder that training reads."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data import store, vocabulary
from shoal.data.document import Document, rejected
from shoal.data.ledger import Ledger
from shoal.data.shards import INDEX, ShardWriter, open_shards
from shoal.formats.atomic import atomic_folder
from shoal.formats.tokenizer import Tokenizer

STAGE = "pack"
BATCH = 1 << 17  # characters tokenized at once
COST = 640  # bytes that a character costs the library while it is tokenized, at most: measured 160 to 530


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What every shard of a packing shares.

    Attributes:
        tokenizer: folder with `tokenizer.json`; None counts documents and packs nothing.
        verdicts: attribute files whose reasons drop documents, in order.
    """

    folder: Path
    tokenizer: Path | None
    verdicts: tuple[str, ...]
    seed: int


def pack_shard(job: Packing, shard: int) -> dict[str, Any]:
    """Count what every verdict drops and pack the rest into `tokens.parts/`. Returns the ledger, with `tokens`."""
    ledger = Ledger(seed=job.seed)
    kept = _kept(job, shard, ledger)
    ledger.data["tokens"] = 0
    if job.tokenizer is None:
        for _ in kept:
            pass
        return ledger.data
    digest = vocabulary.digest(job.tokenizer)
    tokenizer = _load(job.tokenizer, digest)
    parts = _part(job.folder, shard)
    shutil.rmtree(parts, ignore_errors=True)
    with ShardWriter(parts, vocab_size=tokenizer.vocab_size, tokenizer_digest=digest) as writer:
        for ids in _tokenized(kept, tokenizer):
            writer.add(ids)
            ledger.data["tokens"] += len(ids)
    return ledger.data


def largest_cost(job: Packing, shards: list[int]) -> int:
    """Bytes that the largest document may take to be tokenized."""
    if job.tokenizer is None:
        return 0
    sizes = (store.read_attributes(job.folder, "measures", shard)["characters"] for shard in shards)
    return COST * max((max(one, default=0) for one in sizes), default=0)


def join_parts(job: Packing, shards: list[int], provenance: dict[str, Any]) -> int:
    """Write `tokens/` from the parts of all shards, in order. Returns the number of tokens."""
    assert job.tokenizer is not None
    target = job.folder / "tokens"
    shutil.rmtree(target, ignore_errors=True)
    total = 0
    vocab_size = open_shards(_part(job.folder, shards[0])).vocab_size
    with ShardWriter(
        target, vocab_size=vocab_size, tokenizer_digest=vocabulary.digest(job.tokenizer), provenance=provenance
    ) as writer:
        for shard in shards:
            part = open_shards(_part(job.folder, shard))
            at = 0
            while at < part.num_tokens:
                end = part.document_end(at)
                writer.add(part.read(at, end)[0])
                total, at = total + end - at, end
    return total


def files(folder: Path, shard: int) -> list[Path]:
    """What `pack_shard` leaves, until everything is joined."""
    joined = folder / "tokens" / INDEX
    return [joined if joined.exists() else _part(folder, shard) / INDEX]


def remove_parts(folder: Path) -> None:
    """Once they are joined and that is written down, so that an interruption between costs nothing."""
    shutil.rmtree(folder / "tokens.parts", ignore_errors=True)


def verdicts_digest(folder: Path, names: tuple[str, ...]) -> str:
    """Changes with any reason in any of the named attribute files."""
    found = hashlib.blake2b(digest_size=8)
    for name in names:
        for shard in store.shard_numbers(folder):
            found.update(store.attribute_path(folder, name, shard).read_bytes())
    return found.hexdigest()


def keep_tokenizer(folder: Path, name: str) -> Path:
    """Copy a tokenizer to `folder/tokenizer`, so that the tokens can be read for as long as they exist."""
    target = folder / "tokenizer"
    tokenizer = vocabulary.load_tokenizer(name)
    shutil.rmtree(target, ignore_errors=True)
    with atomic_folder(target) as temporary:
        tokenizer.save(temporary)
    return target


@functools.lru_cache(maxsize=1)
def _load(folder: Path, digest: str) -> Tokenizer:
    """Once a process; the digest tells apart what was trained anew in the same place."""
    return vocabulary.load_tokenizer(str(folder))


def _part(folder: Path, shard: int) -> Path:
    return folder / "tokens.parts" / f"{shard:05d}"


def _kept(job: Packing, shard: int, ledger: Ledger) -> Iterator[Document]:
    for name in job.verdicts:
        ledger.data["steps"][name] = [0, 0, 0, 0]
    for document in store.read_shard(job.folder, shard, [*job.verdicts, "measures"]):
        size = len(document.text)
        for name in job.verdicts:
            row = ledger.data["steps"][name]
            row[0] += 1
            row[1] += size
            reason = document.attributes[f"{name}_reason"]
            if reason is not None:
                ledger.reject(rejected(document, name, reason))
                break
            row[2] += 1
            row[3] += size
        else:
            ledger.describe("after", document, document.attributes["compression"])
            ledger.sample("kept", document.id, document.text)
            yield document


def _tokenized(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    end = tokenizer.eos_token_ids[:1]
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH:
            yield from _encode(batch, tokenizer, list(end))
            batch, size = [], 0
    yield from _encode(batch, tokenizer, list(end))


def _encode(batch: list[str], tokenizer: Tokenizer, end: list[int]) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    for ids in tokenizer.encode_batch(batch):
        yield np.array(ids + end, np.int64)
