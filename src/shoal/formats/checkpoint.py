"""A model on disk in any format: configuration, lazily read tensors under Shoal's names, tokenizer, chat format."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

from shoal.config import ModelConfig
from shoal.errors import FileError, UnknownModelError
from shoal.formats.layout import expected_tensors

if TYPE_CHECKING:
    from shoal.formats.chat import ChatFormat
    from shoal.formats.tokenizer import Tokenizer

Array = NDArray[np.generic]
CodeTriple = tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32] | None]


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """One tensor that is read only when asked for.

    Attributes:
        name: Shoal's name (`formats.layout`).
        shape: logical shape, rows first, whatever the file's own order is.
        dtype: how it is stored: `F32`, `F16`, `BF16`, `F8_E4M3`, `Q4_1`, …
        source: the file that holds it (the first one, if it is spread over several).
        make_chunks: yields float arrays (float32, float16 or bfloat16) whose concatenation along the first axis is the
            tensor. A stack of experts yields one expert at a time, so a conversion never holds the whole stack.
        raw_blocks: for block-quantised storage, the stored bytes as uint8 [rows, bytes of a row] in logical row order
            (all leading axes flattened into rows); None for other storage.
        codes: for whole numbers with scales, matrix by matrix of a stack: codes int8 [rows, cols], scales float32
            [rows, groups] and minima of the same shape or None; weight = scale · code + minimum. A group is a multiple
            of 32 columns, or all of them. None for other storage.
        split: for an MLA `kv_b_proj` that the file holds as the two halves of absorbed attention, those halves as
            stored: W_k^b transposed [N, C, H] and W_v^b [N, V, C].
        release: lets the operating system drop the file's pages that were read for it; they can be read again.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: Path
    make_chunks: Callable[[], Iterator[Array]] = field(repr=False)
    raw_blocks: Callable[[], NDArray[np.uint8]] | None = field(default=None, repr=False)
    codes: Callable[[], Iterator[CodeTriple]] | None = field(default=None, repr=False)
    split: tuple[LazyTensor, LazyTensor] | None = field(default=None, repr=False)
    release: Callable[[], None] = field(default=lambda: None, repr=False)

    def chunks(self) -> Iterator[Array]:
        return self.make_chunks()

    def read(self, dtype: DTypeLike = np.float32) -> Array:
        """The whole tensor in memory as `dtype`, a fresh array unless the file's own bytes already fit."""
        chunks = self.make_chunks()
        first = next(chunks)
        if first.shape == self.shape:
            return first.astype(dtype, copy=False)
        out = np.empty(self.shape, dtype)
        start = 0
        for chunk in itertools.chain([first], chunks):
            out[start : start + len(chunk)] = chunk
            start += len(chunk)
        assert start == self.shape[0], f"{self.name}: chunks hold {start} of {self.shape[0]} rows"
        return out


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Sampling settings that a model's own `generation_config.json` recommends; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened model. Nothing heavy has been read yet; `tensors` follows the order of `layout.expected_tensors`."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    load_tokenizer: Callable[[], Tokenizer]
    load_chat: Callable[[], ChatFormat | None]
    generation: GenerationDefaults = GenerationDefaults()

    def check_complete(self) -> None:
        """Raise FileError for the first tensor that is missing or has another shape than the configuration demands."""
        for name, shape in expected_tensors(self.config).items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise FileError(self.path, "is missing; the configuration asks for it", item=name)
            if tensor.shape != shape:
                problem = f"has shape {list(tensor.shape)}, the configuration asks for {list(shape)}"
                raise FileError(tensor.source, problem, item=name)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file.

    Raises:
        FileError: the file or folder is damaged or of an unsupported kind.
        ConfigError: its configuration is impossible.
    """
    from shoal.formats import gguf, hf_folder

    path = Path(path)
    if path.is_dir():
        return hf_folder.open_folder(path)
    if path.is_file():
        return gguf.open_gguf(path)
    raise UnknownModelError(f"{path}: no such model folder or GGUF file")
