"""Which files there are and how they are dealt out to shards: a plan that depends on the input, not the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.data.kinds import kind_of
from shoal.data.streams import arrow, compression, line_starts
from shoal.errors import FileError

SHARD_BYTES = 64 << 20
PASSED_OVER = {"__pycache__", "node_modules", "venv"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one shard reads of one file: bytes of plain JSON lines, row groups of Parquet, or the whole file.

    Attributes:
        path: the file.
        name: its path under the source, with the source's name in front; the same on every machine.
        start, stop: bytes or row groups; `stop` None means to the end.
        line: number of the first line.
        metadata: what every document of it is given: source, version, licence.
    """

    path: Path
    name: str
    start: int = 0
    stop: int | None = None
    line: int = 1
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file or folder with what is to be said about its documents.

    Attributes:
        name: its own name if none is given; no two sources of a run share one.
        version, licence: travel with each document; the licence in SPDX's words.
        kind: `text` or `code`, where the name of a file does not tell: rows are text unless this says otherwise.
    """

    path: Path
    name: str = ""
    version: str | None = None
    licence: str | None = None
    kind: str | None = None

    def metadata(self) -> dict[str, Any]:
        found = {"source": self.name or _printable(self.path.name), "version": self.version, "licence": self.licence}
        return {key: value for key, value in {**found, "kind": self.kind}.items() if value is not None}


def find_files(source: Source) -> Iterator[Path]:
    """Every file below a source, by name; hidden folders and caches are left out. Links to folders are not followed.
    Of a folder that Shoal wrote, the documents alone.

    Raises:
        FileError: there is no such file or folder, or a folder in it cannot be read.
    """
    if source.path.is_file():
        yield source.path
        return
    if not source.path.is_dir():
        raise FileError(source.path, "there is no such file or folder")
    written = (source.path / "recipe.json").is_file() and (source.path / "documents").is_dir()
    for folder, folders, files in os.walk(source.path / "documents" if written else source.path, onerror=_refuse):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in PASSED_OVER)
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # no pipes, no broken links


def _refuse(error: OSError) -> None:
    raise FileError(error.filename, f"cannot be read: {error.strerror}") from error


def find_parts(path: Path) -> list[Part]:
    """The readable files of one file or folder, each whole."""
    return [part for shard in plan_shards([Source(path=path)], shard_bytes=1 << 62)[0] for part in shard]


def plan_shards(
    sources: Sequence[Source], *, shard_bytes: int = SHARD_BYTES
) -> tuple[list[list[Part]], dict[str, int]]:
    """Deal files out to shards of about `shard_bytes` (as they lie on disk), in the order of sources and names.

    Large plain JSON lines and Parquet files are divided, small files share a shard. Returns the shards, and how many
    files of which suffix were passed over.
    """
    shards: list[list[Part]] = [[]]
    passed: dict[str, int] = {}
    filled = 0
    for source in sources:
        single = source.path.is_file()
        for path in find_files(source):
            if kind_of(path.name)[0] is None and not single:
                suffix = path.suffix.lower() or path.name
                passed[suffix] = passed.get(suffix, 0) + 1
                continue
            for part, size in _parts(path, source, shard_bytes):
                if filled and filled + size > shard_bytes:
                    shards.append([])
                    filled = 0
                shards[-1].append(part)
                filled += size
    return [shard for shard in shards if shard], passed


def _parts(path: Path, source: Source, shard_bytes: int) -> list[tuple[Part, int]]:
    """(part, bytes) of one file."""
    inside = path.relative_to(source.path).as_posix() if path != source.path else ""
    meta = source.metadata()
    name = f"{meta['source']}/{_printable(inside)}" if inside else meta["source"]
    size = path.stat().st_size
    if size > shard_bytes and kind_of(path.name)[0] == "rows":
        if path.suffix.lower() == ".parquet":
            return _row_groups(path, name, meta, shard_bytes)
        if compression(path) is None:
            starts = line_starts(path, shard_bytes)
            stops = [offset for offset, _ in starts[1:]] + [size]
            return [
                (Part(path=path, name=name, start=start, stop=stop, line=line, metadata=meta), stop - start)
                for (start, line), stop in zip(starts, stops, strict=True)
            ]
    return [(Part(path=path, name=name, metadata=meta), size)]


def _printable(name: str) -> str:
    """A file name that can be written down: bytes that are no UTF-8 become question marks."""
    return name.encode("utf-8", "replace").decode()


def _row_groups(path: Path, name: str, meta: dict[str, Any], shard_bytes: int) -> list[tuple[Part, int]]:
    arrow()
    import pyarrow.parquet as parquet

    try:
        footer = parquet.read_metadata(path)
    except (OSError, arrow().ArrowException):
        return [(Part(path=path, name=name, metadata=meta), 0)]  # reading it will say what is wrong
    parts, start, line, filled, rows = [], 0, 1, 0, 0
    for group in range(footer.num_row_groups):
        filled += footer.row_group(group).total_byte_size
        rows += footer.row_group(group).num_rows
        if filled >= shard_bytes or group == footer.num_row_groups - 1:
            parts.append((Part(path=path, name=name, start=start, stop=group + 1, line=line, metadata=meta), filled))
            start, line, filled, rows = group + 1, line + rows, 0, 0
    return parts
