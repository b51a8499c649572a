"""ModelConfig → the published `config.json` fields, loaded by transformers, vLLM and SGLang without code of ours.

Rotary settings are written in the older spelling (`rope_theta`, `rope_scaling`), which all of them read.
"""

from __future__ import annotations

from typing import Any

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.errors import ConfigError
from shoal.formats.checkpoint import GenerationDefaults
from shoal.formats.hf_config import ARCHITECTURES, ROPE_FIELDS


def to_hf(config: ModelConfig, *, torch_dtype: str = "bfloat16") -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
        ConfigError: the family's published fields cannot express this model.
    """
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
    }
    if isinstance(config.attention, MLAConfig):
        out.update(_mla(config.attention))
        out.update(_dense(config) if config.moe is None else _moe(config.moe))
        if config.num_nextn_predict_layers or config.model_type == "deepseek_v3":  # absent, it means one for V3
            out["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    else:
        out.update(_gqa(config, config.attention))
    if config.model_type == "llama":
        out["mlp_bias"] = config.mlp_bias
    elif config.mlp_bias:
        raise ConfigError("mlp_bias", f"cannot be written for {config.model_type}")
    out.update(_rope(config.model_type, config.rope))
    out.update(
        hidden_act="silu",
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        attention_dropout=0.0,
        use_cache=True,
        torch_dtype=torch_dtype,
        **_tokens(config),
    )
    return out


def generation_to_hf(config: ModelConfig, generation: GenerationDefaults) -> dict[str, Any]:
    """The contents of `generation_config.json`: the special tokens and whatever sampling the model recommends."""
    names = ("temperature", "top_p", "top_k", "min_p")
    sampling = {name: getattr(generation, name) for name in names if getattr(generation, name) is not None}
    return {**_tokens(config), **({"do_sample": True} if sampling else {}), **sampling}


def _tokens(config: ModelConfig) -> dict[str, Any]:
    eos: Any = list(config.eos_token_id)
    if len(eos) < 2:
        eos = eos[0] if eos else None
    return {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}


def _mla(mla: MLAConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": mla.num_attention_heads,
        "num_key_value_heads": mla.num_attention_heads,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "attention_bias": mla.attention_bias,
    }


def _moe(moe: MoEConfig) -> dict[str, Any]:
    names = (
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace",
        "moe_layer_freq", "n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob",
        "routed_scaling_factor",
    )  # fmt: skip
    return {name: getattr(moe, name) for name in names}


def _dense(config: ModelConfig) -> dict[str, Any]:
    """No experts at all: every layer lies before the first sparse one. transformers has no null for these fields."""
    one = MoEConfig(
        n_routed_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=config.intermediate_size,
        n_shared_experts=1,
        first_k_dense_replace=config.num_hidden_layers + config.num_nextn_predict_layers,
        topk_method="noaux_tc" if config.model_type == "deepseek_v3" else "greedy",
        scoring_func="sigmoid" if config.model_type == "deepseek_v3" else "softmax",
    )
    return _moe(one)


def _gqa(config: ModelConfig, gqa: GQAConfig) -> dict[str, Any]:
    family = config.model_type
    out: dict[str, Any] = {
        "num_attention_heads": gqa.num_attention_heads,
        "num_key_value_heads": gqa.num_key_value_heads,
    }
    # qwen2 as published has no head_dim, and some readers compute it.
    if family != "qwen2" or gqa.head_dim * gqa.num_attention_heads != config.hidden_size:
        out["head_dim"] = gqa.head_dim
    if family == "qwen2":
        if not gqa.qkv_bias or gqa.o_bias:
            raise ConfigError("qkv_bias", "qwen2 always has biases on q, k and v and none on o")
    elif gqa.qkv_bias != gqa.o_bias:
        raise ConfigError("o_bias", f"{family} has one attention_bias for q, k, v and o")
    else:
        out["attention_bias"] = gqa.qkv_bias
    if gqa.qk_norm != (family == "qwen3"):
        raise ConfigError("qk_norm", f"{gqa.qk_norm} does not go with {family}")
    if family != "llama":
        out["use_sliding_window"] = False
    return out


def _rope(family: str, rope: RopeConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_theta": rope.rope_theta, "rope_scaling": None}
    if rope.scaling is not None:
        # The key each family was published with; DeepSeek's own loaders look for `type`.
        key = "type" if family.startswith("deepseek") else "rope_type"
        names = {
            "linear": ("factor",),
            "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
            "yarn": ROPE_FIELDS[:7],
            "longrope": (*ROPE_FIELDS[:2], "attention_factor", "short_factor", "long_factor"),
        }[rope.scaling.rope_type]
        values = {name: getattr(rope.scaling, name) for name in names}
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}
        out["rope_scaling"] = {key: rope.scaling.rope_type, **lists}
    if rope.interleave != family.startswith("deepseek"):
        if family != "deepseek_v3":
            raise ConfigError("rope_interleave", f"{rope.interleave} cannot be written for {family}")
        out["rope_interleave"] = rope.interleave
    return out
