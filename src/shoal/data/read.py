"""Files in, documents out: JSON lines, Parquet, plain text, source code; everything unreadable is named and counted."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from shoal.data import store
from shoal.data.document import Document, OnReject, Reject, text_hash
from shoal.data.kinds import kind_of
from shoal.data.plan import Part, find_parts
from shoal.data.streams import arrow, read_blocks, read_lines
from shoal.errors import FileError

MAX_DOCUMENT = 4 << 20  # bytes of one document; also of one line
EXCERPT = 200  # bytes of a bad row that its reject shows
PARQUET_ROWS = 32  # in memory at once: they may all be as large as a document may be
PLACE = ("path", "line", "hash")  # where a row stands, which is ours to say
PROVENANCE = ("source", "version", "licence", "kind", "language")  # words: anything else is a column like others


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read.

    Attributes:
        text_field, id_field: columns of rows.
        max_document: bytes of text or of a line above which a document is passed over.
        strict: the first unreadable thing raises FileError, where it is otherwise rejected and counted.
    """

    text_field: str = "text"
    id_field: str = "id"
    max_document: int = MAX_DOCUMENT
    strict: bool = False


DEFAULTS = ReadOptions()
OnBad = Callable[[int | None, str, bytes | str], None]  # line, what is wrong, the content


def read_documents(path: str | Path, options: ReadOptions = DEFAULTS) -> Iterator[Document]:
    """Documents of one file, of every readable file in a folder by name, or of a folder that Shoal wrote.

    Raises:
        FileError: names the file, and the line or row that cannot be read.
    """
    path = Path(path)
    if (path / "documents").is_dir():
        yield from store.read_folder(path)
        return
    for part in find_parts(path):
        yield from read_part(part, replace(options, strict=True), lambda _: None)


def read_part(part: Part, options: ReadOptions, on_reject: OnReject) -> Iterator[Document]:
    """Documents of one part; rows and files that cannot be read go to `on_reject` with their line."""
    bad = _Bad(part, options, on_reject)
    try:
        if has_rows(part.path.name):
            for number, row in read_rows(part, options, bad):
                document = _from_row(row, number, part, options, bad)
                if document is not None:
                    yield document
        else:
            yield from _read_whole(part, options, bad)
    except FileError as error:
        if options.strict:
            raise
        bad(None, error.problem)


def has_rows(name: str) -> bool:
    """Whether a file of this name holds a document a row, rather than being one."""
    return kind_of(name)[0] == "rows"


def read_rows(part: Part, options: ReadOptions, bad: OnBad) -> Iterator[tuple[int, Any]]:
    """(1-based line or row, value) of a file of rows; lines that are no JSON go to `bad`."""
    yield from (_parquet_rows if part.path.name.lower().endswith(".parquet") else _json_rows)(part, options, bad)


class _Bad:
    """Reports what could not be read, or raises it when asked to be strict."""

    def __init__(self, part: Part, options: ReadOptions, on_reject: OnReject) -> None:
        self._part, self._strict, self._on_reject = part, options.strict, on_reject

    def __call__(self, line: int | None, reason: str, content: bytes | str = b"") -> None:
        if self._strict:
            raise FileError(self._part.path, reason, item=None if line is None else f"line {line}")
        shown = content[:EXCERPT] if isinstance(content, str) else content[:EXCERPT].decode("utf-8", "replace")
        self._on_reject(
            Reject(
                step="read", reason=reason, path=self._part.name, line=line, text=shown, metadata=self._part.metadata
            )
        )


def _json_rows(part: Part, options: ReadOptions, bad: OnBad) -> Iterator[tuple[int, Any]]:
    number = part.line - 1
    lines = read_lines(part.path, limit=options.max_document, start=part.start, stop=part.stop, number=part.line)
    try:
        for number, line, length in lines:
            if line is None:
                bad(number, f"the line is longer than {options.max_document} bytes", f"{length} bytes")
                continue
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                bad(number, _what_is_wrong(line), line)
                continue
            yield number, row
    except FileError as error:
        if options.strict:
            raise FileError(part.path, error.problem, item=error.item or f"after line {number}") from error
        bad(number + 1, error.problem, "")


def _what_is_wrong(line: bytes) -> str:
    try:
        line.decode()
    except UnicodeDecodeError:
        return "the line is not UTF-8"
    return "the line is not JSON"


def _row_problem(row: Any, options: ReadOptions) -> str | None:
    field = options.text_field
    if not isinstance(row, dict):
        return "the row is not an object"
    if field not in row:
        return f"the row has no field {field!r}"
    if not isinstance(row[field], str):
        return f"field {field!r} is not a string"
    if len(row[field]) > options.max_document or len(row[field].encode()) > options.max_document:
        return f"the text is longer than {options.max_document} bytes"
    return None


def _from_row(row: Any, number: int, part: Part, options: ReadOptions, bad: _Bad) -> Document | None:
    problem = _row_problem(row, options)
    if problem:
        bad(number, problem, repr(row)[:EXCERPT])
        return None
    text = row.pop(options.text_field)
    given = row.pop(options.id_field, None)
    try:
        orjson.dumps(row, default=store.as_text)
    except orjson.JSONEncodeError:  # it reads deeper nesting than it writes
        bad(number, "a column is nested too deeply", repr(row)[:EXCERPT])
        return None
    inner = row.pop("metadata", None)
    meta = {**part.metadata, "path": part.name, "line": number, "hash": text_hash(text)}
    if isinstance(inner, dict):  # a document of ours, or of Dolma or datatrove: provenance goes on travelling
        odd = {key: inner.pop(key) for key in PROVENANCE if not isinstance(inner.get(key, ""), str)}
        meta |= {key: value for key, value in inner.items() if key not in PLACE}
        inner = {key: value for key, value in odd.items() if value is not None} or None
    if inner is not None:
        row["metadata"] = inner
    meta.setdefault("kind", "text")
    if row:
        meta["row"] = row
    name = str(given) if isinstance(given, str | int) and str(given) else f"{part.name}:{number}"
    return Document(id=name, text=text, metadata=meta)


def _parquet_rows(part: Part, options: ReadOptions, bad: OnBad) -> Iterator[tuple[int, Any]]:
    pyarrow = arrow()
    import pyarrow.parquet as parquet

    damage = (OSError, pyarrow.ArrowException)
    try:
        file = parquet.ParquetFile(part.path, memory_map=False, pre_buffer=False)
    except damage as error:
        return bad(None, _damaged(error), "")
    with file:
        number = part.line - 1
        for group in range(part.start, file.num_row_groups if part.stop is None else part.stop):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group]):
                    for row in _values(batch):
                        number += 1
                        if row is None:
                            bad(number, "the row holds a value that is no text, number or time", "")
                        else:
                            yield number, row
            except damage as error:
                bad(number + 1, f"{_damaged(error)}; the rows up to {end} are lost", "")
            number = end
    return None


def _damaged(error: Exception) -> str:
    return f"damaged Parquet: {str(error).splitlines()[0][:120]}"


def _values(batch: Any) -> list[Any]:
    """Rows of an arrow batch; None for one that Python cannot hold: text that is no UTF-8, a time out of range."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):
        return [None] if len(batch) == 1 else [row for at in range(len(batch)) for row in _values(batch.slice(at, 1))]


def _read_whole(part: Part, options: ReadOptions, bad: _Bad) -> Iterator[Document]:
    blocks, length = [], 0
    for block in read_blocks(part.path):
        length += len(block)
        if length > options.max_document:
            return bad(None, f"the file is longer than {options.max_document} bytes")
        blocks.append(block)
    content = b"".join(blocks)
    if b"\0" in content and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return bad(None, "the file is binary", content)
    text = _decode(content)
    if text is None:
        return bad(None, "the file is not UTF-8 and declares no other encoding", content)
    kind, language = kind_of(part.name)
    meta = {"kind": kind or "text", **part.metadata, "path": part.name, "hash": text_hash(text)}
    if kind:  # the name tells; what was said of the source is for names that do not
        meta["kind"] = kind
    if language:
        meta["language"] = language
    yield Document(id=part.name, text=text, metadata=meta)
    return None


def _decode(content: bytes) -> str | None:
    """Text by byte order mark, as UTF-8, or as a Python-style `coding:` line of the first two lines says (PEP 263)."""
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content[:1000]).readline)
        text = content.decode(encoding)
        text.encode()  # `unicode_escape` and the like make half characters
        return text
    except (SyntaxError, LookupError, UnicodeError):  # LookupError: `rot13` and others that are no encodings of text
        return None
