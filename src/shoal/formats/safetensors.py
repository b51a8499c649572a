"""safetensors files: a lazy, memory-mapped reader that trusts nothing, and a streaming, sharding writer.

The format: 8 bytes little-endian header length, a JSON header of `name → {dtype, shape, data_offsets}`, then the data
without holes (https://huggingface.co/docs/safetensors, "Format"). Every size is checked before anything is allocated.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shoal.errors import FileError
from shoal.formats.atomic import atomic_file

Array = NDArray[np.generic]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_SHARD_BYTES = 5_000_000_000
WRITE_BYTES = 1 << 24  # how much is converted and written at a time


class Entry(NamedTuple):
    """Where one tensor lies: `begin` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One opened file. `entries` maps names to places; `view` gives an array over the mapped bytes.

    Raises:
        FileError: the file is missing, or its header is damaged, inconsistent or hostile.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if sys.byteorder != "little":
            raise FileError(self.path, "safetensors files are little-endian; this machine is not")
        try:
            self._file = self.path.open("rb")
            self._size = os.fstat(self._file.fileno()).st_size
            header, start = _read_header(self.path, self._file, self._size)
            self.metadata = _take_metadata(self.path, header)
            self.entries = _check_entries(self.path, header, start, self._size)
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FileError(self.path, f"cannot be read: {error.strerror}") from error

    def view(self, name: str) -> Array:
        """The tensor as a read-only array over the file's own bytes (a copy only where they lie unaligned)."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        # A file that shrank after it was mapped would kill the process with SIGBUS at the first touch.
        if os.fstat(self._file.fileno()).st_size < entry.end:
            raise FileError(self.path, "the file has shrunk since it was opened", item=name)
        if entry.begin == entry.end:
            return np.empty(entry.shape, dtype)
        flat = np.frombuffer(self._map, dtype, math.prod(entry.shape), entry.begin)
        return (flat if flat.flags.aligned else flat.copy()).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from memory; a view stays valid and reads them again from the file."""
        entry = self.entries[name]
        begin = entry.begin - entry.begin % mmap.PAGESIZE
        if entry.end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)


def _read_header(path: Path, file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise FileError(path, f"is {size} bytes long; a safetensors file has at least 8")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise FileError(path, f"announces a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if length > size - 8:
        raise FileError(path, f"announces a header of {length} bytes in a file of {size}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise FileError(path, "header does not start with '{'")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise FileError(path, f"header is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"header is not valid JSON: {error}") from error
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen.add(key)
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _take_metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(path, "must map strings to strings", item="__metadata__")
    return metadata


def _check_entries(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    """All tensors, checked one by one and then as a whole: together they cover the data without hole or overlap."""
    entries = {name: _check_entry(path, name, info, start) for name, info in header.items()}
    position, last = start, None
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            problem = "overlaps" if entry.begin < position else "leaves a hole after"
            raise FileError(path, f"{problem} {last or 'the header'}", item=name)
        if entry.end > size:
            raise FileError(path, f"ends at byte {entry.end} of a file of {size} (truncated?)", item=name)
        position, last = entry.end, name
    if position != size:
        raise FileError(path, f"has {size - position} bytes that belong to no tensor")
    return entries


def _check_entry(path: Path, name: str, info: Any, start: int) -> Entry:
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(path, "must have exactly dtype, shape and data_offsets", item=name)
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(path, f"has unknown dtype {dtype!r}", item=name)
    if not _is_sizes(shape) or len(shape) > 32:
        raise FileError(path, f"has shape {str(shape)[:80]}, not a short list of whole numbers", item=name)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(path, f"has data_offsets {str(offsets)[:80]}, not [begin, end]", item=name)
    length = math.prod(shape) * DTYPES[dtype].itemsize  # exact: Python integers do not overflow
    if length >= 1 << 63:
        raise FileError(path, f"has shape {shape}, whose size overflows", item=name)
    if length != offsets[1] - offsets[0]:
        raise FileError(
            path, f"has shape {shape} of {dtype}, {length} bytes, but holds {offsets[1] - offsets[0]}", item=name
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


class TensorSpec(NamedTuple):
    """A tensor to be written: `chunks()` yields arrays that follow each other along the first axis.

    `source` is the file to blame when a value does not fit.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Array]]
    source: Path | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def array_spec(name: str, array: Array) -> TensorSpec:
    """The spec of an array that is already in memory."""
    code = next((code for code, dtype in DTYPES.items() if dtype == array.dtype), None)
    if code is None:
        raise ValueError(f"{name}: safetensors has no dtype for {array.dtype}")
    return TensorSpec(name, code, array.shape, lambda: iter([array]))


def write_safetensors(
    path: str | Path,
    specs: Sequence[TensorSpec],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write one file: the header first, then the tensors as they stream by. `progress` gets the bytes just written.

    Wide types come first, so that every tensor lies aligned to its own width.

    Raises:
        FileError: the disk refuses, or a value does not fit the type it is to be stored in.
    """
    path = Path(path)
    ordered = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
    with atomic_file(path) as out:
        _put(path, out, _header(ordered, {"format": "pt"} if metadata is None else metadata))
        for spec in ordered:
            _write_tensor(path, out, spec, progress)


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for spec in specs:
        if spec.name in header:
            raise ValueError(f"{spec.name} is written twice")
        end = position + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _write_tensor(path: Path, out: IO[bytes], spec: TensorSpec, progress: Callable[[int], None] | None) -> None:
    dtype = DTYPES[spec.dtype]
    written = 0
    for chunk in spec.chunks():
        if chunk.ndim != len(spec.shape) or chunk.shape[1:] != spec.shape[1:]:
            raise ValueError(f"{spec.name}: a chunk of shape {chunk.shape} is no part of {spec.shape}")
        for part in slices(chunk):
            data = np.ascontiguousarray(cast(spec.source or path, spec.name, part, dtype))
            _put(path, out, data.reshape(-1).view(np.uint8).data)
            written += data.nbytes
            if progress is not None:
                progress(data.nbytes)
    if written != spec.nbytes:
        raise ValueError(f"{spec.name}: the chunks hold {written} of {spec.nbytes} bytes")


def slices(array: Array, limit: int = WRITE_BYTES) -> Iterator[Array]:
    """The array in flat pieces of at most `limit` bytes as float32, so that a conversion needs little memory."""
    flat = array.reshape(-1)
    step = max(1, limit // max(4, flat.itemsize))
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def cast(path: Path, name: str, part: Array, dtype: np.dtype[Any]) -> Array:
    """`part` as `dtype`. Values that a narrower type cannot hold are an error, not a silent infinity."""
    if part.dtype == dtype:
        return part
    with np.errstate(over="ignore"):
        out = part.astype(dtype)
    if dtype.itemsize < part.dtype.itemsize or dtype == np.float16:
        lost = np.isinf(out) & np.isfinite(part)
        if lost.any():
            raise FileError(path, f"holds {part[lost][0]}, which {dtype} cannot store", item=name)
    return out


def _put(path: Path, out: IO[bytes], data: bytes | memoryview) -> None:
    try:
        out.write(data)
    except OSError as error:
        raise FileError(path, f"cannot be written: {error.strerror}") from error


def write_sharded(
    folder: Path,
    specs: Sequence[TensorSpec],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `model.safetensors`, or numbered shards and their index when one file would be too large."""
    shards = plan_shards(specs, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], progress=progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, progress=progress)
        weight_map.update((spec.name, name) for spec in shard)
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    with atomic_file(folder / "model.safetensors.index.json") as out:
        out.write(json.dumps(index, indent=2, ensure_ascii=False).encode("utf-8") + b"\n")


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Split in order; a shard holds at most `max_shard_bytes` unless a single tensor is larger."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.nbytes
    return shards
