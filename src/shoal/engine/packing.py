"""Weights from a checkpoint into the packed layout of the kernels (native/include/shoal/packed.h)."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError
from shoal.formats.checkpoint import LazyTensor
from shoal.kernels import native

PACKINGS = {"f32": 0, "bf16": 1, "q8": 2, "q4": 3, "q4m": 4}
# What a file's own storage becomes when nothing else is asked for: the same codes where a packing holds them.
OWN_PACKING = {"Q8_0": "q8", "Q4_0": "q4", "Q4_1": "q4m", "Q4_K": "q4m", "BF16": "bf16", "F32": "f32", "F16": "f32"}
# Likewise for whole numbers of 1 to 8 bits with scales; U has minima.
CODE_PACKING = {f"I{bits}": "q4" if bits <= 4 else "q8" for bits in range(1, 9)}
CODE_PACKING |= {f"U{bits}": "q4m" if bits <= 4 else "q8" for bits in range(1, 9)}
_SOURCES = {"F32": 0, "BF16": 1, "F16": 2, "Q8_0": 3, "Q4_0": 4, "Q4_1": 5, "Q4_K": 6}
_CODES = 7
_GROUP = 32


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Fresh memory in large pages where the system offers them: fewer faults when it is filled, fewer look-ups when it
    is streamed."""
    block = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8, size)


def packing_for(tensor: LazyTensor, scheme: str) -> str:
    """The packing of a weight matrix under a scheme: `auto` keeps what the file holds, others name a packing."""
    if scheme == "auto":
        return _own_packing(tensor)
    if scheme not in PACKINGS:
        raise ConfigError("weights", f"{scheme!r} is not one of auto, {', '.join(PACKINGS)}")
    return scheme


def _own_packing(tensor: LazyTensor) -> str:
    """8 bits for what no packing holds as it is: rounding once more to 4 would cost as much as the first time."""
    if tensor.codes is not None:
        return CODE_PACKING[tensor.dtype.partition("_")[0]]
    return OWN_PACKING.get(tensor.dtype, "q8")


def pack_tensor(tensor: LazyTensor, packing: str, threads: int = 1) -> native.Packed:
    """Pack a matrix [rows, cols], or a stack [count, rows, cols] one matrix at a time, so that beside the result there
    is never more than one matrix in memory."""
    *stack, rows, cols = tensor.shape
    count = int(np.prod(stack)) if stack else 1
    size = native.packed_bytes(PACKINGS[packing], rows, cols)
    memory = aligned_bytes(size * count)
    if tensor.codes is not None and _own_packing(tensor) == packing:
        for index, (codes, scales, minima) in enumerate(tensor.codes()):
            out = memory[index * size : (index + 1) * size]
            group = -(-cols // scales.shape[1] // _GROUP) * _GROUP
            data = np.ascontiguousarray(codes).view(np.uint8)
            native.pack(_CODES, data, rows, cols, PACKINGS[packing], out, threads, scales, minima, group)
        return native.Packed(PACKINGS[packing], rows, cols, memory, count)
    for index, (source, data) in enumerate(_matrices(tensor, packing, count, rows)):
        out = memory[index * size : (index + 1) * size]
        native.pack(_SOURCES[source], data, rows, cols, PACKINGS[packing], out, threads)
    tensor.release()
    return native.Packed(PACKINGS[packing], rows, cols, memory, count)


def pack_array(array: NDArray[np.float32], packing: str, threads: int = 1) -> native.Packed:
    """Pack float32 [rows, cols] or [count, rows, cols]."""
    *stack, rows, cols = array.shape
    count = int(np.prod(stack)) if stack else 1
    size = native.packed_bytes(PACKINGS[packing], rows, cols)
    memory = aligned_bytes(size * count)
    flat = np.ascontiguousarray(array, np.float32).reshape(count, rows, cols)
    for index in range(count):
        data = flat[index].view(np.uint8)
        native.pack(0, data, rows, cols, PACKINGS[packing], memory[index * size : (index + 1) * size], threads)
    return native.Packed(PACKINGS[packing], rows, cols, memory, count)


def _matrices(tensor: LazyTensor, packing: str, count: int, rows: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(source kind, bytes [rows, row bytes]) of every matrix of the stack."""
    same_codes = tensor.raw_blocks is not None and OWN_PACKING.get(tensor.dtype) == packing
    if same_codes and tensor.raw_blocks is not None and tensor.dtype in _SOURCES:
        blocks = tensor.raw_blocks()
        for index in range(count):
            yield tensor.dtype, np.ascontiguousarray(blocks[index * rows : (index + 1) * rows])
        return
    for chunk in _row_chunks(tensor, count, rows):
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[chunk.dtype.name]
        yield kind, np.ascontiguousarray(chunk).view(np.uint8).reshape(rows, -1)


def _row_chunks(tensor: LazyTensor, count: int, rows: int) -> Iterator[NDArray[np.generic]]:
    if count > 1:
        for chunk in tensor.chunks():
            yield from chunk.reshape(-1, rows, tensor.shape[-1])
        return
    chunks = list(tensor.chunks())
    whole = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    yield whole.reshape(rows, tensor.shape[-1])
