"""Hugging Face folders opened as a Checkpoint (`hf_save` writes them).

On disk the experts of a layer are separate tensors (`mlp.experts.7.gate_proj.weight`); here they are one stack, read an
expert at a time. Fused stacks as transformers keeps them in memory (`mlp.experts.gate_up_proj` [E, 2F, D], gate rows
first, and `mlp.experts.down_proj` [E, D, F]) are read too. Weights may be DeepSeek's FP8 or compressed-tensors.

Shape letters: D hidden_size, E experts, F expert width.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.config import ModelConfig
from shoal.errors import ConfigError, FileError
from shoal.formats import fp8
from shoal.formats.check import BadTensor, check_tensors
from shoal.formats.checkpoint import Array, Checkpoint, CodeTriple, GenerationDefaults, LazyTensor
from shoal.formats.compressed_tensors import ACTIVATION_PARTS, FIELD, StoredMatrix
from shoal.formats.hf_config import HfConfig, read_config, read_json, token_ids
from shoal.formats.hf_save import save_folder
from shoal.formats.hf_shards import inside, open_shards
from shoal.formats.layout import expected_tensors
from shoal.formats.safetensors import SafetensorsFile, slices

if TYPE_CHECKING:
    from shoal.formats.chat import ChatFormat
    from shoal.formats.tokenizer import Tokenizer

__all__ = ["BadTensor", "check_tensors", "open_folder", "save_folder"]

FLOATS = ("F32", "F16", "BF16")
# Buffers that old checkpoints carry and that follow from the configuration.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|self_attn\.masked_bias)$")
_EXPERTS = re.compile(r"(?P<prefix>.*\.mlp\.experts\.)(?P<part>gate_proj|up_proj|down_proj)\.weight$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)$")
_MTP_COPIES = re.compile(r"(embed_tokens|shared_head\.head)\.weight(_packed|_scale|_shape|_zero_point)?$")


def open_folder(path: str | Path) -> Checkpoint:
    """Open a folder with `config.json` and safetensors. Only headers are read; weights are mapped and read on demand.

    Raises:
        FileError: something in the folder is missing, damaged, hostile, or does not fit its `config.json`.
    """
    folder = Path(path)
    found = read_config(inside(folder, "config.json"))
    shards = open_shards(folder)
    config, generation = _with_generation(folder, _without_absent_mtp(folder, found.model, shards))
    reader = _Reader(folder, replace(found, model=config), shards)
    checkpoint = Checkpoint(
        path=folder,
        config=config,
        tensors=reader.tensors(),
        load_tokenizer=lambda: _load_tokenizer(folder, config),
        load_chat=lambda: _load_chat(folder),
        generation=generation,
    )
    checkpoint.check_complete()
    reader.check_leftovers()
    return checkpoint


def _load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    from shoal.formats import tokenizer

    return tokenizer.load_tokenizer_json(
        folder,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _load_chat(folder: Path) -> ChatFormat | None:
    from shoal.formats import chat

    return chat.load_chat(folder)


def _without_absent_mtp(folder: Path, config: ModelConfig, shards: dict[str, SafetensorsFile]) -> ModelConfig:
    """transformers announces MTP layers in the configuration it saves, but saves none."""
    prefixes = tuple(f"model.layers.{layer}." for layer in config.mtp_layers)
    if not prefixes or any(name.startswith(prefixes) for name in shards):
        return config
    warnings.warn(
        f"{folder}: config.json announces {len(prefixes)} MTP layer(s) but the files hold none; going on without",
        stacklevel=3,
    )
    return replace(config, num_nextn_predict_layers=0)


def _with_generation(folder: Path, config: ModelConfig) -> tuple[ModelConfig, GenerationDefaults]:
    """`generation_config.json` has the last word on the tokens that end a text, and may recommend sampling settings."""
    if not (folder / "generation_config.json").exists():
        return config, GenerationDefaults()
    path = inside(folder, "generation_config.json")
    raw = read_json(path)
    try:
        if raw.get("eos_token_id") is not None:
            config = replace(config, eos_token_id=token_ids(raw["eos_token_id"]))
        return config, GenerationDefaults(
            temperature=_number(raw, "temperature"),
            top_p=_number(raw, "top_p"),
            top_k=_whole_number(raw, "top_k"),
            min_p=_number(raw, "min_p"),
        )
    except ConfigError as error:
        raise FileError(path, str(error).removeprefix(f"{error.field}: "), item=error.field) from error


def _number(raw: dict[str, Any], name: str) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(name, f"must be a number of at least 0, got {value!r}")
    return float(value)


def _whole_number(raw: dict[str, Any], name: str) -> int | None:
    value = _number(raw, name)
    if value is None:
        return None
    if not value.is_integer():
        raise ConfigError(name, f"must be a whole number, got {raw[name]!r}")
    return int(value)


class _Reader:
    """Finds every tensor of the configuration among the names on disk and remembers which names it used."""

    def __init__(self, folder: Path, found: HfConfig, shards: dict[str, SafetensorsFile]) -> None:
        self.folder = folder
        self.config = found.model
        self.block = found.fp8_block
        self.compression = found.compression
        self.shards = shards
        self.used: set[str] = set()

    def tensors(self) -> dict[str, LazyTensor]:
        out: dict[str, LazyTensor] = {}
        for name, shape in expected_tensors(self.config).items():
            experts = _EXPERTS.fullmatch(name)
            if experts is not None and name not in self.shards:
                tensor = self._stack(name, experts, shape[1:])
            else:
                tensor = self._plain(name, shape)
            if tensor is not None:
                out[name] = tensor
        return out

    def _plain(self, name: str, shape: tuple[int, ...]) -> LazyTensor | None:
        matrix = self._quantised(name, shape)
        if matrix is not None:
            return self._from_matrices(name, shape, [matrix])
        if name not in self.shards:
            return None
        file = self.shards[name]
        entry = file.entries[name]
        return LazyTensor(
            name=name, shape=entry.shape, dtype=entry.dtype, source=file.path, make_chunks=self._chunks(name)
        )

    def _quantised(self, name: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """The matrix if it is stored as compressed-tensors says."""
        packed = f"{name}_packed"
        if packed not in self.shards and not (
            self.compression and name in self.shards and self.shards[name].entries[name].dtype in ("I8", "F8_E4M3")
        ):
            return None
        stored = packed if packed in self.shards else name
        file = self.shards[stored]
        module = name.removesuffix(".weight")
        scheme = self.compression.scheme(module) if self.compression else None
        if scheme is None:
            raise FileError(file.path, f"is quantised, but no target of {FIELD} in config.json covers it", item=stored)
        if len(shape) != 2:
            raise FileError(file.path, "is quantised, but no matrix", item=stored)
        matrix = StoredMatrix(self.shards, name, (shape[0], shape[1]), scheme)
        self.used |= matrix.names
        return matrix

    def _from_matrices(self, name: str, shape: tuple[int, ...], matrices: list[StoredMatrix]) -> LazyTensor:
        """One matrix, or a stack of them."""
        schemes = {matrix.scheme for matrix in matrices}

        def chunks() -> Iterator[Array]:
            if len(shape) == 2:
                yield from matrices[0].chunks()
            else:
                for matrix in matrices:
                    yield np.concatenate(list(matrix.chunks()))[None]

        def codes() -> Iterator[CodeTriple]:
            return (matrix.codes() for matrix in matrices)

        return LazyTensor(
            name=name, shape=shape, dtype=matrices[0].scheme.dtype, source=matrices[0].source, make_chunks=chunks,
            codes=codes if len(schemes) == 1 and matrices[0].has_codes else None,
        )  # fmt: skip

    def _stack(self, name: str, experts: re.Match[str], shape: tuple[int, ...]) -> LazyTensor | None:
        assert self.config.moe is not None
        prefix, part = experts["prefix"], experts["part"]
        names = [f"{prefix}{index}.{part}.weight" for index in range(self.config.moe.n_routed_experts)]
        matrices = [matrix for one in names if (matrix := self._quantised(one, shape)) is not None]
        if len(matrices) == len(names):
            return self._from_matrices(name, (len(names), *shape), matrices)
        if matrices:
            raise FileError(self.folder, "has experts that are quantised and others that are not", item=name)
        if names[0] not in self.shards:
            return self._fused(name, prefix, part)
        for one in names:
            if one not in self.shards:
                raise FileError(self.folder, "is missing; the configuration asks for it", item=one)
            if self._shape(one) != self._shape(names[0]):
                problem = f"has shape {list(self._shape(one))}, unlike expert 0 with {list(self._shape(names[0]))}"
                raise FileError(self.shards[one].path, problem, item=one)
        readers = [self._chunks(one) for one in names]

        def chunks() -> Iterator[Array]:
            for one, read in zip(names, readers, strict=True):
                bands = list(read())
                yield (bands[0] if len(bands) == 1 else np.concatenate(bands))[None]
                self.shards[one].release(one)

        first = self.shards[names[0]]
        return LazyTensor(
            name=name,
            shape=(len(names), *self._shape(names[0])),
            dtype=first.entries[names[0]].dtype,
            source=first.path,
            make_chunks=chunks,
        )

    def _fused(self, name: str, prefix: str, part: str) -> LazyTensor | None:
        stored = f"{prefix}down_proj" if part == "down_proj" else f"{prefix}gate_up_proj"
        if stored not in self.shards:
            return None
        file = self.shards[stored]
        entry = file.entries[stored]
        if entry.dtype not in FLOATS or len(entry.shape) != 3:
            raise FileError(file.path, f"is {entry.dtype} {list(entry.shape)}, not a stack of experts", item=stored)
        self.used.add(stored)
        count, rows, cols = entry.shape
        half = rows // 2
        span = {"gate_proj": slice(0, half), "up_proj": slice(half, rows), "down_proj": slice(0, rows)}[part]

        def chunks() -> Iterator[Array]:
            view_EFD = file.view(stored)
            for index in range(count):
                yield view_EFD[index : index + 1, span]
            file.release(stored)

        shape = (count, span.stop - span.start, cols)
        return LazyTensor(name=name, shape=shape, dtype=entry.dtype, source=file.path, make_chunks=chunks)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.shards[name].entries[name].shape

    def _chunks(self, name: str) -> Callable[[], Iterator[Array]]:
        """How to read one stored tensor as floats; FP8 weights are multiplied by their scales."""
        file = self.shards[name]
        entry = file.entries[name]
        self.used.add(name)
        scale = name + fp8.SCALE_SUFFIX
        if entry.dtype == "F8_E4M3":
            return self._fp8_chunks(name, scale)
        if entry.dtype not in (*FLOATS, "F64"):
            raise FileError(file.path, f"is stored as {entry.dtype}, which is no supported weight", item=name)
        if scale in self.shards:
            raise FileError(file.path, f"has a scale although it is stored as {entry.dtype}", item=name)

        def chunks() -> Iterator[Array]:
            view = file.view(name)
            yield view.astype(np.float32) if entry.dtype == "F64" else view
            file.release(name)

        return chunks

    def _fp8_chunks(self, name: str, scale: str) -> Callable[[], Iterator[Array]]:
        file = self.shards[name]
        if scale not in self.shards:
            raise FileError(file.path, "is FP8 without its scale", item=scale)
        scales = self.shards[scale]  # often another shard
        block = self.block or fp8.BLOCK
        entry = scales.entries[scale]
        fp8.check_scale(scales.path, name, self._shape(name), (entry.dtype, entry.shape), block)
        self.used.add(scale)

        def chunks() -> Iterator[Array]:
            yield from fp8.dequantise_bands(file.view(name), scales.view(scale), block)
            file.release(name)

        return chunks

    def check_leftovers(self) -> None:
        """Refuse tensors of the network that the configuration has no place for; name others in one warning."""
        strangers = []
        for name in sorted(self.shards.keys() - self.used):
            layer = _LAYER.fullmatch(name)
            number = int(layer[1]) if layer else -1
            if self.compression and name.rpartition(".")[2] in ACTIVATION_PARTS:
                continue
            if _DERIVED.match(name) or (number in self.config.mtp_layers and layer and _MTP_COPIES.match(layer[2])):
                continue
            if name.startswith("lm_head.weight") and self.config.tie_word_embeddings:
                self._check_tied(name)
            elif self._is_unwanted_mtp(number) or not name.startswith(("model.", "lm_head.")):
                strangers.append(name)
            else:
                problem = "has no place in the model that config.json describes"
                raise FileError(self.shards[name].path, problem, item=name)
        if strangers:
            shown = ", ".join(strangers[:3]) + (" …" if len(strangers) > 3 else "")
            warnings.warn(f"{self.folder}: {len(strangers)} tensor(s) left unread: {shown}", stacklevel=4)

    def _is_unwanted_mtp(self, layer: int) -> bool:
        """An MTP layer past those that the configuration asks for."""
        last = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        return layer >= last and f"model.layers.{layer}.enorm.weight" in self.shards

    def _check_tied(self, name: str) -> None:
        twin = name.replace("lm_head", "model.embed_tokens")
        same = twin in self.shards
        if same:
            ours, theirs = self.shards[name].view(name), self.shards[twin].view(twin)
            same = ours.shape == theirs.shape and all(
                np.array_equal(one, other) for one, other in zip(slices(ours), slices(theirs), strict=True)
            )
        if not same:
            problem = f"differs from {twin}, but config.json says tie_word_embeddings"
            raise FileError(self.shards[name].path, problem, item=name)
