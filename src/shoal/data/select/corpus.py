"""Documents as numbers: hashed words and pairs of words, a few measures, token ids; made once a shard, then mapped.

What every method of selection looks at. A document's bag holds its words and pairs of neighbouring words, hashed into
10 000 buckets, as DSIR has it (Xie et al. 2023, arXiv 2302.03169, §3). Words are runs of letters and digits or of
marks, in lower case.

Shapes: N documents, B buckets, F measures.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data import store, vocabulary
from shoal.data.clean import compression
from shoal.data.document import Document
from shoal.data.run import Machine, Stage, run_stage
from shoal.data.shards import token_dtype
from shoal.data.views import hash_words, ngram_hashes
from shoal.errors import FileError
from shoal.formats.atomic import atomic_file
from shoal.formats.hf_config import read_json
from shoal.formats.tokenizer import Tokenizer

BUCKETS = 10_000
MEASURES = ("log size", "compression", "characters a token", "digits", "marks", "log line length")
FOLDER, STAGE, VERSION = "selection", "corpus", "1"
COUNTED = 1 << 20  # characters of a document that are looked at
BATCH = 1 << 17  # characters tokenized at once
_WORD = re.compile(r"\w+|[^\w\s]+")
Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some documents in a row, as flat arrays; memory maps where they come from a folder.

    Attributes:
        starts_N: where each bag begins in `buckets`, and where the last one ends (N + 1 numbers).
        buckets, counts: which buckets a document fills, rising, and how often.
        ends_N: where each document's token ids end in `ids`.
        sizes_N: bytes of its UTF-8 text.
        measures_NF: `MEASURES`.
    """

    starts_N: Array
    buckets: Array
    counts: Array
    ends_N: Array
    ids: Array
    sizes_N: Array
    measures_NF: Array


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a row, in parts."""

    parts: tuple[Part, ...]

    @functools.cached_property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each document, its end token included."""
        return np.concatenate([np.diff(part.ends_N, prepend=0) for part in self.parts]).astype(np.int64)

    @functools.cached_property
    def sizes_N(self) -> NDArray[np.int64]:
        return np.concatenate([part.sizes_N for part in self.parts]).astype(np.int64)

    @functools.cached_property
    def measures_NF(self) -> NDArray[np.float32]:
        return np.concatenate([part.measures_NF for part in self.parts])

    @functools.cached_property
    def firsts(self) -> NDArray[np.int64]:
        """Number of the first document of each part, and of the end."""
        return np.cumsum([0, *(len(part.ends_N) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def ids(self, number: int) -> NDArray[np.int64]:
        """Token ids of a document."""
        at = int(np.searchsorted(self.firsts, number, side="right")) - 1
        part, inside = self.parts[at], number - int(self.firsts[at])
        start = int(part.ends_N[inside - 1]) if inside else 0
        return np.asarray(part.ids[start : int(part.ends_N[inside])], np.int64)

    def bags(self, numbers: Iterable[int]) -> Iterator[tuple[Array, Array]]:
        """Buckets and counts of some documents."""
        for number in numbers:
            at = int(np.searchsorted(self.firsts, number, side="right")) - 1
            part, inside = self.parts[at], number - int(self.firsts[at])
            span = slice(int(part.starts_N[inside]), int(part.starts_N[inside + 1]))
            yield part.buckets[span], part.counts[span]

    def totals(self, wanted_N: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Σ counts of each bucket over all documents, or over the wanted ones; [B]."""
        total = np.zeros(BUCKETS)
        for part, (first, stop) in zip(self.parts, self._spans(), strict=True):
            weights = part.counts
            if wanted_N is not None:
                weights = weights * np.repeat(wanted_N[first:stop], np.diff(part.starts_N))
            total += np.bincount(part.buckets, weights=weights, minlength=BUCKETS)
        return total

    def dot(self, weights_B: Array, *, log: bool = False) -> NDArray[np.float64]:
        """Σ count · weight of each document, or Σ log(1 + count) · weight; [N]."""
        found = []
        for part in self.parts:
            counts = np.log1p(part.counts) if log else part.counts.astype(np.float64)
            found.append(_sums(counts * weights_B[part.buckets], part.starts_N))
        return np.concatenate(found)

    def squares(self) -> NDArray[np.float64]:
        """Σ log(1 + count)² of each document; [N]."""
        return np.concatenate(
            [_sums(np.log1p(part.counts).astype(np.float64) ** 2, part.starts_N) for part in self.parts]
        )

    def _spans(self) -> Iterator[tuple[int, int]]:
        return zip(self.firsts[:-1].tolist(), self.firsts[1:].tolist(), strict=True)


@dataclass(frozen=True, kw_only=True)
class Pool(Corpus):
    """What a prepared folder holds.

    Attributes:
        alive_N: not dropped by another verdict.
        kinds_N, sources_N: of their metadata.
    """

    folder: Path
    alive_N: NDArray[np.bool_]
    kinds_N: NDArray[np.str_]
    sources_N: NDArray[np.str_]

    @property
    def tokens(self) -> int:
        """Of all documents alive."""
        return int(self.lengths_N[self.alive_N].sum())


def bag(text: str) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Buckets of a text's words and pairs of words, rising, and how many fall into each."""
    hashes = hash_words(_WORD.findall(text[:COUNTED].lower()))
    both = np.concatenate([hashes, ngram_hashes(hashes, 2)]) % np.uint64(BUCKETS)
    buckets, counts = np.unique(both, return_counts=True)
    return buckets.astype(np.uint16), counts.astype(np.float32)


def make_part(documents: Iterable[Document], tokenizer: Tokenizer) -> Part:
    """The numbers of some documents."""
    bags: list[tuple[Array, Array]] = []
    ids: list[Array] = []
    rows: list[tuple[int, tuple[float, ...]]] = []
    for batch in _batches(documents):
        for document, tokens in zip(batch, tokenizer.encode_batch([one.text for one in batch]), strict=True):
            ids.append(np.array([*tokens, *tokenizer.eos_token_ids[:1]], token_dtype(tokenizer.vocab_size)))
            bags.append(bag(document.text))
            rows.append((len(document.text.encode()), _measure(document.text, len(ids[-1]))))
    empty = np.empty(0, np.uint16)
    return Part(
        starts_N=np.cumsum([0, *(len(buckets) for buckets, _ in bags)]),
        buckets=np.concatenate([empty, *(buckets for buckets, _ in bags)]),
        counts=np.concatenate([np.empty(0, np.float32), *(counts for _, counts in bags)]),
        ends_N=np.cumsum([len(one) for one in ids]).astype(np.int64),
        ids=np.concatenate(ids) if ids else empty,
        sizes_N=np.array([size for size, _ in rows], np.int64),
        measures_NF=np.array([row for _, row in rows], np.float32).reshape(-1, len(MEASURES)),
    )


def open_pool(folder: Path, verdicts: Sequence[str], machine: Machine, progress: Any = None) -> Pool:
    """The numbers of a prepared folder, made shard by shard where they are not there yet.

    Args:
        verdicts: whose drops do not take part.

    Raises:
        FileError: the folder was not prepared, or holds no tokenizer.
    """
    home = folder / "tokenizer"
    shards = store.shard_numbers(folder)
    if not (home / "tokenizer.json").is_file():
        raise FileError(folder, "holds no tokenizer; prepare it with --tokenizer or --vocab-size")
    # Documents never change after the cleaning, whose key is in the recipe.
    cleaning = read_json(folder / "recipe.json")["key"]
    key = f"{VERSION} {vocabulary.digest(home)} {cleaning}"
    task = functools.partial(_write_part, folder)
    stage = Stage(folder=folder, name=STAGE, key=key, task=task, files=functools.partial(_files, folder))
    run_stage(stage, shards, machine, progress=progress)
    alive, kinds, sources = [], [], []
    for shard in shards:
        columns = [store.read_attributes(folder, name, shard)[f"{name}_reason"] for name in verdicts]
        meta = stage.ledger(shard) or {}
        kinds += meta["kinds"]
        sources += meta["sources"]
        alive += [all(one[i] is None for one in columns) for i in range(len(meta["kinds"]))]
    parts = tuple(_read_part(folder, shard) for shard in shards)
    return Pool(
        parts=parts, folder=folder, alive_N=np.array(alive, bool), kinds_N=np.array(kinds), sources_N=np.array(sources)
    )


def _write_part(folder: Path, shard: int) -> dict[str, Any]:
    tokenizer = vocabulary.load_tokenizer(str(folder / "tokenizer"))
    kinds: list[str] = []
    sources: list[str] = []

    def noted() -> Iterator[Document]:
        for document in store.read_shard(folder, shard):
            kinds.append(document.metadata.get("kind", "text"))
            sources.append(document.metadata.get("source", "unknown"))
            yield document

    part = make_part(noted(), tokenizer)
    for field, path in zip(fields(Part), _files(folder, shard), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as out:
            np.save(out, getattr(part, field.name))
    return {"kinds": kinds, "sources": sources}


def _read_part(folder: Path, shard: int) -> Part:
    arrays = {}
    for field, path in zip(fields(Part), _files(folder, shard), strict=True):
        try:
            arrays[field.name] = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise FileError(path, "is missing or damaged; remove the folder `selection` to make it anew") from error
    return Part(**arrays)


def _files(folder: Path, shard: int) -> list[Path]:
    return [folder / FOLDER / STAGE / f"{shard:05d}.{field.name.split('_')[0]}.npy" for field in fields(Part)]


def _sums(values: Array, starts_N: Array) -> NDArray[np.float64]:
    """Sum of each document's values; documents may be empty."""
    running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    sums: NDArray[np.float64] = running[starts_N[1:]] - running[starts_N[:-1]]
    return sums


def _measure(text: str, tokens: int) -> tuple[float, ...]:
    size = max(len(text), 1)
    piece = text[:COUNTED]
    return (
        float(np.log10(size)),
        compression(text),
        size / max(tokens, 1),
        sum(map(str.isdigit, piece)) / max(len(piece), 1),
        sum(not (char.isalnum() or char.isspace()) for char in piece) / max(len(piece), 1),
        float(np.log10(size / (text.count("\n") + 1) + 1)),
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
