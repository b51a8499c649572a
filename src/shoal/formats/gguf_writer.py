"""A checkpoint → one GGUF file that llama.cpp loads, streamed piece by piece so that no tensor need fit in memory.

Norms, biases and the router stay F32. Under Q4_0 and Q4_1 the matrices that hurt most are kept at Q8_0: the output head
(or the embedding tied to it) and MLA's small latent projections. A matrix whose rows are no whole number of blocks
becomes F16. `keep` copies the stored blocks of a GGUF source and leaves other types as they are, FP8 as BF16.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shoal.config import MLAConfig, ModelConfig
from shoal.errors import ConfigError, FileError
from shoal.formats.atomic import atomic_file
from shoal.formats.checkpoint import Checkpoint, GenerationDefaults, LazyTensor
from shoal.formats.gguf_describe import describe
from shoal.formats.gguf_header import aligned, pack_header
from shoal.formats.gguf_names import gguf_name, row_order
from shoal.formats.gguf_quants import FORMATS, PLAIN, quantize
from shoal.formats.gguf_rope import NAME as ROPE_FREQS
from shoal.formats.gguf_rope import llama3_factors
from shoal.formats.layout import Shape, expected_tensors

if TYPE_CHECKING:
    from shoal.formats.chat import ChatFormat

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int], None]


DTYPES = ("F16", "F32", "BF16", "Q8_0", "Q4_0", "Q4_1", "keep")
# The codes of llama.cpp's `general.file_type`: what most matrices of the file are.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18,
    "BF16": 32,
}  # fmt: skip
KEPT_F32 = ("ffn_gate_inp.weight",)
KEPT_Q8_0 = ("attn_q_a.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight")
PIECE_VALUES = 1 << 22
LARGEST_HALF = 65504.0
UNUSED_TOKEN = 5


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: its GGUF name, shape (rows first), type, and its bytes piece by piece."""

    name: str
    shape: Shape
    dtype: str
    pieces: Callable[[], Iterator[Bytes]]

    @property
    def nbytes(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * FORMATS[self.dtype].row_bytes(self.shape[-1])


def write_gguf(
    checkpoint: Checkpoint, dst: str | Path, *, dtype: str = "F16", progress: Progress | None = None
) -> None:
    """Write the model with its tokenizer and chat template to the file `dst`, which is replaced when all went well.

    Args:
        dtype: F16, F32, BF16, Q8_0, Q4_0, Q4_1 or keep (see the top of this file for the exceptions).
        progress: called with (bytes written, bytes in all) as the tensors go by.

    Raises:
        ConfigError: GGUF has no way to describe this model.
        FileError: a tensor is missing or does not fit the type, or the disk refuses.
    """
    from shoal.formats.gguf_tokenizer import gguf_fields_from_tokenizer

    checkpoint.check_complete()
    fields = {
        "general.name": checkpoint.path.name.removesuffix(".gguf"),
        **_sampling(checkpoint.generation),
        **gguf_fields_from_tokenizer(checkpoint.load_tokenizer()),
        **_chat_templates(checkpoint.load_chat()),
    }
    write_model(checkpoint.config, checkpoint.tensors, fields, Path(dst), dtype=dtype, progress=progress)


def write_model(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    fields: Mapping[str, object],
    dst: Path,
    *,
    dtype: str = "F16",
    progress: Progress | None = None,
) -> None:
    """As `write_gguf`, with what is not the model's shape (name, tokenizer, template) given as GGUF `fields`."""
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"{dtype!r} is not one of {', '.join(DTYPES)}")
    out = _plan(config, tensors, dtype, dst)
    matrices = [tensor.dtype for tensor in out if len(tensor.shape) > 1]
    head = {
        **describe(config),
        "general.type": "model",
        "general.file_type": FILE_TYPES[max(set(matrices), key=matrices.count)],
        "general.quantization_version": 2,
        **_special_tokens(config),
        **_padded_vocabulary(config, fields),
    }
    header = pack_header(head, out)
    total = sum(aligned(tensor.nbytes) for tensor in out)
    _check_space(dst, len(header) + total)
    with atomic_file(dst) as stream:
        _put(dst, stream, header)
        done = 0
        for tensor in out:
            for piece in tensor.pieces():
                _put(dst, stream, piece.reshape(-1).data)
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)
            padding = aligned(tensor.nbytes) - tensor.nbytes
            _put(dst, stream, bytes(padding))
            done += padding
        assert done == total, f"{done} bytes of {total} were written"


def _check_space(path: Path, needed: int) -> None:
    if not path.parent.is_dir():
        raise FileError(path, "cannot be written: no such folder")
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise FileError(path, f"needs {needed} bytes, the disk has {free} left")


def _put(path: Path, stream: IO[bytes], data: bytes | memoryview) -> None:
    try:
        stream.write(data)
    except OSError as error:
        raise FileError(path, f"cannot be written: {error.strerror}") from error


# Tensors ------------------------------------------------------------------------------------------------------------


def _plan(config: ModelConfig, tensors: Mapping[str, LazyTensor], dtype: str, dst: Path) -> list[OutTensor]:
    out: list[OutTensor] = []
    if config.rope.scaling is not None and config.rope.scaling.rope_type == "llama3":
        factors = llama3_factors(config.rope.scaling, config.rope.rope_theta, config.attention.rope_dim)
        out.append(OutTensor(ROPE_FREQS, factors.shape, "F32", lambda: iter([factors.view(np.uint8)])))
    for name in expected_tensors(config):
        tensor = tensors[name]
        if name.endswith("kv_b_proj.weight"):
            out += _split_kv_b(config, tensor, dtype)
        else:
            out.append(_one(config, tensor, dtype))
    fallen = [tensor.name for tensor in out if tensor.dtype == "F16"] if dtype.startswith("Q") else []
    if fallen:
        problem = f"{len(fallen)} tensors whose rows are no whole blocks are stored as F16, {fallen[0]} first"
        warnings.warn(f"{dst}: {problem}", stacklevel=3)
    return out


def _target(config: ModelConfig, name: str, shape: Shape, stored: str, dtype: str) -> str:
    """The type that tensor `name` is written as, when `dtype` was asked for and the source holds it as `stored`."""
    if len(shape) == 1 or name.endswith(KEPT_F32):
        return "F32"
    if dtype == "keep":
        dtype = stored if stored in FORMATS else "BF16"
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    if dtype in ("Q4_0", "Q4_1") and (name.endswith(KEPT_Q8_0) or name == head):
        dtype = "Q8_0"
    return dtype if shape[-1] % FORMATS[dtype].block == 0 else "F16"


def _one(config: ModelConfig, tensor: LazyTensor, dtype: str) -> OutTensor:
    name = gguf_name(tensor.name)
    raw = tensor.raw_blocks if dtype == "keep" else None
    target = tensor.dtype if raw is not None else _target(config, name, tensor.shape, tensor.dtype, dtype)
    order = row_order(config, tensor.name)

    def pieces() -> Iterator[Bytes]:
        if raw is not None:
            yield order.to_gguf(raw()) if order is not None else raw()
        elif len(tensor.shape) == 1:
            values: NDArray[np.float32] = tensor.read(np.float32).astype(np.float32, copy=False)
            yield _encode(tensor, order.to_gguf(values) if order is not None else values, target)
        else:
            for rows in _row_pieces(tensor, order.group if order is not None else 1):
                yield _encode(tensor, order.to_gguf(rows) if order is not None else rows, target)

    return OutTensor(name, tensor.shape, target, pieces)


def _split_kv_b(config: ModelConfig, tensor: LazyTensor, dtype: str) -> list[OutTensor]:
    """kv_b_proj [N · (H + V), C] → k_b [N, C, H] and v_b [N, V, C], the layout of llama.cpp's absorbed attention."""
    mla = config.attention
    assert isinstance(mla, MLAConfig)
    heads, latent, nope, value = mla.num_attention_heads, mla.kv_lora_rank, mla.qk_nope_head_dim, mla.v_head_dim
    stem = gguf_name(tensor.name).removesuffix("attn_kv_b.weight")
    # Transposing breaks the source's blocks, so `keep` writes a quantised source at the finest type we have.
    stored = tensor.dtype if tensor.dtype in PLAIN or tensor.dtype not in FORMATS else "Q8_0"

    def part(name: str, shape: Shape, cut: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> OutTensor:
        target = _target(config, name, shape, stored, dtype)

        def pieces() -> Iterator[Bytes]:
            for rows in _row_pieces(tensor, nope + value):
                yield _encode(tensor, cut(rows.reshape(-1, nope + value, latent)), target)

        return OutTensor(name, shape, target, pieces)

    return [
        part(f"{stem}attn_k_b.weight", (heads, latent, nope), lambda heads_NRC: heads_NRC[:, :nope].swapaxes(1, 2)),
        part(f"{stem}attn_v_b.weight", (heads, value, latent), lambda heads_NRC: heads_NRC[:, nope:]),
    ]


def _row_pieces(tensor: LazyTensor, multiple: int) -> Iterator[NDArray[np.float32]]:
    """The tensor as float32 rows in pieces of a bounded size, each a whole number of `multiple` rows."""
    cols = tensor.shape[-1]
    step = max(1, PIECE_VALUES // cols // multiple) * multiple
    left = np.empty((0, cols), np.float32)
    for chunk in tensor.chunks():
        rows = chunk.reshape(-1, cols)
        if len(left):
            rows = np.concatenate([left, rows.astype(np.float32, copy=False)])
        whole = len(rows) // multiple * multiple
        for start in range(0, whole, step):
            yield rows[start : min(start + step, whole)].astype(np.float32, copy=False)
        left = rows[whole:].astype(np.float32)
    assert not len(left), f"{tensor.name}: {len(left)} rows are left over"


def _encode(tensor: LazyTensor, rows: NDArray[np.float32], dtype: str) -> Bytes:
    """Values that the type cannot hold are an error, not a silent infinity."""
    limit = LARGEST_HALF if dtype == "F16" or dtype not in PLAIN else None
    if limit is not None and not (np.abs(rows).max() <= limit):
        worst = rows.reshape(-1)[np.argmax(~(np.abs(rows) <= limit))]
        raise FileError(tensor.source, f"holds {worst}, which {dtype} cannot store", item=tensor.name)
    return quantize(rows, dtype)


# Metadata -----------------------------------------------------------------------------------------------------------


def _sampling(generation: GenerationDefaults) -> dict[str, object]:
    values = {
        "temp": generation.temperature,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "min_p": generation.min_p,
    }
    return {f"general.sampling.{key}": value for key, value in values.items() if value is not None}


def _chat_templates(chat: ChatFormat | None) -> dict[str, object]:
    if chat is None:
        return {}
    out: dict[str, object] = {"tokenizer.chat_template": chat.template_source}
    if chat.tool_template_source is not None:
        out["tokenizer.chat_templates"] = ["tool_use"]
        out["tokenizer.chat_template.tool_use"] = chat.tool_template_source
    return out


def _special_tokens(config: ModelConfig) -> dict[str, object]:
    ids = {"bos": config.bos_token_id, "padding": config.pad_token_id}
    ids |= dict(zip(("eos", "eot", "eom"), config.eos_token_id, strict=False))
    return {f"tokenizer.ggml.{kind}_token_id": token for kind, token in ids.items() if token is not None and token >= 0}


def _padded_vocabulary(config: ModelConfig, fields: Mapping[str, object]) -> dict[str, object]:
    """llama.cpp wants one token for each row of the embedding; unused rows get unused tokens."""
    out = dict(fields)
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return out
    missing = range(len(tokens), config.vocab_size)
    if len(tokens) > config.vocab_size:
        raise ConfigError("vocab_size", f"{config.vocab_size} rows for a tokenizer of {len(tokens)} tokens")
    fillers: dict[str, list[object]] = {
        "tokens": [f"[PAD{index}]" for index in missing],
        "token_type": [UNUSED_TOKEN] * len(missing),
        "scores": [0.0] * len(missing),
    }
    for key, filler in fillers.items():
        values = fields.get(f"tokenizer.ggml.{key}")
        if isinstance(values, list):
            out[f"tokenizer.ggml.{key}"] = values + filler
    return out
