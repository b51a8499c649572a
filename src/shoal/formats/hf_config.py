"""Hugging Face `config.json` → ModelConfig and back, for deepseek_v2, deepseek_v3, llama, qwen2 and qwen3.

Both spellings of rotary settings are read: the published one (`rope_theta`, `rope_scaling` with `type` or `rope_type`)
and that of transformers 5 (`rope_parameters`). Absent fields take the family's default in transformers 5; whatever
would change the maths and is not understood is an error, never ignored. Code named by `auto_map` is never imported:
the architectures here are built in.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, RopeScaling
from shoal.errors import ConfigError, FileError
from shoal.formats import compressed_tensors
from shoal.formats.compressed_tensors import Compression
from shoal.formats.fp8 import BLOCK

MAX_JSON_BYTES = 100_000_000
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_COMMON = {
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "num_nextn_predict_layers": 0,
}
_DEEPSEEK = {"moe_layer_freq": 1, "rope_interleave": True}
# What a missing field means, as in transformers 5.23 (and in DeepSeek's own configuration classes).
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **_COMMON, **_DEEPSEEK, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 0, "n_group": None,
        "topk_group": None, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        **_COMMON, **_DEEPSEEK, "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3, "n_group": 8,
        "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "max_position_embeddings": 4096, "num_nextn_predict_layers": 1,
    },
    "llama": {**_COMMON, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {**_COMMON, "max_position_embeddings": 32768},
    "qwen3": {**_COMMON, "max_position_embeddings": 32768, "head_dim": 128},
}  # fmt: skip
# transformers' attribute_map: other names that a file may use for a published field.
ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_experts": "n_routed_experts"}
ALIASES["num_local_experts"] = "n_routed_experts"
ALIASES["compression_config"] = "quantization_config"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that say nothing about the forward pass of a trained model.
HARMLESS = _names(
    """_attn_implementation _name_or_path architectures attention_dropout auto_map aux_loss_alpha
    chunk_size_feed_forward dtype ep_size id2label is_decoder is_encoder_decoder is_llama_config
    keys_to_ignore_at_inference label2id max_window_layers model_max_length model_type output_attentions
    output_hidden_states output_router_logits pretraining_tp problem_type qk_head_dim return_dict
    router_aux_loss_coef seq_aux sliding_window task_specific_params tie_encoder_decoder tokenizer_class
    torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16
    use_cache"""
)
FIELDS = _names(
    """attention_bias bos_token_id eos_token_id first_k_dense_replace head_dim hidden_act hidden_size
    initializer_range intermediate_size kv_lora_rank layer_types max_position_embeddings mlp_bias
    moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob
    num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers
    original_max_position_embeddings pad_token_id partial_rotary_factor q_lora_rank qk_nope_head_dim
    qk_rope_head_dim quantization_config rms_norm_eps rope_interleave rope_parameters rope_scaling rope_theta
    routed_scaling_factor scoring_func tie_word_embeddings topk_group topk_method v_head_dim vocab_size"""
)
# Fields that change the maths in a way we do not compute; the listed values are those that leave it alone.
INERT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
    "pruned_heads": ({}, None),
    "index_topk": (None,),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_qk_norm": (False, None),
}
ROPE_FIELDS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
               "attention_factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor")  # fmt: skip
ROPE_INERT: dict[str, tuple[Any, ...]] = {
    "type": (), "rope_type": (), "rope_theta": (), "finetuned": (),
    "truncate": (True, None), "partial_rotary_factor": (1, 1.0, None), "extrapolation_factor": (1, 1.0, None),
    "attn_factor": (1, 1.0, None),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """What `config.json` says: the model, and how its weights are quantised if they are."""

    model: ModelConfig
    fp8_block: tuple[int, int] | None = None
    compression: Compression | None = None


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from disk. FileError if it is missing, too large, damaged, has a key twice or is no object."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    if len(raw) > limit:
        raise FileError(path, f"is larger than {limit} bytes")
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(path, "must hold a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return out


def read_config(path: Path) -> HfConfig:
    """Read `config.json`. FileError names the file and the field."""
    raw = read_json(path)
    try:
        return parse_config(raw)
    except ConfigError as error:
        raise FileError(path, str(error).removeprefix(f"{error.field}: "), item=error.field) from error


def parse_config(raw: Mapping[str, Any]) -> HfConfig:
    """The same from a parsed dictionary. Raises ConfigError; warns once about fields it does not know."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in DEFAULTS:
        hint = "; it needs its own code (auto_map), which is never imported" if "auto_map" in raw else ""
        known = ", ".join(DEFAULTS)
        raise ConfigError("model_type", f"{family!r} is not one of {known}{hint}")
    names = raw.get("architectures")
    if names not in (None, []) and names != [ARCHITECTURES[family]]:
        raise ConfigError("architectures", f"{names!r} is not supported; {family} means {ARCHITECTURES[family]}")
    fields = {ALIASES.get(key, key): value for key, value in raw.items() if ALIASES.get(key) not in raw}
    _check_inert(fields)
    _check_layer_types(fields)
    _warn_unknown(fields)
    reader = _Fields(family, fields)
    model = _model(family, reader)
    quantization = fields.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == compressed_tensors.METHOD:
        return HfConfig(model=model, compression=compressed_tensors.parse_compression(quantization))
    return HfConfig(model=model, fp8_block=_fp8_block(quantization))


class _Fields:
    """A family's fields with its defaults. An explicit null counts as absent, except where `nullable` is used."""

    def __init__(self, family: str, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.defaults = DEFAULTS[family]

    def need(self, name: str) -> Any:
        if self.raw.get(name) is None:
            raise ConfigError(name, "is missing")
        return self.raw[name]

    def get(self, name: str) -> Any:
        value = self.raw.get(name)
        return self.defaults[name] if value is None else value

    def nullable(self, name: str) -> Any:
        return self.raw[name] if name in self.raw else self.defaults[name]


def _model(family: str, fields: _Fields) -> ModelConfig:
    deepseek = family.startswith("deepseek")
    if fields.get("mlp_bias") and family != "llama":
        raise ConfigError("mlp_bias", f"is not supported for {family}")
    attention = _mla(fields) if deepseek else _gqa(family, fields)
    return ModelConfig(
        model_type=family,
        vocab_size=fields.need("vocab_size"),
        hidden_size=fields.need("hidden_size"),
        intermediate_size=fields.need("intermediate_size"),
        num_hidden_layers=fields.need("num_hidden_layers"),
        attention=attention,
        moe=_moe(fields) if deepseek else None,
        rope=_rope(family, fields),
        rms_norm_eps=fields.get("rms_norm_eps"),
        max_position_embeddings=fields.get("max_position_embeddings"),
        tie_word_embeddings=fields.get("tie_word_embeddings"),
        mlp_bias=fields.get("mlp_bias"),
        num_nextn_predict_layers=fields.get("num_nextn_predict_layers") if deepseek else 0,
        bos_token_id=fields.nullable("bos_token_id"),
        eos_token_id=token_ids(fields.nullable("eos_token_id")),
        pad_token_id=fields.nullable("pad_token_id"),
        initializer_range=fields.get("initializer_range"),
    )


def token_ids(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as it may stand in a file: null, one id or a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token) is not int for token in ids):
        raise ConfigError("eos_token_id", f"must be a token id, a list of them or null, got {value!r}")
    return tuple(ids)


def _mla(fields: _Fields) -> MLAConfig:
    if "q_lora_rank" not in fields.raw:
        raise ConfigError("q_lora_rank", "is missing (null means that queries are not compressed)")
    return MLAConfig(
        num_attention_heads=fields.need("num_attention_heads"),
        kv_lora_rank=fields.need("kv_lora_rank"),
        qk_nope_head_dim=fields.need("qk_nope_head_dim"),
        qk_rope_head_dim=fields.need("qk_rope_head_dim"),
        v_head_dim=fields.need("v_head_dim"),
        q_lora_rank=fields.raw["q_lora_rank"],
        attention_bias=fields.get("attention_bias"),
    )


def _gqa(family: str, fields: _Fields) -> GQAConfig:
    heads, hidden = fields.need("num_attention_heads"), fields.need("hidden_size")
    head_dim = fields.raw.get("head_dim")
    head_dim = fields.defaults.get("head_dim") if head_dim is None else head_dim
    if head_dim is None:
        if type(heads) is not int or type(hidden) is not int or heads < 1 or hidden % heads:
            raise ConfigError("num_attention_heads", f"{heads!r} does not divide hidden_size {hidden!r}")
        head_dim = hidden // heads
    # Absent, llama means one KV head per head; for qwen transformers means 32, which is nobody's intention.
    optional = family == "llama" or "num_key_value_heads" in fields.raw
    kv_heads = fields.raw.get("num_key_value_heads") if optional else fields.need("num_key_value_heads")
    bias = fields.get("attention_bias")
    if not isinstance(bias, bool):
        raise ConfigError("attention_bias", f"must be true or false, got {bias!r}")
    return GQAConfig(
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        qk_norm=family == "qwen3",
    )


def _moe(fields: _Fields) -> MoEConfig | None:
    if fields.raw.get("n_routed_experts") is None:
        return None
    dense, layers, mtp = (
        fields.get("first_k_dense_replace"), fields.need("num_hidden_layers"), fields.get("num_nextn_predict_layers"),
    )  # fmt: skip
    # How `to_hf` writes a model without experts: transformers has no null here.
    if (
        fields.raw["n_routed_experts"] == 1
        and all(type(n) is int for n in (dense, layers, mtp))
        and dense >= layers + mtp
    ):
        return None
    if "n_shared_experts" not in fields.raw:
        raise ConfigError("n_shared_experts", "is missing (null or 0 means none)")
    return MoEConfig(
        n_routed_experts=fields.raw["n_routed_experts"],
        num_experts_per_tok=fields.need("num_experts_per_tok"),
        moe_intermediate_size=fields.need("moe_intermediate_size"),
        n_shared_experts=0 if fields.raw["n_shared_experts"] is None else fields.raw["n_shared_experts"],
        first_k_dense_replace=dense,
        moe_layer_freq=fields.get("moe_layer_freq"),
        n_group=_one(fields.nullable("n_group")),
        topk_group=_one(fields.nullable("topk_group")),
        topk_method=fields.get("topk_method"),
        scoring_func=fields.get("scoring_func"),
        norm_topk_prob=fields.get("norm_topk_prob"),
        routed_scaling_factor=fields.get("routed_scaling_factor"),
    )


def _one(groups: Any) -> Any:
    return 1 if groups is None else groups  # V2-Lite: null groups are one group


def _rope(family: str, fields: _Fields) -> RopeConfig:
    scaling, parameters = fields.raw.get("rope_scaling"), fields.raw.get("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(name, f"must be an object or null, got {value!r}")
    where = "rope_scaling" if scaling else "rope_parameters"  # transformers' order
    rope = {key: value for key, value in (scaling or parameters or {}).items() if value is not None}
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    interleave = fields.get("rope_interleave") if family.startswith("deepseek") else False
    if family == "deepseek_v2" and interleave is False:
        raise ConfigError("rope_interleave", "is always true for deepseek_v2")
    return RopeConfig(rope_theta=theta, scaling=_rope_scaling(where, rope, fields), interleave=interleave)


def _rope_scaling(where: str, rope: Mapping[str, Any], fields: _Fields) -> RopeScaling | None:
    kinds = {rope[key] for key in ("rope_type", "type") if isinstance(rope.get(key), str)}
    if len(kinds) > 1:
        raise ConfigError(f"{where}.rope_type", f"contradicts type: {' and '.join(sorted(kinds))}")
    for key, value in rope.items():
        if key in ROPE_FIELDS or (key in ROPE_INERT and (not ROPE_INERT[key] or value in ROPE_INERT[key])):
            continue
        problem = "is not understood" + _did_you_mean(key, [*ROPE_FIELDS, *ROPE_INERT])
        raise ConfigError(f"{where}.{key}", problem if key not in ROPE_INERT else f"{value!r} is not supported")
    kind = next(iter(kinds), "default")
    if kind == "default":
        if not kinds and rope.keys() & set(ROPE_FIELDS):
            raise ConfigError(f"{where}.rope_type", "is missing")
        return None
    if "factor" not in rope:
        raise ConfigError(f"{where}.factor", "is missing")
    values = {key: rope[key] for key in ROPE_FIELDS if key in rope}
    for name in ("short_factor", "long_factor"):
        if name in values:
            if not isinstance(values[name], list):
                raise ConfigError(f"{where}.{name}", f"must be a list of numbers, got {values[name]!r}")
            values[name] = tuple(values[name])
    if kind != "linear":
        values.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
        if (
            fields.raw.get("original_max_position_embeddings") is not None
        ):  # outside the object it wins, as in transformers
            values["original_max_position_embeddings"] = fields.raw["original_max_position_embeddings"]
    try:
        return RopeScaling(rope_type=kind, **values)
    except ConfigError as error:
        name = error.field.replace("rope_scaling.", f"{where}.")
        raise ConfigError(name, str(error).removeprefix(f"{error.field}: ")) from error


def _fp8_block(quantization: Any) -> tuple[int, int] | None:
    """`weight_block_size` of DeepSeek's block-scaled FP8."""
    name = "quantization_config"
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ConfigError(name, f"must be an object, got {quantization!r}")
    for key, allowed in (("quant_method", ("fp8",)), ("fmt", ("e4m3", None)), ("activation_scheme", ("dynamic", None))):
        if quantization.get(key) not in allowed:
            known = f"{allowed[0]!r}" + (f" and {compressed_tensors.METHOD!r} are" if key == "quant_method" else " is")
            raise ConfigError(f"{name}.{key}", f"{quantization.get(key)!r} is not supported; only {known}")
    block = quantization.get("weight_block_size") or list(BLOCK)
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 1 <= n <= 1 << 20 for n in block):
        raise ConfigError(f"{name}.weight_block_size", f"must be two whole numbers, got {block!r}")
    return block[0], block[1]


def _check_inert(fields: Mapping[str, Any]) -> None:
    for key, allowed in INERT.items():
        if key in fields and not any(fields[key] == value for value in allowed):
            raise ConfigError(key, f"{fields[key]!r} is not supported")


def _check_layer_types(fields: Mapping[str, Any]) -> None:
    kinds = fields.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError("layer_types", f"only full_attention is supported, got {str(kinds)[:120]}")


def _warn_unknown(fields: Mapping[str, Any]) -> None:
    known = HARMLESS | FIELDS | INERT.keys()
    unknown = [key for key in fields if key not in known]
    if unknown:
        named = ", ".join(key + _did_you_mean(key, sorted(known)) for key in sorted(unknown))
        warnings.warn(f"config.json: fields that are not understood and have no effect: {named}", stacklevel=4)


def _did_you_mean(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, 1, 0.8)
    return f" (did you mean {close[0]}?)" if close else ""
