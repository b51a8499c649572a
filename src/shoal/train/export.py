"""The finished model as a Hugging Face folder, tokenizer included, that transformers and the engine load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig
from shoal.errors import FileError
from shoal.formats.checkpoint import Array, Checkpoint, LazyTensor
from shoal.formats.hf_save import save_folder
from shoal.formats.layout import expected_tensors
from shoal.formats.tokenizer import Tokenizer, check_fits, load_tokenizer_json
from shoal.train.checkpoint import Saved, Stored
from shoal.train.replace import replaced


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The run's tokenizer, proven to fit the model.

    Raises:
        FileError: it is missing or damaged, or has more tokens than the model embeds.
    """
    tokenizer = load_tokenizer_json(
        folder, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    check_fits(tokenizer, config.vocab_size)
    return tokenizer


def saved_model(saved: Saved, config: ModelConfig) -> Checkpoint:
    """The model of a training checkpoint, read from it tensor by tensor."""
    stored = saved.parts["model"]
    tensors = {
        name: LazyTensor(
            name=name, shape=stored[name].shape, dtype="F32", source=saved.path,
            make_chunks=partial(_chunks, stored[name]),
        )
        for name in expected_tensors(config)
    }  # fmt: skip

    def nothing() -> Any:
        raise FileError(saved.path, "holds no tokenizer")

    return Checkpoint(path=saved.path, config=config, tensors=tensors, load_tokenizer=nothing, load_chat=lambda: None)


def _chunks(stored: Stored) -> Iterator[Array]:
    """Pieces follow each other along the first axis; a stack of experts comes one expert at a time."""
    for number in range(len(stored.pieces)):
        view = stored.view(number)
        yield from (view[i : i + 1] for i in range(len(view))) if view.ndim == 3 else (view,)


def export(model: Checkpoint, tokenizer_folder: Path, dst: Path, *, dtype: str) -> None:
    """Write a model to `dst`, in place of what an earlier step exported there.

    Args:
        tokenizer_folder: its `tokenizer.json`, `tokenizer_config.json`, chat template and licence are copied.

    Raises:
        FileError: the disk refuses.
    """
    checkpoint = replace(
        model,
        path=tokenizer_folder,
        load_tokenizer=lambda: load_tokenizer(tokenizer_folder, model.config),
    )
    with replaced(dst) as fresh:
        save_folder(checkpoint, fresh, dtype=dtype)
