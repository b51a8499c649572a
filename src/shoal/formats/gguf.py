"""GGUF files as models: llama, qwen2, qwen3 and deepseek2, in one file or in shards named `…-00001-of-00003.gguf`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import FileError
from shoal.formats.checkpoint import Checkpoint, GenerationDefaults
from shoal.formats.gguf_file import GGUFFile, read_gguf
from shoal.formats.gguf_metadata import Fields, read_config
from shoal.formats.gguf_names import read_tensors
from shoal.formats.gguf_writer import write_gguf

if TYPE_CHECKING:
    from shoal.formats.chat import ChatFormat
    from shoal.formats.tokenizer import Tokenizer

__all__ = ["open_gguf", "read_gguf", "write_gguf"]

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
MAX_SHARDS = 1000


def open_gguf(path: str | Path) -> Checkpoint:
    """Open a GGUF model; of a sharded one, give the first shard. Nothing heavy is read.

    Raises:
        FileError: the file is damaged or truncated, a tensor is missing, misshapen or unknown, or the architecture or a
            storage type is unsupported.
        ConfigError: its metadata do not make a model.
    """
    path = Path(path)
    files = _read_shards(path)
    first = files[0]
    config = read_config(files)

    def load_tokenizer() -> Tokenizer:
        from shoal.formats.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(first.fields, where=path)

    def load_chat() -> ChatFormat | None:
        from shoal.formats.chat import chat_from_gguf

        return chat_from_gguf(first.fields, where=path)

    return Checkpoint(
        path=path,
        config=config,
        tensors=read_tensors(files, config),
        load_tokenizer=load_tokenizer,
        load_chat=load_chat,
        generation=_read_generation(Fields(files)),
    )


def _read_shards(path: Path) -> list[GGUFFile]:
    first = read_gguf(path)
    count = first.fields.get("split.count", 1)
    if count in (0, 1):
        return [first]
    match = _SHARD.fullmatch(path.name)
    if not isinstance(count, int) or not 1 < count <= MAX_SHARDS:
        raise FileError(path, f"must lie between 1 and {MAX_SHARDS}, got {count!r}", item="split.count")
    if match is None or int(match[3]) != count:
        raise FileError(path, f"is one of {count} shards but is not named …-00001-of-{count:05d}.gguf")
    if int(match[2]) != 1:
        raise FileError(path, f"is shard {int(match[2])} of {count}; open {match[1]}-00001-of-{count:05d}.gguf")
    others = [read_gguf(path.with_name(f"{match[1]}-{index:05d}-of-{count:05d}.gguf")) for index in range(2, count + 1)]
    return [first, *others]


def _read_generation(fields: Fields) -> GenerationDefaults:
    def number(key: str) -> float | None:
        return fields.number(f"general.sampling.{key}") if fields.has(f"general.sampling.{key}") else None

    return GenerationDefaults(
        temperature=number("temp"),
        top_p=number("top_p"),
        top_k=fields.optional("general.sampling.top_k"),
        min_p=number("min_p"),
    )
