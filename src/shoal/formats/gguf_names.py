"""GGUF tensors ↔ Shoal's: their names, and the few that GGUF lays out differently.

- llama: rows of q and k are permuted within each head, so that llama.cpp can rotate neighbouring pairs;
- deepseek2: kv_b_proj is split into k_b, transposed per head to [N, C, H], and v_b [N, V, C], or whole in older files;
- MTP layers are blocks after the main ones, their own parts under `nextn.`.

Shape letters: N heads, H nope, V value, C latent, E experts, F hidden, D model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RowOrder:
    """In each `group` of rows, those after the first `skip` are rotated, and GGUF holds them pairwise: row j and row
    j + half of the half-split order are neighbours."""

    group: int
    skip: int = 0

    def to_gguf(self, rows: NDArray[Rows]) -> NDArray[Rows]:
        return self._reorder(rows, 2, (self.group - self.skip) // 2)

    def from_gguf(self, rows: NDArray[Rows]) -> NDArray[Rows]:
        return self._reorder(rows, (self.group - self.skip) // 2, 2)

    def _reorder(self, rows: NDArray[Rows], outer: int, inner: int) -> NDArray[Rows]:
        groups: NDArray[Rows] = rows.reshape(-1, self.group, *rows.shape[1:]).copy()
        rotated = groups[:, self.skip :].reshape(-1, outer, inner, *rows.shape[1:]).swapaxes(1, 2)
        groups[:, self.skip :] = rotated.reshape(-1, outer * inner, *rows.shape[1:])
        return groups.reshape(rows.shape)


def row_order(config: ModelConfig, name: str) -> RowOrder | None:
    """How the rows of a tensor must be reordered for GGUF; None if they stay.

    llama's rotation works on pairs and ours on halves, so q and k change. deepseek2 works on pairs, as DeepSeek's own
    weights do; a half-split model of ours changes in the rotary rows of the queries and of the shared key.
    """
    part = name.split(".")[-2]
    attention = config.attention
    if config.rope.interleave:
        return None
    if isinstance(attention, GQAConfig):
        return RowOrder(attention.head_dim) if config.model_type == "llama" and part in ("q_proj", "k_proj") else None
    if part in ("q_proj", "q_b_proj"):
        return RowOrder(attention.qk_head_dim, attention.qk_nope_head_dim)
    return RowOrder(attention.cache_width, attention.kv_lora_rank) if part == "kv_a_proj_with_mqa" else None


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
        elif name.endswith((".mlp.experts.gate_proj.weight", ".mlp.experts.up_proj.weight")) and source.has(
            _fused_name(name)
        ):
            out[name] = _half_of_fused(source, name, shape)
        else:
            out[name] = _stored(source, name, shape, row_order(config, name))
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


def _stored(
    source: _Source, name: str, shape: Shape, order: RowOrder | None = None, *, own: str | None = None
) -> LazyTensor:
    """A tensor that GGUF holds as one: read a bounded number of rows at a time, an expert at a time in a stack."""
    file, info = source.claim(own or gguf_name(name), shape)
    if len(shape) == 3:
        step = shape[1]
    else:
        group = order.group if order is not None else 1
        step = max(1, CHUNK_VALUES // shape[-1] // group) * group

    def chunks() -> Iterator[Array]:
        stored = file.stored(info.name)
        if len(shape) == 1:  # one row, so that it is the values that are in order
            values = _decode(stored, info.dtype).reshape(shape)
            yield order.from_gguf(values) if order is not None else values
            return
        for start in range(0, len(stored), step):
            rows = stored[start : start + step]
            yield _decode(order.from_gguf(rows) if order is not None else rows, info.dtype).reshape(-1, *shape[1:])

    def raw_blocks() -> Bytes:
        rows = file.stored(info.name)
        return order.from_gguf(rows) if order is not None else rows

    return LazyTensor(
        name=name,
        shape=shape,
        dtype=info.dtype,
        source=file.path,
        make_chunks=chunks,
        raw_blocks=raw_blocks if info.dtype not in PLAIN and len(shape) > 1 else None,
        release=lambda: file.release(info.name),
    )


def _fused_name(name: str) -> str:
    return f"{gguf_name(name).rsplit('.', 2)[0]}.ffn_gate_up_exps.weight"


def _half_of_fused(source: _Source, name: str, shape: Shape) -> LazyTensor:
    """gate_proj or up_proj of all experts from the joint tensor [E, 2 F, D], gate first, that newer files may have."""
    experts, hidden, width = shape
    file, info = source.claim(_fused_name(name), (experts, 2 * hidden, width))
    first = 0 if ".gate_proj." in name else hidden

    def stored() -> Bytes:
        return file.stored(info.name).reshape(experts, 2 * hidden, -1)[:, first : first + hidden]

    def chunks() -> Iterator[Array]:
        for rows in stored():
            yield _decode(rows, info.dtype)[None]

    def raw_blocks() -> Bytes:
        return stored().reshape(experts * hidden, -1)

    blocks = None if info.dtype in PLAIN else raw_blocks
    return LazyTensor(name=name, shape=shape, dtype=info.dtype, source=file.path, make_chunks=chunks, raw_blocks=blocks)


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

    # Blocks run along H, which becomes the rows here: only the halves' bytes can be handed out as they are.
    halves = (
        _stored(source, f"{name} (keys)", (heads, latent, nope), own=info_k.name),
        _stored(source, f"{name} (values)", (heads, value, latent), own=info_v.name),
    )
    return LazyTensor(name=name, shape=shape, dtype=info_k.dtype, source=file_k.path, make_chunks=chunks, split=halves)


def _zeros(name: str, shape: Shape, file: GGUFFile) -> LazyTensor:
    """The selection bias of a sigmoid router whose file has none."""
    return LazyTensor(
        name=name,
        shape=shape,
        dtype="F32",
        source=file.path,
        make_chunks=lambda: iter([np.zeros(shape, np.float32)]),
    )
