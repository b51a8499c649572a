"""A tokenizer of one's own: byte-level BPE over the kept documents, in the layout that every reader understands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shoal.formats.atomic import atomic_folder
from shoal.formats.digest import file_digest
from shoal.formats.tokenizer import Tokenizer, load_tokenizer_json

# Digits one by one, else GPT-4's way of cutting text: contractions, words with one leading mark, marks, line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SAMPLE_BYTES = 256 << 20  # of text: more changes the vocabulary little
MAX_PIECE = 1 << 20  # characters given to the trainer at once


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary and write `tokenizer.json` and its companions into a new folder.

    Args:
        texts: what to learn from; `sampled` bounds them.
        vocab_size: ids in all, special tokens included; the result is smaller if the text does not hold that many.

    Raises:
        FileError: the folder holds something already.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_pieces(texts), trainer)
    with atomic_folder(folder) as temporary:
        library.save(str(temporary / "tokenizer.json"))
        # Special tokens come first, in this order.
        tokenizer = load_tokenizer_json(temporary, bos_token_id=0, eos_token_ids=[1], pad_token_id=2)
        tokenizer.save(temporary)
    return load_tokenizer_json(folder)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder with `tokenizer.json`, or of a model by name, folder or GGUF file."""
    folder = Path(name)
    if (folder / "tokenizer.json").is_file() and not (folder / "config.json").is_file():
        return load_tokenizer_json(folder)
    from shoal import hub
    from shoal.formats.checkpoint import open_checkpoint

    return open_checkpoint(hub.resolve(name)).load_tokenizer()


def digest(folder: Path) -> str:
    """SHA-256 of a folder's `tokenizer.json`: how packed tokens say which tokenizer made them."""
    return file_digest(folder / "tokenizer.json")


def sampled(documents: Iterable[Any], total: int, *, seed: int, most: int = SAMPLE_BYTES) -> Iterator[str]:
    """Texts of those documents whose hash falls into the share that `most` is of `total` characters."""
    share = min(1.0, most / max(total, 1))
    for document in documents:
        draw = hashlib.blake2b(f"{seed} {document.id}".encode("utf-8", "replace"), digest_size=8).digest()
        if int.from_bytes(draw, "little") < share * 2**64:
            yield document.text


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (text[at : at + MAX_PIECE] for at in range(0, len(text), MAX_PIECE))
