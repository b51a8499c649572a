"""ModelConfig → GGUF metadata, complete for llama.cpp. `gguf_metadata` is the way back."""

from __future__ import annotations

import warnings

from shoal.config import GQAConfig, MLAConfig, ModelConfig
from shoal.errors import ConfigError


def describe(config: ModelConfig) -> dict[str, object]:
    """The metadata that describes `config`, complete for llama.cpp; tokenizer keys are added by the caller.

    Raises:
        ConfigError: GGUF has no way to say it.
    """
    arch = "deepseek2" if config.is_mla else config.model_type
    if config.rope.interleave and config.model_type in ("qwen2", "qwen3"):
        raise ConfigError("rope_interleave", f"GGUF has no interleaved rotation for {config.model_type!r}")
    out: dict[str, object] = {
        "block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope.rope_theta),
        "rope.dimension_count": config.attention.rope_dim,
    }
    if isinstance(config.attention, MLAConfig):
        if config.attention.q_lora_rank and config.num_hidden_layers in (26, 27):
            _note("llama.cpp takes a deepseek2 model of 26 or 27 layers to have no q_lora_rank")
        out |= _mla(config.attention) | _moe(config)
    else:
        out |= _gqa(config.attention)
    if config.num_nextn_predict_layers:
        out["nextn_predict_layers"] = config.num_nextn_predict_layers
    out |= _scaling(config)
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in out.items()}}


def _note(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _gqa(gqa: GQAConfig) -> dict[str, object]:
    return {
        "attention.head_count": gqa.num_attention_heads,
        "attention.head_count_kv": gqa.num_key_value_heads,
        "attention.key_length": gqa.head_dim,
        "attention.value_length": gqa.head_dim,
    }


def _mla(mla: MLAConfig) -> dict[str, object]:
    if mla.attention_bias:
        raise ConfigError("attention_bias", "GGUF's deepseek2 has no attention biases")
    return {
        "attention.head_count": mla.num_attention_heads,
        "attention.head_count_kv": 1,  # one latent serves all heads
        "attention.q_lora_rank": mla.q_lora_rank or 0,
        "attention.kv_lora_rank": mla.kv_lora_rank,
        "attention.key_length": mla.cache_width,
        "attention.value_length": mla.kv_lora_rank,
        "attention.key_length_mla": mla.qk_head_dim,
        "attention.value_length_mla": mla.v_head_dim,
    }


def _moe(config: ModelConfig) -> dict[str, object]:
    moe = config.moe
    if moe is None:  # llama.cpp wants these keys of every deepseek2 file
        return {
            "leading_dense_block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_count": 0,
        }
    if moe.moe_layer_freq != 1:
        raise ConfigError("moe_layer_freq", f"GGUF can only say 1, got {moe.moe_layer_freq}")
    if (moe.scoring_func == "sigmoid") != (moe.topk_method == "noaux_tc"):
        raise ConfigError("topk_method", f"GGUF cannot say {moe.topk_method!r} with scoring_func {moe.scoring_func!r}")
    if moe.topk_method == "group_limited_greedy" and moe.n_group > 1:
        _note("llama.cpp scores a group of experts by its two best, group_limited_greedy by its best one")
    if not moe.n_shared_experts:
        _note("llama.cpp does not load a deepseek2 model without shared experts; Shoal does")
    out: dict[str, object] = {
        "leading_dense_block_count": moe.first_k_dense_replace,
        "expert_feed_forward_length": moe.moe_intermediate_size,
        "expert_count": moe.n_routed_experts,
        "expert_used_count": moe.num_experts_per_tok,
        "expert_shared_count": moe.n_shared_experts,
        "expert_weights_scale": float(moe.routed_scaling_factor),
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_gating_func": 2 if moe.scoring_func == "sigmoid" else 1,
    }
    if moe.topk_method != "greedy" and moe.n_group > 1:
        out |= {"expert_group_count": moe.n_group, "expert_group_used_count": moe.topk_group}
    return out


def _scaling(config: ModelConfig) -> dict[str, object]:
    scaling = config.rope.scaling
    if scaling is None:
        return {}
    if scaling.rope_type == "llama3":  # said by the tensor rope_freqs.weight, which only this architecture reads
        if config.model_type != "llama":
            raise ConfigError("rope_scaling.rope_type", f"GGUF cannot say 'llama3' for {config.model_type!r}")
        return {}
    if scaling.rope_type == "longrope":
        raise ConfigError("rope_scaling.rope_type", f"GGUF cannot say 'longrope' for {config.model_type!r}")
    out: dict[str, object] = {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": float(scaling.factor)}
    if scaling.rope_type == "linear":
        return out
    out["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    out["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
    out["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    if scaling.attention_factor is not None:
        out["rope.scaling.yarn_attn_factor"] = float(scaling.attention_factor)
    if scaling.mscale_all_dim:
        if scaling.mscale != scaling.mscale_all_dim:
            problem = f"GGUF can only say mscale = mscale_all_dim, got {scaling.mscale} and {scaling.mscale_all_dim}"
            raise ConfigError("rope_scaling.mscale", problem)
        out["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    elif config.is_mla:
        _note("llama.cpp scales YaRN attention differently where mscale_all_dim is absent; expect other logits")
    return out
