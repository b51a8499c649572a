"""Save a Checkpoint as a Hugging Face folder, one tensor at a time.

Names and fields are the published ones: one tensor per expert, and MTP layers with the copies of the embedding and the
output head that DeepSeek-V3's own files carry.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig
from shoal.errors import ConfigError, FileError
from shoal.formats.atomic import atomic_file, atomic_folder
from shoal.formats.checkpoint import Array, Checkpoint, LazyTensor
from shoal.formats.hf_config_write import generation_to_hf, to_hf
from shoal.formats.hf_shards import inside
from shoal.formats.safetensors import MAX_SHARD_BYTES, TensorSpec, write_sharded

Progress = Callable[[int, int], None]
Encode = Callable[[TensorSpec], Sequence[TensorSpec]]
DTYPE_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What travels with the weights, byte for byte, from one Hugging Face folder to another.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
_EXPERTS = re.compile(r"(?P<prefix>.*\.mlp\.experts\.)(?P<part>\w+\.weight)$")


def save_folder(
    checkpoint: Checkpoint,
    dst: str | Path,
    *,
    dtype: str = "keep",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    encode: Encode | None = None,
    config_fields: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json`, safetensors, tokenizer and chat template; the folder appears whole or not at all.

    Args:
        dst: a path that is free, or an empty folder.
        dtype: `keep`, `float32`, `bfloat16` or `float16`. `keep` stores floats as they are, FP8 as bfloat16 and
            block-quantised weights as float16, which holds their values most closely. The router's selection bias is
            never narrowed: rounded, it would pick other experts.
        progress: called with the bytes written so far and in all.
        encode: gives the tensors to write in place of each one, such as packed codes and their scales.
        config_fields: added to `config.json`, such as what `encode` did.

    Raises:
        FileError: `dst` is taken, the disk refuses, or the source turns out to be damaged.
        ConfigError: the family's `config.json` cannot express this model, or `dtype` is unknown.
    """
    if dtype != "keep" and dtype not in DTYPE_CODES:
        raise ConfigError("dtype", f"{dtype!r} is not one of keep, {', '.join(DTYPE_CODES)}")
    dst = Path(dst)
    checkpoint.check_complete()
    specs = list(_specs(checkpoint, dtype))
    config = {**to_hf(checkpoint.config, torch_dtype=_main_dtype(specs)), **(config_fields or {})}
    if encode is not None:
        specs = [encoded for spec in specs for encoded in encode(spec)]
    total = sum(spec.nbytes for spec in specs)
    done = 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        if progress is not None:
            progress(done, total)

    with atomic_folder(dst) as folder:
        write_sharded(folder, specs, max_shard_bytes=max_shard_bytes, progress=count)
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", generation_to_hf(checkpoint.config, checkpoint.generation))
        _save_text_side(checkpoint, folder)


def _specs(checkpoint: Checkpoint, dtype: str) -> Iterator[TensorSpec]:
    for tensor in checkpoint.tensors.values():
        code = _target(tensor, dtype)
        experts = _EXPERTS.fullmatch(tensor.name)
        if experts is None:
            yield TensorSpec(tensor.name, code, tensor.shape, tensor.chunks, tensor.source)
            continue
        stream = _ExpertStream(tensor)
        for index in range(tensor.shape[0]):
            name = f"{experts['prefix']}{index}.{experts['part']}"
            yield TensorSpec(name, code, tensor.shape[1:], stream.reader(index), tensor.source)
    yield from _mtp_copies(checkpoint.config, checkpoint, dtype)


def _target(tensor: LazyTensor, dtype: str) -> str:
    if dtype != "keep":
        return "F32" if tensor.name.endswith(".e_score_correction_bias") else DTYPE_CODES[dtype]
    if tensor.dtype in DTYPE_CODES.values():
        return tensor.dtype
    return {"F8_E4M3": "BF16", "F64": "F32"}.get(tensor.dtype, "F16")


def _mtp_copies(config: ModelConfig, checkpoint: Checkpoint, dtype: str) -> Iterator[TensorSpec]:
    embed = checkpoint.tensors["model.embed_tokens.weight"]
    head = embed if config.tie_word_embeddings else checkpoint.tensors["lm_head.weight"]
    for layer in config.mtp_layers:
        for name, source in (("embed_tokens.weight", embed), ("shared_head.head.weight", head)):
            target = f"model.layers.{layer}.{name}"
            yield TensorSpec(target, _target(source, dtype), source.shape, source.chunks, source.source)


class _ExpertStream:
    """Hands out the experts of a stack one by one. In order, the stack is read once; otherwise it starts again."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self.experts: Iterator[Array] = iter(())
        self.next = -1

    def reader(self, index: int) -> Callable[[], Iterator[Array]]:
        return lambda: iter([self._take(index)])

    def _take(self, index: int) -> Array:
        if index != self.next:
            self.experts = (expert for chunk in self.tensor.chunks() for expert in chunk)
            self.next = 0
        while True:
            expert = next(self.experts)
            self.next += 1
            if self.next == index + 1:
                return expert


def _main_dtype(specs: list[TensorSpec]) -> str:
    """The type of most of the weights, which is what `torch_dtype` promises."""
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += spec.nbytes
    code = sizes.most_common(1)[0][0]
    return next(name for name, value in DTYPE_CODES.items() if value == code)


def _save_text_side(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template and licence: copied from a folder, written anew for anything else."""
    source = checkpoint.path
    if source.is_dir():
        extra = sorted(f"{TEMPLATES}/{path.name}" for path in (source / TEMPLATES).glob("*.jinja"))
        for name in (*SIDE_FILES, *extra):
            if (source / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(inside(source, name), folder / name)
        return
    try:
        checkpoint.load_tokenizer().save(folder)
    except FileError as error:
        warnings.warn(f"saved without a tokenizer: {error}", stacklevel=3)
        return
    chat = checkpoint.load_chat()
    if chat is not None:
        chat.save(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as out:
        out.write(json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8") + b"\n")
