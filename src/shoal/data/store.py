"""A folder of documents with what is known about them beside it.

    DIR/documents/00003.jsonl.zst          one JSON object a line: id, text, metadata
    DIR/attributes/<name>/00003.parquet    one row a document of that shard, in the same order
    DIR/rejects/00003.jsonl.zst            what a step let go, if it was asked to keep it

Attributes are columns added later without touching the text (Dolma, arXiv 2402.00159, section 3). Every file appears
whole or not at all.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from shoal.data.document import Document
from shoal.data.streams import arrow, read_lines
from shoal.errors import FileError
from shoal.formats.atomic import atomic_file

SUFFIX = ".jsonl.zst"
VERDICT_ORDER = ("duplicates", "band")  # then others by name
LINE_LIMIT = 1 << 30  # of our own files, whose lines were bounded when they were written


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the document shards in a folder, in order. Raises FileError if there are none."""
    found = sorted(int(p.name.removesuffix(SUFFIX)) for p in (folder / "documents").glob(f"[0-9]*{SUFFIX}"))
    if not found:
        raise FileError(folder, "holds no documents/*.jsonl.zst; `shoal data prepare` writes them")
    return found


def document_path(folder: Path, shard: int) -> Path:
    return folder / "documents" / f"{shard:05d}{SUFFIX}"


def attribute_path(folder: Path, name: str, shard: int) -> Path:
    return folder / "attributes" / name / f"{shard:05d}.parquet"


@contextlib.contextmanager
def line_writer(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that adds one JSON line to a new zstd file, which appears when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as raw:
        out = arrow().CompressedOutputStream(arrow().PythonFile(_KeepOpen(raw), "w"), "zstd")

        def write(row: Any) -> None:
            with written(path):
                out.write(orjson.dumps(row, default=as_text, option=orjson.OPT_APPEND_NEWLINE))

        yield write
        with written(path):
            out.close()


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """What the disk refuses, as FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(path, f"cannot be written: {error.strerror or error}") from error


def as_text(value: Any) -> str:
    """What JSON has no word for, as columns of Parquet hold it: decimals, spans of time; bytes as base64."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def document_writer(folder: Path, shard: int) -> Iterator[Callable[[Document], None]]:
    """A function that adds one document to a new shard."""
    with line_writer(document_path(folder, shard)) as write:
        yield lambda one: write({"id": one.id, "text": one.text, "metadata": one.metadata})


def read_shard(folder: Path, shard: int, attributes: Iterable[str] = ()) -> Iterator[Document]:
    """Documents of one shard in order, each with the named attribute files' columns in `Document.attributes`.

    Raises:
        FileError: a file is missing or damaged, or an attribute file has another number of rows than the shard.
    """
    path = document_path(folder, shard)
    columns: dict[str, list[Any]] = {}
    for name in attributes:
        columns |= {key: list(values) for key, values in read_attributes(folder, name, shard).items()}
    count = 0
    for number, line, _ in read_lines(path, limit=LINE_LIMIT):
        try:
            row = orjson.loads(line or b"")
            document = Document(id=row["id"], text=row["text"], metadata=row["metadata"])
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise FileError(path, f"line {number} is no document of Shoal's") from error
        for key, values in columns.items():
            if count >= len(values):
                raise FileError(path, f"holds more documents than attribute {key} has rows ({len(values)})")
            document.attributes[key] = values[count]
        yield document
        count += 1
    for key, values in columns.items():
        if count != len(values):
            raise FileError(path, f"holds {count} documents, attribute {key} has {len(values)} rows")


def read_folder(folder: Path, attributes: Sequence[str] = ()) -> Iterator[Document]:
    """Documents of all shards, in order."""
    for shard in shard_numbers(folder):
        yield from read_shard(folder, shard, attributes)


def write_attributes(folder: Path, name: str, shard: int, columns: Mapping[str, Any]) -> None:
    """Write equally long columns (lists or arrays), one row a document of the shard, as `attributes/<name>`.

    Column names are unique over all attribute files of a folder, so that they can lie in one dictionary.
    """
    import pyarrow.parquet as parquet

    path = attribute_path(folder, name, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow().table({key: column(values) for key, values in columns.items()})
    with atomic_file(path) as out:
        parquet.write_table(table, out, compression="zstd")


def column(values: Any) -> Any:
    """An arrow array of numbers or text, as `pyarrow.array` makes it; None is null.

    Numbers and text are laid out here: pyarrow's way from Python values imports pandas, where that is installed, for
    44 MB and half a second in every process.
    """
    pyarrow = arrow()
    kinds = {type(one) for one in values if one is not None} if isinstance(values, list) else None
    if kinds == {str}:
        return texts(values)
    if kinds == {int} or kinds == {float}:
        numbers = np.array([0 if one is None else one for one in values], np.int64 if kinds == {int} else np.float64)
        valid = _valid(values)
    elif isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iuf":
        numbers, valid = np.ascontiguousarray(values), None
    elif kinds == set() and values:
        return pyarrow.nulls(len(values))
    else:
        return values if isinstance(values, pyarrow.Array) else pyarrow.array(values)
    buffers = [valid, pyarrow.py_buffer(numbers)]
    return pyarrow.Array.from_buffers(pyarrow.from_numpy_dtype(numbers.dtype), len(numbers), buffers)


def texts(values: Sequence[str | None]) -> Any:
    """An arrow array of text, None for null; all may be null."""
    pyarrow = arrow()
    encoded = [b"" if one is None else one.encode() for one in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = [_valid(values), pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(encoded))]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(encoded), buffers)


def _valid(values: Sequence[Any]) -> Any:
    """Arrow's bitmap of what is no null; none at all if nothing is."""
    known = [one is not None for one in values]
    return None if all(known) else arrow().py_buffer(np.packbits(known, bitorder="little"))


def read_attributes(folder: Path, name: str, shard: int) -> dict[str, Any]:
    """Columns of one attribute file as lists. Raises FileError if it is missing or damaged."""
    path = attribute_path(folder, name, shard)
    arrow()
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path, memory_map=False).read()
    except (OSError, arrow().ArrowException) as error:
        problem = "is missing" if not path.exists() else "is damaged"
        raise FileError(path, problem) from error
    return {key: table.column(key).to_pylist() for key in table.column_names}


def write_verdict(
    folder: Path, name: str, shard: int, reasons: Sequence[str | None], columns: Mapping[str, Any] | None = None
) -> None:
    """Write `attributes/<name>` with a column `<name>_reason`: null keeps a document, a few words drop it.

    Whatever packs or counts the folder afterwards obeys every such column.
    """
    write_attributes(folder, name, shard, {f"{name}_reason": texts(reasons), **(columns or {})})


def verdict_names(folder: Path) -> list[str]:
    """Names of the attribute files that drop documents, in the order in which stages wrote them first."""
    first = shard_numbers(folder)[0]
    found = [name for name in attribute_names(folder) if f"{name}_reason" in read_attributes(folder, name, first)]
    return sorted(found, key=lambda name: (VERDICT_ORDER.index(name) if name in VERDICT_ORDER else 99, name))


def read_kept(
    folder: Path, shard: int, attributes: Iterable[str] = (), *, verdicts: Iterable[str] | None = None
) -> Iterator[Document]:
    """Documents of a shard that none of the verdicts drops, by default none of all there are."""
    names = verdict_names(folder) if verdicts is None else list(verdicts)
    for document in read_shard(folder, shard, [*names, *(name for name in attributes if name not in names)]):
        if reason_of(document, names) is None:
            yield document


def reason_of(document: Document, names: Iterable[str]) -> tuple[str, str] | None:
    """(verdict, reason) of the first of the named verdicts that drops a document."""
    for name in names:
        reason = document.attributes[f"{name}_reason"]
        if reason is not None:
            return name, reason
    return None


def remove_attributes(folder: Path, name: str) -> None:
    """Forget an attribute file of every shard."""
    for shard in shard_numbers(folder):
        attribute_path(folder, name, shard).unlink(missing_ok=True)


def attribute_names(folder: Path) -> list[str]:
    """Names of the attribute files that every shard of the folder has."""
    every = shard_numbers(folder)
    names = sorted(p.name for p in (folder / "attributes").glob("*") if p.is_dir())
    return [name for name in names if all(attribute_path(folder, name, shard).exists() for shard in every)]


class _KeepOpen:
    """A file for arrow to write to and "close", while the file below stays open for the atomic rename."""

    closed = False

    def __init__(self, raw: IO[bytes]) -> None:
        self.write, self.flush = raw.write, raw.flush

    def close(self) -> None:
        self.closed = True
