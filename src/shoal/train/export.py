"""The finished model as a Hugging Face folder, tokenizer included, that transformers and the engine load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shoal.config import ModelConfig
from shoal.formats.hf_save import save_folder
from shoal.formats.tokenizer import Tokenizer, check_fits, load_tokenizer_json
from shoal.model import Model, as_checkpoint
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


def export(model: Model, tokenizer_folder: Path, dst: Path, *, dtype: str) -> None:
    """Write the model to `dst`, in place of what an earlier step exported there.

    Args:
        tokenizer_folder: its `tokenizer.json`, `tokenizer_config.json`, chat template and licence are copied.

    Raises:
        FileError: the disk refuses.
    """
    checkpoint = replace(
        as_checkpoint(model),
        path=tokenizer_folder,
        load_tokenizer=lambda: load_tokenizer(tokenizer_folder, model.config),
    )
    with replaced(dst) as fresh:
        save_folder(checkpoint, fresh, dtype=dtype)
