"""One model format into another, streaming: never more than about one tensor (one expert of a stack) is in memory."""

from __future__ import annotations

from pathlib import Path

from shoal.errors import FileError
from shoal.formats.adapter import load_adapter, merge
from shoal.formats.checkpoint import open_checkpoint
from shoal.formats.hf_save import DTYPE_CODES, Progress, save_folder
from shoal.formats.safetensors import MAX_SHARD_BYTES


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str = "keep",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    adapter: str | Path | None = None,
) -> None:
    """Write the model at `src`, a Hugging Face folder or a GGUF file, to `dst`.

    Args:
        dst: a path ending in `.gguf` becomes a GGUF file, any other a Hugging Face folder. It must be free.
        dtype: `keep`, `float32`, `float16` or `bfloat16` (also `F32`, `F16`, `BF16`); for GGUF also the block types
            that `gguf_writer.write_gguf` knows, in either case.
        max_shard_bytes: a folder's safetensors are split into files of about this size.
        progress: called with the bytes written so far and in all.
        adapter: a PEFT folder of a LoRA that is merged into the weights.

    Raises:
        ShoalError: see `open_checkpoint`, `save_folder` and `write_gguf`. Nothing half-written is left behind.
    """
    dst = Path(dst)
    if dst.suffix == ".gguf" and dst.exists():
        raise FileError(dst, "already exists")
    checkpoint = open_checkpoint(src)
    if adapter is not None:
        checkpoint = merge(checkpoint, load_adapter(adapter))
    if dst.suffix == ".gguf":
        from shoal.formats.gguf_writer import write_gguf

        write_gguf(checkpoint, dst, dtype=_gguf_dtype(dtype), progress=progress)
    else:
        save_folder(checkpoint, dst, dtype=_folder_dtype(dtype), max_shard_bytes=max_shard_bytes, progress=progress)


def _gguf_dtype(dtype: str) -> str:
    return dtype if dtype == "keep" else DTYPE_CODES.get(dtype, dtype.upper())


def _folder_dtype(dtype: str) -> str:
    return next((name for name, code in DTYPE_CODES.items() if code == dtype.upper()), dtype)
