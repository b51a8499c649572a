"""GGUF metadata → ModelConfig, for the architectures llama, qwen2, qwen3 and deepseek2.

A GGUF file says some things only through its tensors (biases, tied embeddings, Llama-3's rotary factors), so the reader
looks at the table of tensors as well. llama.cpp's own readings are followed where a key is absent.
Sources: llama.cpp src/models/{llama,qwen2,qwen3,deepseek2}.cpp and src/llama-context.cpp; gguf-py constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, RopeScaling
from shoal.errors import FileError
from shoal.formats.gguf_file import GGUFFile
from shoal.formats.gguf_rope import llama3_scaling

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek2")
GATING = {1: "softmax", 2: "sigmoid"}
T = TypeVar("T", int, float, bool, str)
_REQUIRED = object()
EMBEDDING = "token_embd.weight"


class Fields:
    """Typed access to a model's metadata; `{arch}.` keys are given without their prefix.

    Of a sharded model, the first file holds the metadata and any may hold a tensor.
    """

    def __init__(self, files: Sequence[GGUFFile]) -> None:
        self.file = file = files[0]
        self.homes = {name: shard for shard in files for name in shard.tensors}
        self.arch = ""
        arch = self.text("general.architecture")
        if arch not in ARCHITECTURES:
            problem = f"architecture {arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
            raise FileError(file.path, problem, item="general.architecture")
        self.arch = arch

    def _key(self, key: str) -> str:
        return key if key.startswith(("general.", "tokenizer.", "split.")) else f"{self.arch}.{key}"

    def _get(self, key: str, kind: type[T], default: object) -> T:
        key = self._key(key)
        value = self.file.fields.get(key)
        if value is None:
            if default is _REQUIRED:
                raise FileError(self.file.path, "is missing from the metadata", item=key)
            return default  # type: ignore[return-value]
        if isinstance(value, list) and value and all(other == value[0] for other in value):
            value = value[0]  # some writers give one value a layer
        if isinstance(value, list):
            raise FileError(self.file.path, "differs between layers, which is not supported", item=key)
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _shortest(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FileError(self.file.path, f"should be of type {kind.__name__}, is {value!r}", item=key)
        return value

    def integer(self, key: str, default: object = _REQUIRED) -> int:
        return self._get(key, int, default)

    def optional(self, key: str) -> int | None:
        return self.integer(key) if self.has(key) else None

    def number(self, key: str, default: object = _REQUIRED) -> float:
        return self._get(key, float, default)

    def text(self, key: str, default: object = _REQUIRED) -> str:
        return self._get(key, str, default)

    def flag(self, key: str, default: object = _REQUIRED) -> bool:
        return self._get(key, bool, default)

    def has(self, key: str) -> bool:
        return self._key(key) in self.file.fields

    def has_tensor(self, name: str) -> bool:
        return name in self.homes

    def fail(self, key: str, problem: str) -> FileError:
        return FileError(self.file.path, problem, item=self._key(key))


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if np.isfinite(value) and abs(value) < 3e38 else float(value)


def read_config(files: Sequence[GGUFFile]) -> ModelConfig:
    """The model's configuration. `files` are its shards, usually one.

    Raises:
        FileError: the architecture is unsupported, or a key is missing or of the wrong type.
        ConfigError: the values do not make a model.
    """
    fields = Fields(files)
    shape = fields.homes[EMBEDDING].tensors[EMBEDDING].shape if fields.has_tensor(EMBEDDING) else ()
    if len(shape) != 2:
        raise FileError(files[0].path, "is missing or no matrix", item=EMBEDDING)
    num_layers, num_mtp = _read_depth(fields)
    attention = _read_mla(fields) if fields.arch == "deepseek2" else _read_gqa(fields)
    moe = _read_moe(fields, num_layers)
    return ModelConfig(
        model_type=_model_type(fields.arch, moe),
        vocab_size=_read_vocab_size(fields, shape[0]),
        hidden_size=fields.integer("embedding_length"),
        intermediate_size=fields.integer("feed_forward_length"),
        num_hidden_layers=num_layers,
        attention=attention,
        moe=moe,
        rope=_read_rope(fields, attention),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=fields.integer("context_length"),
        tie_word_embeddings=not fields.has_tensor("output.weight"),
        mlp_bias=fields.has_tensor("blk.0.ffn_gate.bias"),
        num_nextn_predict_layers=num_mtp,
        bos_token_id=fields.optional("tokenizer.ggml.bos_token_id"),
        eos_token_id=_read_eos(fields),
        pad_token_id=fields.optional("tokenizer.ggml.padding_token_id"),
    )


def _model_type(arch: str, moe: MoEConfig | None) -> str:
    if arch != "deepseek2":
        return arch
    return "deepseek_v3" if moe is not None and moe.scoring_func == "sigmoid" else "deepseek_v2"


def _read_depth(fields: Fields) -> tuple[int, int]:
    """Main layers and MTP layers. `block_count` includes the MTP blocks, unless a converter left those out."""
    blocks, mtp = fields.integer("block_count"), fields.integer("nextn_predict_layers", 0)
    if not 0 < blocks <= len(fields.homes):  # also bounds every loop over blocks
        raise fields.fail("block_count", f"{blocks} blocks do not go with {len(fields.homes)} tensors")
    if not mtp:
        return blocks, 0
    if not 0 < mtp < blocks:
        raise fields.fail("nextn_predict_layers", f"must lie between 0 and the {blocks} blocks, got {mtp}")
    if fields.has_tensor(f"blk.{blocks - mtp}.nextn.eh_proj.weight"):
        return blocks - mtp, mtp
    left_out = not fields.has_tensor(f"blk.{blocks - 1}.attn_norm.weight")
    return (blocks - mtp if left_out else blocks), 0


def _read_vocab_size(fields: Fields, rows: int) -> int:
    """The embedding decides; it may have rows that no token uses, but never the reverse."""
    tokens = fields.file.fields.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise fields.fail("tokenizer.ggml.tokens", f"has {len(tokens)} tokens, the embedding only {rows} rows")
    return rows


def _read_eos(fields: Fields) -> tuple[int, ...]:
    ids = [fields.optional(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _read_gqa(fields: Fields) -> GQAConfig:
    if fields.integer("expert_count", 0):
        raise fields.fail("expert_count", f"experts in architecture {fields.arch!r} are not supported")
    heads = fields.integer("attention.head_count")
    if heads < 1:
        raise fields.fail("attention.head_count", f"must be at least 1, got {heads}")
    head_dim = fields.integer("attention.key_length", fields.integer("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise fields.fail(key, f"must equal the head size {head_dim}, got {fields.integer(key)}")
    return GQAConfig(
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        qkv_bias=fields.has_tensor("blk.0.attn_q.bias"),
        o_bias=fields.has_tensor("blk.0.attn_output.bias"),
        qk_norm=fields.has_tensor("blk.0.attn_q_norm.weight"),
    )


def _read_mla(fields: Fields) -> MLAConfig:
    """Files with the absorbed (MQA) layout name the per-head sizes `*_mla`; older ones use the plain keys for them."""
    rope = fields.integer("rope.dimension_count")
    key_length = fields.integer("attention.key_length_mla", 0) or fields.integer("attention.key_length")
    value_length = fields.integer("attention.value_length_mla", 0) or fields.integer("attention.value_length")
    if key_length <= rope:
        raise fields.fail(
            "attention.key_length_mla", f"{key_length} leaves nothing beside the {rope} rotary dimensions"
        )
    # A rank of 0, or a leftover rank beside an undivided query matrix, both mean: no query compression.
    q_rank = fields.integer("attention.q_lora_rank", 0)
    return MLAConfig(
        num_attention_heads=fields.integer("attention.head_count"),
        kv_lora_rank=fields.integer("attention.kv_lora_rank"),
        qk_nope_head_dim=key_length - rope,
        qk_rope_head_dim=rope,
        v_head_dim=value_length,
        q_lora_rank=q_rank if q_rank and not fields.has_tensor("blk.0.attn_q.weight") else None,
        attention_bias=fields.has_tensor("blk.0.attn_kv_a_mqa.bias"),
    )


def _read_moe(fields: Fields, num_layers: int) -> MoEConfig | None:
    experts = fields.integer("expert_count", 0)
    dense = fields.integer("leading_dense_block_count", 0)
    if fields.arch != "deepseek2" or not experts or dense >= num_layers:
        return None
    gating = fields.integer("expert_gating_func", 0) or 1  # files of the V2 age have no such key
    if gating not in GATING:
        raise fields.fail("expert_gating_func", f"gating function {gating} is not supported")
    groups = fields.integer("expert_group_count", 0) or 1
    scoring = GATING[gating]
    if any(fields.has_tensor(f"blk.{layer}.exp_probs_b.bias") for layer in range(dense, num_layers)):
        if scoring != "sigmoid":
            raise fields.fail("expert_gating_func", "softmax gating with a selection bias is not supported")
        topk_method = "noaux_tc"
    elif scoring == "softmax":
        topk_method = "group_limited_greedy" if groups > 1 else "greedy"
    else:
        topk_method = "noaux_tc"  # the reader supplies a bias of zeros
    return MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=fields.integer("expert_used_count"),
        moe_intermediate_size=fields.integer("expert_feed_forward_length"),
        n_shared_experts=fields.integer("expert_shared_count", 0),
        first_k_dense_replace=dense,
        n_group=groups,
        topk_group=fields.integer("expert_group_used_count", 0) or groups,
        topk_method=topk_method,
        scoring_func=scoring,
        norm_topk_prob=fields.flag("expert_weights_norm", False),
        # llama.cpp takes an absent factor and a factor of 0 for 1.
        routed_scaling_factor=fields.number("expert_weights_scale", 0.0) or 1.0,
    )


def _read_rope(fields: Fields, attention: GQAConfig | MLAConfig) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10000.0)
    scaling = _read_scaling(fields)
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if fields.has_tensor(name):
            raise FileError(fields.file.path, "LongRoPE is not supported", item=name)
    if fields.has_tensor("rope_freqs.weight"):
        if scaling is not None:
            raise fields.fail("rope.scaling.type", "stands beside rope_freqs.weight; only one of them can apply")
        scaling = llama3_scaling(fields.homes["rope_freqs.weight"], theta, attention.rope_dim)
    return RopeConfig(rope_theta=theta, scaling=scaling, interleave=fields.arch == "deepseek2")


def _read_scaling(fields: Fields) -> RopeScaling | None:
    old_linear = fields.number("rope.scale_linear", 0.0)
    kind = fields.text("rope.scaling.type", "linear" if old_linear else "none")
    factor = fields.number("rope.scaling.factor", old_linear or 1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return RopeScaling(rope_type="linear", factor=factor)
    if kind != "yarn":
        raise fields.fail("rope.scaling.type", f"{kind!r} is not supported; supported are none, linear, yarn")
    # The multiplier is stored as a tenth of mscale_all_dim; mscale itself is not stored, and is equal to it or 1.
    mscale = round(10 * fields.number("rope.scaling.yarn_log_multiplier", 0.0), 6) or None
    if fields.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise fields.fail("rope.scaling.attn_factor", "is not supported with yarn")
    attention_factor = "rope.scaling.yarn_attn_factor"
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=fields.integer(
            "rope.scaling.original_context_length", fields.integer("context_length")
        ),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale,
        attention_factor=fields.number(attention_factor) if fields.has(attention_factor) else None,
    )
