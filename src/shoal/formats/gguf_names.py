"""GGUF tensors ↔ Shoal's: their names, and the few that GGUF lays out differently.

- llama: rows of q and k are permuted within each head, so that llama.cpp can rotate neighbouring pairs;
- deepseek2: kv_b_proj is split into k_b, transposed per head to [N, C, H], and v_b [N, V, C], or whole in older files;
- MTP layers are blocks after the main ones, their own parts under `nextn.`.

Shape letters: N heads, H nope, V value, C latent, E experts, F hidden, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal.config import GQAConfig, MLAConfig, ModelConfig
from shoal.errors import FileError
from shoal.formats.checkpoint import Array, LazyTensor
from shoal.formats.gguf_file import GGUFFile, TensorInfo
from shoal.formats.gguf_quants import PLAIN, dequantize
from shoal.formats.layout import Shape, expected_tensors

Bytes = NDArray[np.uint8]
Rows = TypeVar("Rows", bound=np.generic)

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
}
SELECTION_BIAS = "mlp.gate.e_score_correction_bias"
# Tensors without one of ours: rotary factors are read into the configuration, the MTP copies of embedding and head are
# the shared ones again, and the last two are leftovers of early converters.
IGNORED = (
    "rope_freqs.weight",
    "nextn.embed_tokens.weight",
    "nextn.shared_head_head.weight",
    "attn_rot_embd.weight",
    "attention.rotary_emb.inv_freq",
)
CHUNK_VALUES = 1 << 22


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    if part == SELECTION_BIAS:
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{LAYER[part.removesuffix('.' + kind)]}.{kind}"


def is_permuted(config: ModelConfig, name: str) -> bool:
    """Whether GGUF holds the rows of this tensor in llama's pairwise order."""
    return config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name)


def permute_rows(rows: NDArray[Rows], head_dim: int) -> NDArray[Rows]:
    """Half-split rows of whole heads → pairwise order: within a head, row j and row j + half become neighbours."""
    halves: NDArray[Rows] = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    pairs: NDArray[Rows] = halves.swapaxes(1, 2).reshape(rows.shape)
    return pairs


def unpermute_rows(rows: NDArray[Rows], head_dim: int) -> NDArray[Rows]:
    """The inverse of `permute_rows`."""
    pairs: NDArray[Rows] = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    halves: NDArray[Rows] = pairs.swapaxes(1, 2).reshape(rows.shape)
    return halves


def read_tensors(files: list[GGUFFile], config: ModelConfig) -> dict[str, LazyTensor]:
    """Every tensor of the model, lazily, in the order of `layout.expected_tensors`.

    Raises:
        FileError: one is missing, has another shape than the configuration demands, or is none of the model's.
    """
    source = _Source(files)
    out: dict[str, LazyTensor] = {}
    for name, shape in expected_tensors(config).items():
        if name.endswith("kv_b_proj.weight") and not source.has(gguf_name(name)):
            out[name] = _split_kv_b(source, config, name, shape)
        elif name.endswith(SELECTION_BIAS) and not source.has(gguf_name(name)):
            out[name] = _zeros(name, shape, files[0])
        elif is_permuted(config, name):
            out[name] = _permuted(source, config, name, shape)
        else:
            out[name] = _plain(source, name, shape)
    source.check_all_used()
    return out


class _Source:
    """The tensors of all shards, checked one by one as they are claimed."""

    def __init__(self, files: list[GGUFFile]) -> None:
        self.home: dict[str, GGUFFile] = {}
        self.unused: dict[str, GGUFFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self.home:
                    raise FileError(file.path, f"is also in {self.home[name].path.name}", item=name)
                self.home[name] = file
        self.unused.update(self.home)
        self.first = files[0]

    def has(self, name: str) -> bool:
        return name in self.home

    def claim(self, name: str, shape: Shape) -> tuple[GGUFFile, TensorInfo]:
        file = self.home.get(name)
        if file is None:
            raise FileError(self.first.path, "is missing; the metadata asks for it", item=name)
        self.unused.pop(name, None)
        info = file.tensors[name]
        if info.shape != shape:
            problem = f"has shape {list(info.shape)}, the metadata asks for {list(shape)}"
            raise FileError(file.path, problem, item=name)
        return file, info

    def check_all_used(self) -> None:
        for name, file in self.unused.items():
            if not name.endswith(IGNORED):
                raise FileError(file.path, "is no part of this architecture as Shoal knows it", item=name)


def _decode(stored: Bytes, dtype: str) -> Array:
    """Rows of stored bytes → float rows: a view for plain storage, float32 for blocks."""
    return stored.view(PLAIN[dtype]) if dtype in PLAIN else dequantize(stored, dtype)


def _lazy(
    name: str,
    shape: Shape,
    info: TensorInfo,
    file: GGUFFile,
    step: int,
    arrange: Callable[[Bytes], Bytes] = lambda rows: rows,
) -> LazyTensor:
    """A tensor read `step` stored rows at a time; `arrange` reorders the rows of one such piece."""

    def chunks() -> Iterator[Array]:
        stored = file.stored(info.name)
        for start in range(0, len(stored), step):
            rows = _decode(arrange(stored[start : start + step]), info.dtype)
            yield rows.reshape(-1, *shape[1:])

    def raw() -> Bytes:
        return arrange(file.stored(info.name))

    quantised = info.dtype not in PLAIN
    return LazyTensor(
        name=name,
        shape=shape,
        dtype=info.dtype,
        source=file.path,
        make_chunks=chunks,
        raw_blocks=raw if quantised else None,
    )


def _plain(source: _Source, name: str, shape: Shape) -> LazyTensor:
    file, info = source.claim(gguf_name(name), shape)
    if len(shape) == 1:
        step = 1
    elif len(shape) == 3:
        step = shape[1]  # one expert
    else:
        step = max(1, CHUNK_VALUES // shape[1])
    return _lazy(name, shape, info, file, step)


def _permuted(source: _Source, config: ModelConfig, name: str, shape: Shape) -> LazyTensor:
    """q or k of llama. A bias is stored as one row, so its values rather than its rows are put in order."""
    assert isinstance(config.attention, GQAConfig)
    head_dim = config.attention.head_dim
    file, info = source.claim(gguf_name(name), shape)
    if len(shape) == 2:
        heads = max(1, CHUNK_VALUES // (head_dim * shape[1]))
        return _lazy(name, shape, info, file, heads * head_dim, lambda rows: unpermute_rows(rows, head_dim))

    def chunks() -> Iterator[Array]:
        yield unpermute_rows(_decode(file.stored(info.name), info.dtype).reshape(shape), head_dim)

    return LazyTensor(name=name, shape=shape, dtype=info.dtype, source=file.path, make_chunks=chunks)


def _split_kv_b(source: _Source, config: ModelConfig, name: str, shape: Shape) -> LazyTensor:
    """kv_b_proj from k_b [N, C, H] and v_b [N, V, C]: per head, H rows of k, then V rows of v, of C values each."""
    mla = config.attention
    assert isinstance(mla, MLAConfig)
    heads, latent = mla.num_attention_heads, mla.kv_lora_rank
    nope, value = mla.qk_nope_head_dim, mla.v_head_dim
    stem = gguf_name(name).removesuffix("attn_kv_b.weight")
    file_k, info_k = source.claim(f"{stem}attn_k_b.weight", (heads, latent, nope))
    file_v, info_v = source.claim(f"{stem}attn_v_b.weight", (heads, value, latent))

    def chunks() -> Iterator[Array]:
        stored_k = file_k.stored(info_k.name).reshape(heads, latent, -1)
        stored_v = file_v.stored(info_v.name).reshape(heads, value, -1)
        for head in range(heads):
            key_CH = _decode(stored_k[head], info_k.dtype)
            value_VC = _decode(stored_v[head], info_v.dtype)
            yield np.concatenate([key_CH.T, value_VC], dtype=np.result_type(key_CH, value_VC))

    # Blocks run along H, which becomes the rows here: the bytes cannot be handed out as they are.
    return LazyTensor(name=name, shape=shape, dtype=info_k.dtype, source=file_k.path, make_chunks=chunks)


def _zeros(name: str, shape: Shape, file: GGUFFile) -> LazyTensor:
    """The selection bias of a sigmoid router whose file has none."""
    return LazyTensor(
        name=name,
        shape=shape,
        dtype="F32",
        source=file.path,
        make_chunks=lambda: iter([np.zeros(shape, np.float32)]),
    )
