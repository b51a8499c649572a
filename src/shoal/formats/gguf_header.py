"""The GGUF container, written: the header that precedes the tensors' bytes. `gguf_file` is the way back."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Protocol

from shoal.formats.gguf_file import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, STRING
from shoal.formats.gguf_quants import FORMATS

VERSION = 3
U32, I32, F32, I64 = 4, 5, 6, 11


class Entry(Protocol):
    """What the table of tensors says about one: name, shape (rows first), type, and how many bytes follow."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


def aligned(size: int) -> int:
    """`size` rounded up to the alignment that every tensor starts at."""
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def pack_header(fields: Mapping[str, object], tensors: Sequence[Entry]) -> bytes:
    """All bytes before the first tensor. Fields that are None or an empty list are left out.

    Raises:
        TypeError: GGUF has no type for a value.
    """
    kept = {key: value for key, value in fields.items() if value is not None and value != []}
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(kept))]
    for key, value in kept.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts += [_text(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", FORMATS[tensor.dtype].ggml_type, offset))
        offset += aligned(tensor.nbytes)
    header = b"".join(parts)
    return header + bytes(aligned(len(header)) - len(header))


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> bytes:
    if isinstance(value, list):
        kind = _kind(value)
        body = b"".join(_item(kind, item) for item in value)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + body
    kind = _kind([value])
    if kind == I32 and isinstance(value, int) and value >= 0:
        kind = U32
    return struct.pack("<I", kind) + _item(kind, value)


def _kind(values: list[object]) -> int:
    """The narrowest of the usual types that holds all of `values`: bool, int32, int64, float32 or string."""
    if all(isinstance(value, str) for value in values):
        return STRING
    if all(isinstance(value, bool) for value in values):
        return BOOL
    if all(isinstance(value, int) for value in values):
        return I32 if all(-(1 << 31) <= value < 1 << 31 for value in values) else I64  # type: ignore[operator]
    if all(isinstance(value, (int, float)) for value in values):
        return F32
    raise TypeError(f"GGUF cannot hold {values[0]!r}")


def _item(kind: int, value: object) -> bytes:
    if kind == STRING:
        return _text(str(value))
    return struct.pack({BOOL: "<?", U32: "<I", I32: "<i", I64: "<q", F32: "<f"}[kind], value)
