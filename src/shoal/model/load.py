"""Between a `Model` in memory and a `Checkpoint` on disk, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.errors import FileError
from shoal.formats.checkpoint import Array, Checkpoint, GenerationDefaults, LazyTensor
from shoal.formats.layout import expected_tensors
from shoal.model.model import Model

if TYPE_CHECKING:
    from shoal.formats.chat import ChatFormat
    from shoal.formats.tokenizer import Tokenizer

# What LazyTensor can carry; anything wider goes out as float32.
_STORED_AS = {torch.bfloat16: "BF16", torch.float16: "F16"}


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Model:
    """Read a checkpoint into a model. Memory never exceeds the model and one chunk (an expert, at most a tensor).

    The selection bias of the router stays float32 whatever `dtype` is: rounded, it would pick other experts.

    Raises:
        FileError: a tensor is missing, damaged or of the wrong shape; found before any memory is taken.
    """
    checkpoint.check_complete()
    model = empty_model(checkpoint.config, dtype=dtype, device=device)
    for name, target in model.state_dict().items():
        fill(target, checkpoint.tensors[name])
    return model


def random_model(config: ModelConfig, seed: int, *, dtype: torch.dtype = torch.float32) -> Model:
    """A freshly initialised model on the CPU, the same for the same seed and dtype."""
    model = empty_model(config, dtype=dtype)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def empty_model(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Model:
    """A model whose memory is taken but not yet written."""
    with torch.device("meta"):
        model = Model(config).to(dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.float())
    return model.to_empty(device=device)


def as_checkpoint(model: Model, *, like: Checkpoint | None = None) -> Checkpoint:
    """Present a model in memory as a checkpoint, to be saved by `formats.hf_folder` or `formats.gguf_writer`.

    The tensors are read from the model when asked for, so save before training on.

    Args:
        like: where tokenizer, chat format and generation settings come from, usually the checkpoint it was loaded from.
    """
    path = like.path if like is not None else Path("model in memory")

    def no_tokenizer() -> Tokenizer:
        raise FileError(path, "this model was made without a tokenizer")

    def no_chat() -> ChatFormat | None:
        return None

    state = model.state_dict()
    tensors = {name: _lazy(name, state[name].detach(), path) for name in expected_tensors(model.config)}
    return Checkpoint(
        path=path,
        config=model.config,
        tensors=tensors,
        load_tokenizer=like.load_tokenizer if like is not None else no_tokenizer,
        load_chat=like.load_chat if like is not None else no_chat,
        generation=like.generation if like is not None else GenerationDefaults(),
    )


def fill(target: Tensor, source: LazyTensor) -> None:
    """Read a tensor, chunk by chunk, into memory that is there already. FileError if it has more or fewer rows."""
    row = 0
    for chunk in source.chunks():
        if row + len(chunk) > len(target) or chunk.shape[1:] != target.shape[1:]:
            raise FileError(source.source, f"yields more than its shape {list(source.shape)}", item=source.name)
        target[row : row + len(chunk)].copy_(to_torch(chunk))
        row += len(chunk)
    if row != len(target):
        raise FileError(source.source, f"ends after {row} of {len(target)} rows", item=source.name)


def to_torch(chunk: Array) -> Tensor:
    """A chunk of a `LazyTensor` as a tensor of the same type."""
    # torch cannot read ml_dtypes nor write-protected memory (a mapped file): reinterpret, and copy where it must.
    if chunk.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.require(chunk.view(np.int16), requirements=["W", "C"])).view(torch.bfloat16)
    return torch.from_numpy(np.require(chunk, requirements=["W", "C"]))


def _lazy(name: str, value: Tensor, path: Path) -> LazyTensor:
    return LazyTensor(
        name=name,
        shape=tuple(value.shape),
        dtype=_STORED_AS.get(value.dtype, "F32"),
        source=path,
        make_chunks=partial(_chunks, value),
    )


def _chunks(value: Tensor) -> Iterator[Array]:
    """The tensor in one piece, a stack of experts one expert at a time."""
    for piece in torch.split(value, 1) if value.dim() == 3 else (value,):
        piece = piece.cpu().contiguous()
        if piece.dtype == torch.bfloat16:
            yield piece.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield piece.to(piece.dtype if piece.dtype == torch.float16 else torch.float32).numpy()
