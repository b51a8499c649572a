"""The GGUF container, read: a header, typed key-value pairs, a table of tensors, then their bytes.

Everything the file claims is checked against its real length before anything is allocated, so a damaged or hostile file
gives a FileError that names the key or tensor. Tensor bytes are memory-mapped and read only when asked for.
Format: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.errors import FileError
from shoal.formats.gguf_quants import BY_GGML_TYPE, FORMATS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Far above any published file; they bound what a hostile header can make us build.
MAX_HEADER_BYTES = 1 << 30
MAX_STRING_BYTES = 1 << 28
MAX_ARRAY_ITEMS = 1 << 24
MAX_KEY_BYTES = 65535
MAX_TENSOR_NAME_BYTES = 64
MAX_DIMS = 4
MAX_ELEMENTS = 1 << 48

SCALARS: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
BOOL, STRING, ARRAY = 7, 8, 9
# ggml's other types, so that the message can name what a file holds.
UNSUPPORTED_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` is rows first (GGUF stores it reversed), `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed GGUF file. `fields` holds plain Python values; text that is not UTF-8 keeps its bytes as surrogates."""

    path: Path
    version: int
    fields: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    buffer: mmap.mmap = field(repr=False)

    def stored(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor as uint8 [rows, bytes of a row], memory-mapped and read-only."""
        info = self.tensors[name]
        if self.buffer.size() < info.offset + info.nbytes:
            raise FileError(self.path, "the file has been cut short since it was opened", item=name)
        row_bytes = FORMATS[info.dtype].row_bytes(info.shape[-1])
        return np.frombuffer(self.buffer, np.uint8, info.nbytes, info.offset).reshape(-1, row_bytes)

    def release(self, name: str) -> None:
        """Let the operating system drop a tensor's pages from our memory; reading it again brings them back."""
        info = self.tensors[name]
        begin = info.offset - info.offset % mmap.PAGESIZE
        if info.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            self.buffer.madvise(mmap.MADV_DONTNEED, begin, info.offset + info.nbytes - begin)


def read_gguf(path: str | Path) -> GGUFFile:
    """Parse and check a GGUF file; no tensor data is read.

    Raises:
        FileError: it is missing, no GGUF file, damaged, truncated, big-endian, or holds a type we cannot read.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(24)
            _check_start(path, start)
            buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror or error}") from error
    version, num_tensors, num_fields = struct.unpack("<IQQ", start[4:])
    reader = _Reader(path, buffer)
    fields = _read_fields(reader, num_fields)
    tensors = _read_tensors(reader, num_tensors, _alignment(path, fields))
    return GGUFFile(path, version, fields, tensors, buffer)


def _check_start(path: Path, start: bytes) -> None:
    if start[:4] != MAGIC:
        raise FileError(path, "is not a GGUF file (it does not begin with 'GGUF')")
    if len(start) < 24:
        raise FileError(path, f"ends after {len(start)} bytes, inside the header; the download is probably incomplete")
    (version,) = struct.unpack("<I", start[4:8])
    if version in VERSIONS:
        return
    if int.from_bytes(start[4:8], "big") in VERSIONS:
        raise FileError(path, "is a big-endian GGUF file; only little-endian ones are supported")
    raise FileError(path, f"has GGUF version {version}; supported are {VERSIONS[0]} and {VERSIONS[1]}")


class _Reader:
    """A cursor over the header that never moves past the end of the file."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.at = 24
        self.end = min(len(buffer), MAX_HEADER_BYTES)
        self.item = "header"

    def fail(self, problem: str) -> FileError:
        return FileError(self.path, f"{problem} (at byte {self.at})", item=self.item)

    def take(self, count: int) -> int:
        """Move over `count` bytes that must exist; returns where they start."""
        start = self.at
        if count > self.end - start:
            if self.end < len(self.buffer):
                raise self.fail(f"the header is larger than {MAX_HEADER_BYTES} bytes")
            raise self.fail(f"needs {count} bytes, the file has {self.end - start} left; it is truncated or damaged")
        self.at = start + count
        return start

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(code, self.buffer, self.take(struct.calcsize(code)))
        return int(value)

    def text(self, limit: int, what: str) -> bytes:
        length = self.number("<Q")
        if length > limit:
            raise self.fail(f"{what} of {length} bytes exceeds the limit of {limit}")
        start = self.take(length)
        return self.buffer[start : start + length]

    def name(self, limit: int, what: str) -> str:
        raw = self.text(limit, what)
        if not raw:
            raise self.fail(f"{what} is empty")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not valid UTF-8") from error


def _read_fields(reader: _Reader, count: int) -> dict[str, object]:
    # A pair takes at least 8 bytes of key length, 4 of type and 1 of value.
    if count > (reader.end - reader.at) // 13:
        raise reader.fail(f"claims {count} key-value pairs, more than the file can hold")
    fields: dict[str, object] = {}
    for index in range(count):
        reader.item = f"key {index}"
        key = reader.name(MAX_KEY_BYTES, "a key")
        reader.item = key
        if key in fields:
            raise reader.fail("appears twice")
        fields[key] = _read_value(reader, reader.number("<I"))
    return fields


def _read_value(reader: _Reader, kind: int) -> object:
    if kind == STRING:
        return reader.text(MAX_STRING_BYTES, "a string").decode("utf-8", "surrogateescape")
    if kind == ARRAY:
        return _read_array(reader)
    if kind not in SCALARS:
        raise reader.fail(f"has unknown value type {kind}")
    return _read_numbers(reader, kind, 1)[0]


def _read_array(reader: _Reader) -> list[object]:
    kind, count = reader.number("<I"), reader.number("<Q")
    if kind == ARRAY:
        raise reader.fail("is an array of arrays, which GGUF readers do not support")
    if kind != STRING and kind not in SCALARS:
        raise reader.fail(f"is an array of unknown type {kind}")
    if count > MAX_ARRAY_ITEMS:
        raise reader.fail(f"is an array of {count} items; the limit is {MAX_ARRAY_ITEMS}")
    return _read_strings(reader, count) if kind == STRING else _read_numbers(reader, kind, count)


def _read_numbers(reader: _Reader, kind: int, count: int) -> list[object]:
    dtype = SCALARS[kind]
    start = reader.take(count * dtype.itemsize)
    raw = np.frombuffer(reader.buffer, np.uint8, count * dtype.itemsize, start)
    if kind == BOOL and raw.size and raw.max() > 1:
        raise reader.fail("holds a boolean that is neither 0 nor 1")
    return list(raw.view(dtype).tolist())


def _read_strings(reader: _Reader, count: int) -> list[object]:
    """One pass without a function call per string: a vocabulary has 130 000 tokens and as many merges."""
    if count > (reader.end - reader.at) // 8:
        raise reader.fail(f"claims {count} strings, more than the file can hold")
    buffer, at, end = reader.buffer, reader.at, reader.end
    unpack = struct.Struct("<Q").unpack_from
    out: list[object] = []
    for _ in range(count):
        start = at + 8
        if start > end:
            break
        at = start + unpack(buffer, at)[0]
        if at > end:
            break
        out.append(buffer[start:at].decode("utf-8", "surrogateescape"))
    if len(out) < count:
        raise reader.fail(f"string {len(out)} of {count} runs past the end; the file is truncated or damaged")
    reader.at = at
    return out


def _alignment(path: Path, fields: Mapping[str, object]) -> int:
    value = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int) or value < 8 or value & (value - 1):
        raise FileError(path, f"must be a power of two of at least 8, got {value!r}", item="general.alignment")
    return value


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, TensorInfo]:
    reader.item = "header"
    # An entry takes at least 8 + 1 bytes of name, 4 of dimension count, 8 of one dimension, 4 of type, 8 of offset.
    if count > (reader.end - reader.at) // 33:
        raise reader.fail(f"claims {count} tensors, more than the file can hold")
    relative = [_read_tensor(reader, index, alignment) for index in range(count)]
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for info in relative:
        if info.name in tensors:
            raise FileError(reader.path, "appears twice", item=info.name)
        offset, end = start + info.offset, start + info.offset + info.nbytes
        if end > len(reader.buffer):
            problem = f"ends at byte {end}, the file at {len(reader.buffer)}; the download is probably incomplete"
            raise FileError(reader.path, problem, item=info.name)
        tensors[info.name] = TensorInfo(info.name, info.shape, info.dtype, offset, info.nbytes)
    _check_overlap(reader.path, tensors)
    return tensors


def _read_tensor(reader: _Reader, index: int, alignment: int) -> TensorInfo:
    reader.item = f"tensor {index}"
    name = reader.name(MAX_TENSOR_NAME_BYTES, "a tensor name")
    reader.item = name
    num_dims = reader.number("<I")
    if not 1 <= num_dims <= MAX_DIMS:
        raise reader.fail(f"has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed")
    dims = tuple(reader.number("<Q") for _ in range(num_dims))
    elements = 1
    for dim in dims:
        elements *= dim
        if not 0 < elements <= MAX_ELEMENTS:
            raise reader.fail(f"has impossible dimensions {list(dims)}")
    ggml_type, offset = reader.number("<I"), reader.number("<Q")
    fmt = BY_GGML_TYPE.get(ggml_type)
    if fmt is None:
        what = UNSUPPORTED_TYPES.get(ggml_type, f"unknown type {ggml_type}")
        raise reader.fail(f"is stored as {what}; supported are {', '.join(FORMATS)}")
    if dims[0] % fmt.block:
        raise reader.fail(f"has rows of {dims[0]} values, no whole number of {fmt.name} blocks of {fmt.block}")
    if offset % alignment:
        raise reader.fail(f"starts at offset {offset}, which is not a multiple of the alignment {alignment}")
    return TensorInfo(name, dims[::-1], fmt.name, offset, elements // fmt.block * fmt.size)


def _check_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise FileError(path, f"shares bytes with {before.name}", item=after.name)
