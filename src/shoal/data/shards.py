"""Packed token shards: documents one after another as plain numbers in a few large files, read through memory maps.

A folder holds `index.json` and, for each shard, two raw little-endian files: `shard-00000.tokens` (uint16, or uint32
for vocabularies past 65536) and `shard-00000.ends` (uint64: how many of the shard's tokens precede the end of each
document). The index is written last, so a folder without one was never finished. A document never spans two shards.
Everything the index says is checked against the files before a token is read, and every token id when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, FileError
from shoal.formats.atomic import atomic_file, require_empty
from shoal.formats.digest import file_digest

FORMAT, VERSION = "shoal-shards", 1
INDEX = "index.json"
SHARD_TOKENS = 64 << 20  # a shard is closed once it holds this many
MAX_VOCAB = 1 << 32
MAX_INDEX_BYTES = 64 << 20
MAX_TOKENS = 1 << 62
HASH_BYTES = 1 << 24
ENDS = np.dtype("<u8")
_NAME = re.compile(r"shard-[0-9]{5}")
_LEFTOVER = re.compile(r"\.?shard-[0-9]{5}\.(tokens|ends)(\.[0-9a-f]{8}\.partial)?")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Tokens = NDArray[np.int64]
Progress = Callable[[int, int], None]


class ShardInfo(NamedTuple):
    """What the index says about one shard; digests are SHA-256 of the whole file, in hexadecimal."""

    name: str
    tokens: int
    documents: int
    tokens_sha256: str
    ends_sha256: str


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How token ids of this vocabulary are stored."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes a folder of shards; leave the `with` block well, or call `close`, and it is complete.

    Args:
        folder: free, empty, or what an interrupted writer left behind.
        vocab_size: every token id must be smaller.
        tokenizer_digest: SHA-256 of `tokenizer.json`, in hexadecimal; readers compare it.
        provenance: where the text came from: sources, licences, seed. Kept as it is.
        shard_tokens: a shard is closed once it holds as many.

    Raises:
        FileError: the folder holds something else, or the disk refuses.
        ConfigError: an argument or a document is impossible.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocab_size: int,
        tokenizer_digest: str,
        provenance: Mapping[str, Any] | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        if not 1 <= vocab_size <= MAX_VOCAB:
            raise ConfigError("vocab_size", f"must lie between 1 and {MAX_VOCAB}, got {vocab_size}")
        if not _DIGEST.fullmatch(tokenizer_digest):
            raise ConfigError("tokenizer_digest", f"must be 64 hexadecimal digits, got {tokenizer_digest!r}")
        if shard_tokens < 1:
            raise ConfigError("shard_tokens", f"must be at least 1, got {shard_tokens}")
        self.folder = Path(folder)
        self.vocab_size = vocab_size
        self._head = {"tokenizer_digest": tokenizer_digest, "provenance": dict(provenance or {})}
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = shard_tokens
        self._shards: list[ShardInfo] = []
        self._ends: list[int] = []
        self._open: contextlib.ExitStack | None = None
        _clear_leftovers(self.folder)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close()
        elif self._open is not None:
            self._open.__exit__(kind, error, trace)  # drops the shard at hand

    def add(self, tokens: NDArray[np.integer[Any]] | list[int]) -> None:
        """Append one document, with whatever token ends it. An empty document is left out."""
        array = np.asarray(tokens)
        if array.size == 0:
            return
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ConfigError("tokens", f"must be a row of whole numbers, got {array.dtype} {list(array.shape)}")
        if array.min() < 0 or array.max() >= self.vocab_size:
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise ConfigError("tokens", f"{wrong} is no id of a vocabulary of {self.vocab_size}")
        if self._open is None:
            self._start()
        data = array.astype(self._dtype).tobytes()
        self._write(data)
        self._ends.append((self._ends[-1] if self._ends else 0) + array.size)
        if self._ends[-1] >= self._shard_tokens:
            self._finish()

    def close(self) -> None:
        """Finish the last shard and write the index."""
        if self._open is not None:
            self._finish()
        index = {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": self.vocab_size,
            "dtype": self._dtype.name,
            "num_tokens": sum(shard.tokens for shard in self._shards),
            "num_documents": sum(shard.documents for shard in self._shards),
            **self._head,
            "shards": [shard._asdict() for shard in self._shards],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / INDEX) as out:
            out.write(json.dumps(index, indent=2, ensure_ascii=False).encode("utf-8") + b"\n")

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._name = f"shard-{len(self._shards):05d}"
        self._hash = hashlib.sha256()
        self._open = contextlib.ExitStack()
        self._file: IO[bytes] = self._open.enter_context(atomic_file(self.folder / f"{self._name}.tokens"))

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise FileError(self.folder / f"{self._name}.tokens", f"cannot be written: {error.strerror}") from error
        self._hash.update(data)

    def _finish(self) -> None:
        assert self._open is not None
        stack, self._open = self._open, None
        stack.close()
        ends = np.asarray(self._ends, ENDS).tobytes()
        with atomic_file(self.folder / f"{self._name}.ends") as out:
            out.write(ends)
        digests = self._hash.hexdigest(), hashlib.sha256(ends).hexdigest()
        self._shards.append(ShardInfo(self._name, self._ends[-1], len(self._ends), *digests))
        self._ends = []


def _clear_leftovers(folder: Path) -> None:
    """Make room in a folder that an interrupted writer left; refuse any other that is not empty."""
    if folder.is_dir() and not (folder / INDEX).exists():
        found = list(folder.iterdir())
        if all(_LEFTOVER.fullmatch(path.name) for path in found):
            for path in found:
                path.unlink()
    require_empty(folder)


class Shards:
    """An opened folder: one long row of tokens, and the document each belongs to. Made by `open_shards`.

    Attributes:
        num_tokens, num_documents: of all shards together.
        vocab_size: every id is smaller.
        tokenizer_digest: SHA-256 of the `tokenizer.json` that made the tokens.
        provenance: what the writer was told about the source.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any], shards: list[ShardInfo]) -> None:
        self.folder = folder
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_digest: str = index["tokenizer_digest"]
        self.provenance: dict[str, Any] = index["provenance"]
        self.shards = tuple(shards)
        dtype = token_dtype(self.vocab_size)
        self._maps = [_Mapped(folder / f"{one.name}.tokens", dtype, one.tokens, "tokens") for one in shards]
        ends = [_check_ends(folder, one) for one in shards]
        self._starts = np.cumsum([0, *(one.tokens for one in shards)])
        self._ends = np.concatenate(
            [part + start for part, start in zip(ends, self._starts[:-1], strict=True)] or [np.empty(0, np.int64)]
        )
        self.num_tokens = int(self._starts[-1])
        self.num_documents = len(self._ends)

    def read(self, start: int, stop: int) -> tuple[Tokens, Tokens]:
        """Tokens `start` to `stop` and the number of the document each belongs to, both int64 [stop - start].

        Raises:
            FileError: a file has shrunk since it was opened, or holds an id past the vocabulary.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        tokens = np.empty(stop - start, np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < stop:
            offset = int(self._starts[shard])
            end = min(stop, int(self._starts[shard + 1]))
            part = self._maps[shard].read(at - offset, end - offset)
            if part.size and part.max() >= self.vocab_size:
                wrong = at - offset + int(np.argmax(part >= self.vocab_size))
                problem = f"token {wrong} is {part.max()}, past the vocabulary of {self.vocab_size}"
                raise FileError(self._maps[shard].path, problem)
            tokens[at - start : end - start] = part
            at, shard = end, shard + 1
        return tokens, self.document_at(np.arange(start, stop))

    def document_at(self, positions: Tokens) -> Tokens:
        """The number of the document that each token position lies in."""
        return np.searchsorted(self._ends, positions, side="right").astype(np.int64)

    def document_end(self, position: int) -> int:
        """The end of the document that holds token `position`: one past its last token."""
        return int(self._ends[np.searchsorted(self._ends, position, side="right")])

    def document_start(self, position: int) -> int:
        """The first token of the document that holds token `position`."""
        number = int(np.searchsorted(self._ends, position, side="right"))
        return int(self._ends[number - 1]) if number else 0

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything and compare it with the digests of the index.

        Raises:
            FileError: a file is not the one that was written.
        """
        done, total = 0, sum(mapped.nbytes for mapped in self._maps)
        for shard, mapped in zip(self.shards, self._maps, strict=True):
            digest = hashlib.sha256()
            for piece in mapped.pieces():
                digest.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
            if digest.hexdigest() != shard.tokens_sha256:
                raise FileError(mapped.path, f"is not the file that {INDEX} describes: its SHA-256 differs")
            ends = self.folder / f"{shard.name}.ends"
            if file_digest(ends) != shard.ends_sha256:
                raise FileError(ends, f"is not the file that {INDEX} describes: its SHA-256 differs")


def open_shards(folder: str | Path, *, vocab_size: int | None = None, tokenizer_digest: str | None = None) -> Shards:
    """Open a folder of shards. Sizes are compared with the index, tokens are read on demand; `Shards.verify` reads all.

    Args:
        vocab_size: what the model can embed; the shards must not need more.
        tokenizer_digest: refuse tokens that another tokenizer made.

    Raises:
        FileError: the folder is unfinished, damaged, or was made with something else.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        problem = (
            f"has no {INDEX}: writing it was never finished" if folder.is_dir() else "is no folder of token shards"
        )
        raise FileError(folder, problem)
    index = _read_index(path)
    shards = [_check_shard(path, item, number) for number, item in enumerate(index["shards"])]
    for name, total in (
        ("num_tokens", sum(s.tokens for s in shards)),
        ("num_documents", sum(s.documents for s in shards)),
    ):
        if index[name] != total:
            raise FileError(path, f"says {index[name]}, its shards hold {total}", item=name)
    if vocab_size is not None and index["vocab_size"] > vocab_size:
        raise FileError(path, f"is {index['vocab_size']}, the model embeds only {vocab_size}", item="vocab_size")
    if tokenizer_digest is not None and index["tokenizer_digest"] != tokenizer_digest:
        raise FileError(
            path,
            f"is {index['tokenizer_digest'][:12]}…, this tokenizer is {tokenizer_digest[:12]}…",
            item="tokenizer_digest",
        )
    return Shards(folder, index, shards)


class _Mapped:
    """A file of numbers in memory's view, whose size is what the index promised."""

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int, what: str) -> None:
        self.path, self.nbytes = path, count * dtype.itemsize
        try:
            self._file = path.open("rb")
            size = os.fstat(self._file.fileno()).st_size
            if size != self.nbytes:
                raise FileError(path, f"holds {size} bytes, {INDEX} promises {self.nbytes} ({count} {what})")
            self._map = np.memmap(self._file, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
        except OSError as error:
            raise FileError(path, f"cannot be read: {error.strerror}") from error

    def read(self, start: int, stop: int) -> NDArray[Any]:
        # A file that shrank after it was mapped would kill the process with SIGBUS at the first touch.
        if os.fstat(self._file.fileno()).st_size != self.nbytes:
            raise FileError(self.path, "has changed its size since it was opened")
        return self._map[start:stop]

    def pieces(self) -> Any:
        step = HASH_BYTES // self._map.itemsize
        for start in range(0, len(self._map), step):
            yield self.read(start, start + step).tobytes()


def _check_ends(folder: Path, shard: ShardInfo) -> Tokens:
    """The ends of a shard's documents, proven to be rising and to reach its last token."""
    mapped = _Mapped(folder / f"{shard.name}.ends", ENDS, shard.documents, "documents")
    ends = np.asarray(mapped.read(0, shard.documents)).astype(np.int64)
    if (ends[-1] if len(ends) else 0) != shard.tokens or (len(ends) and ends[0] < 1) or (np.diff(ends) < 1).any():
        raise FileError(mapped.path, f"does not divide {shard.tokens} tokens into {shard.documents} documents")
    return ends


def _read_index(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise FileError(path, f"is larger than {MAX_INDEX_BYTES >> 20} MiB")
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"is not valid JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise FileError(path, f"is no index of token shards; its format must be {FORMAT!r}", item="format")
    if index.get("version") != VERSION:
        raise FileError(path, f"is {index.get('version')!r}, this Shoal reads version {VERSION}", item="version")
    _whole(path, index, "vocab_size", 1, MAX_VOCAB)
    for name in ("num_tokens", "num_documents"):
        _whole(path, index, name, 0, MAX_TOKENS)
    if index.get("dtype") != token_dtype(index["vocab_size"]).name:
        problem = f"is {index.get('dtype')!r}; a vocabulary of {index['vocab_size']} is stored as "
        raise FileError(path, problem + token_dtype(index["vocab_size"]).name, item="dtype")
    _digest(path, index, "tokenizer_digest")
    if not isinstance(index.get("provenance"), dict):
        raise FileError(path, "must be an object", item="provenance")
    if not isinstance(index.get("shards"), list):
        raise FileError(path, "must be a list", item="shards")
    return index


def _check_shard(path: Path, item: Any, number: int) -> ShardInfo:
    where = f"shards[{number}]"
    if not isinstance(item, dict) or item.keys() != set(ShardInfo._fields):
        raise FileError(path, f"must have exactly {', '.join(ShardInfo._fields)}", item=where)
    if not isinstance(item["name"], str) or not _NAME.fullmatch(item["name"]) or int(item["name"][6:]) != number:
        raise FileError(path, f"must be 'shard-{number:05d}', is {item['name']!r:.80}", item=f"{where}.name")
    for name in ("tokens", "documents"):
        _whole(path, item, name, 1, MAX_TOKENS, where=f"{where}.")
    for name in ("tokens_sha256", "ends_sha256"):
        _digest(path, item, name, where=f"{where}.")
    return ShardInfo(**item)


def _whole(path: Path, data: Mapping[str, Any], name: str, low: int, high: int, *, where: str = "") -> None:
    value = data.get(name)
    if type(value) is not int or not low <= value <= high:
        raise FileError(path, f"must be a whole number from {low} to {high}, is {value!r:.80}", item=where + name)


def _digest(path: Path, data: Mapping[str, Any], name: str, *, where: str = "") -> None:
    value = data.get(name)
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise FileError(path, f"must be 64 hexadecimal digits, is {value!r:.80}", item=where + name)
