"""Write a quantised copy of a model: one tensor at a time, a folder that appears whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, FileError
from shoal.formats.atomic import require_empty
from shoal.formats.checkpoint import Array, Checkpoint
from shoal.formats.compressed_tensors import FIELD, pack_rows
from shoal.formats.hf_save import Progress, save_folder
from shoal.formats.safetensors import MAX_SHARD_BYTES, TensorSpec
from shoal.quant.calibrate import Importance
from shoal.quant.grids import MAX_SCALE, Grid, Quantised, quantise
from shoal.quant.recipes import GROUPS, Choice, choose, quantization_config


def quantize(
    checkpoint: Checkpoint,
    dst: str | Path,
    *,
    scheme: str,
    group: int = 32,
    tables: str = "auto",
    importance: Importance | None = None,
    threads: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write `checkpoint` as a compressed-tensors folder.

    In memory are about one tensor (one expert of a stack) and the scales of the file being written, at most an eighth
    of its size.

    Args:
        scheme: a name in `RECIPES`.
        group: columns that share a scale, 32, 64 or 128; smaller where that does not divide a matrix.
        tables: `auto`, `int8` or `bfloat16`: what becomes of the embedding and the output head (`recipes.choose`).
        importance: weights of the columns' errors (`calibrate`); all equal if None.
        threads: how many work at once; every processor that this process may use if None.

    Raises:
        FileError: `dst` is taken, the disk refuses, or a weight is not finite.
        ConfigError: unknown scheme or group, or nothing in the model can be quantised.
    """
    choice = choose(scheme, group, tables, tied=checkpoint.config.tie_word_embeddings)
    require_empty(Path(dst))
    encoder = _Encoder(choice, importance, threads or len(os.sched_getaffinity(0)))
    grids = stored_grids(checkpoint, choice)
    if not any(grids.values()):
        raise ConfigError("group", f"no matrix that is quantised has a multiple of {GROUPS[0]} columns")
    fields = {
        "torch_dtype": "bfloat16",
        FIELD: quantization_config(grids, tied=checkpoint.config.tie_word_embeddings),
    }
    save_folder(
        checkpoint, dst, max_shard_bytes=max_shard_bytes, progress=progress, encode=encoder, config_fields=fields
    )  # fmt: skip


def stored_grids(checkpoint: Checkpoint, choice: Choice) -> dict[str, Grid | None]:
    """The grid of every matrix by published name; of a stack, the first expert stands for all."""
    out: dict[str, Grid | None] = {}
    for name, tensor in checkpoint.tensors.items():
        stored = name.replace(".mlp.experts.", ".mlp.experts.0.")
        shape = tensor.shape[1:] if len(tensor.shape) == 3 else tensor.shape
        if len(shape) == 2:
            out[stored] = choice.grid(stored, shape)
    table = checkpoint.tensors["model.embed_tokens.weight"].shape
    for layer in checkpoint.config.mtp_layers:  # the copies that published files carry
        for copy in (f"model.layers.{layer}.embed_tokens.weight", f"model.layers.{layer}.shared_head.head.weight"):
            out[copy] = choice.grid(copy, table)
    return out


class _Encoder:
    """Gives the tensors that are written in place of one."""

    def __init__(self, choice: Choice, importance: Importance | None, threads: int) -> None:
        self.choice, self.importance, self.threads = choice, importance, threads

    def __call__(self, spec: TensorSpec) -> list[TensorSpec]:
        grid = self.choice.grid(spec.name, spec.shape)
        if grid is None:
            return [spec._replace(dtype=_kept_dtype(spec))]
        columns = self.importance.columns(spec.name) if self.importance else None
        return _Encoded(spec, grid, columns, self.threads).specs()


def _kept_dtype(spec: TensorSpec) -> str:
    """Vectors and routers stay as they are; matrices become bfloat16, as do float16 copies of quantised sources."""
    exact = len(spec.shape) < 2 or spec.name.endswith(".mlp.gate.weight")
    return spec.dtype if exact and spec.dtype != "F16" else "BF16"


class _Encoded:
    """One matrix [R, C]. Packing computes everything; scales and zero points wait until their turn in the file."""

    def __init__(self, spec: TensorSpec, grid: Grid, importance_C: NDArray[np.float32] | None, threads: int) -> None:
        self.spec, self.grid, self.importance, self.threads = spec, grid, importance_C, threads
        self.scales: list[NDArray[np.float32]] = []
        self.zeros: list[NDArray[np.int8]] = []

    def specs(self) -> list[TensorSpec]:
        (rows, cols), bits, source = self.spec.shape, self.grid.bits, self.spec.source
        groups, name = cols // self.grid.group, self.spec.name
        out = [
            TensorSpec(f"{name}_packed", "I32", (rows, math.ceil(cols * bits / 32)), self._packed, source),
            TensorSpec(f"{name}_scale", "BF16", (rows, groups), self._scales, source),
            TensorSpec(f"{name}_shape", "I64", (2,), lambda: iter([np.array([rows, cols])]), source),
        ]
        if not self.grid.symmetric:
            shape = (math.ceil(rows * bits / 32), groups)
            out.insert(1, TensorSpec(f"{name}_zero_point", "I32", shape, self._zero_points, source))
        return out

    def _packed(self) -> Iterator[Array]:
        self.scales, self.zeros = [], []
        for chunk in self.spec.chunks():
            quantised = self._quantise(np.asarray(chunk, np.float32))
            self.scales.append(quantised.scales)
            if quantised.zeros is not None:
                self.zeros.append(quantised.zeros)
            yield pack_rows(quantised.codes, self.grid.bits)

    def _quantise(self, weights_RC: NDArray[np.float32]) -> Quantised:
        if not np.isfinite(weights_RC).all():
            raise FileError(self.spec.source or "", "holds a value that is not finite", item=self.spec.name)
        if np.abs(weights_RC).max(initial=0) > MAX_SCALE:
            raise FileError(self.spec.source or "", f"holds values beyond {MAX_SCALE:.0f}", item=self.spec.name)
        return quantise(weights_RC, self.grid, self.importance, threads=self.threads)

    def _zero_points(self) -> Iterator[Array]:
        zeros_RG, self.zeros = np.concatenate(self.zeros), []
        yield np.ascontiguousarray(pack_rows(np.ascontiguousarray(zeros_RG.T), self.grid.bits).T)

    def _scales(self) -> Iterator[Array]:
        scales, self.scales = self.scales, []
        return iter(scales)
