"""Bytes out of files: decompression by magic number, and lines of bounded length.

A damaged stream gives everything before the damage and then raises FileError; nothing is dropped in silence.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shoal.errors import FileError, MissingExtraError

BLOCK = 1 << 16  # what is lost at most before a damaged place in a compressed stream
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
TRUNCATED = "the compressed stream ends too early (truncated)"


def arrow() -> Any:
    """The module `pyarrow`, or MissingExtraError."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("data", "reading and writing zstd and Parquet") from error
    return pyarrow


@contextlib.contextmanager
def open_raw(path: Path) -> Iterator[IO[bytes]]:
    """The file as it lies on disk. Raises FileError if it cannot be opened."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    with raw:
        yield raw


def compression(path: Path) -> str | None:
    """`gzip` or `zstd` if the file starts like one, whatever its name says."""
    with open_raw(path) as raw:
        magic = raw.read(4)
    return "gzip" if magic.startswith(GZIP) else "zstd" if magic == ZSTD else None


@contextlib.contextmanager
def open_bytes(path: Path, start: int = 0) -> Iterator[Any]:
    """Open a file for reading, decompressed if need be; `start` is a place in a plain file."""
    packed = compression(path)
    with open_raw(path) as raw:
        raw.seek(start)
        if packed == "gzip":
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield unzipped
        elif packed == "zstd":
            yield arrow().CompressedInputStream(arrow().PythonFile(raw, "r"), "zstd")
        else:
            yield raw


def read_blocks(path: Path, start: int = 0, size: int = BLOCK) -> Iterator[bytes]:
    """The decompressed content in blocks. Raises FileError after the last good block of a damaged file."""
    with open_bytes(path, start) as stream:
        while True:
            try:
                block = stream.read(size)
            except EOFError as error:
                raise FileError(path, TRUNCATED) from error
            except (OSError, zlib.error) as error:
                if "Truncated" in str(error):  # arrow's word for it
                    raise FileError(path, TRUNCATED) from error
                raise FileError(path, f"the compressed stream is damaged: {_first_line(error)}") from error
            if not block:
                return
            yield block


def read_lines(
    path: Path, *, limit: int, start: int = 0, stop: int | None = None, number: int = 1
) -> Iterator[tuple[int, bytes | None, int]]:
    """(number, line without its end, length) of each line from `start`, where line `number` begins, up to `stop`.

    A line of more than `limit` bytes comes as None: it is passed over and never held. `start` and `stop` are places in
    a plain file.
    """
    pieces: list[bytes] = []  # of the line at hand; emptied once it is past the limit
    length, offset = 0, start
    for block in read_blocks(path, start):
        position = 0
        while True:
            if stop is not None and offset >= stop:
                return
            end = block.find(b"\n", position)
            piece = block[position : end if end >= 0 else None]
            length += len(piece)
            pieces.append(piece)
            if length > limit:
                pieces.clear()
            if end < 0:
                break
            yield number, (b"".join(pieces) if length <= limit else None), length
            number, offset, position = number + 1, offset + length + 1, end + 1
            length, pieces = 0, []
    if length:
        yield number, (b"".join(pieces) if length <= limit else None), length


def line_starts(path: Path, every: int) -> list[tuple[int, int]]:
    """(offset, 1-based line number) of the first line that begins at or after each multiple of `every` bytes."""
    found, seen, lines, wanted = [(0, 1)], 0, 1, every
    for block in read_blocks(path):
        position = 0
        while seen + len(block) > wanted - 1:  # the line end before a wanted place lies in this block or a later one
            end = block.find(b"\n", max(wanted - 1 - seen, position))
            if end < 0:
                break
            lines += block.count(b"\n", position, end + 1)
            position = end + 1
            found.append((seen + position, lines))
            wanted = max(wanted + every, (seen + position) // every * every + every)
        lines += block.count(b"\n", position)
        seen += len(block)
    return [one for one in found if one[0] < seen or one[0] == 0]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
