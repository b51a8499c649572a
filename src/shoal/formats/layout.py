"""Shoal's own tensor names: every weight of a model and its shape, derived from the configuration alone.

The names are the published Hugging Face ones with one difference: the routed experts of a layer are stacked, so that
`mlp.experts.0.gate_proj.weight [F, D]` … become one `mlp.experts.gate_proj.weight [E, F, D]`. Foreign names (one tensor
per expert; GGUF's `blk.0.ffn_gate_exps`) are translated by the readers and writers beside this file.

Shape letters: D hidden_size, F intermediate, N heads, H nope, R rope, C latent, V value head, E experts.
"""

from __future__ import annotations

import math

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig

Shape = tuple[int, ...]
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model in the order of the forward pass, MTP layers last; norms, biases, router included."""
    out: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        out.update(_layer_tensors(config, f"model.layers.{layer}.", moe=config.is_moe_layer(layer)))
    out["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for layer in config.mtp_layers:
        out.update(_mtp_tensors(config, f"model.layers.{layer}."))
    return out


def count_params(config: ModelConfig, *, mtp: bool = False) -> int:
    """Number of weights of the main model, with the MTP layers if asked. A tied head counts once."""
    return sum(math.prod(shape) for name, shape in expected_tensors(config).items() if mtp or not _is_mtp(config, name))


def count_active_params(config: ModelConfig) -> int:
    """Weights that one token's forward pass multiplies: all but the unused experts and the embedding table.

    The output head counts (it is read in full even when tied); an embedding is one row and does not.
    """
    total = 0
    for name, shape in expected_tensors(config).items():
        if _is_mtp(config, name):
            continue
        if name == "model.embed_tokens.weight":
            total += math.prod(shape) if config.tie_word_embeddings else 0
        elif ".mlp.experts." in name and config.moe is not None:
            total += math.prod(shape) // config.moe.n_routed_experts * config.moe.num_experts_per_tok
        else:
            total += math.prod(shape)
    return total


def _is_mtp(config: ModelConfig, name: str) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= config.num_hidden_layers


def _linear(name: str, rows: int, cols: int, bias: bool = False) -> dict[str, Shape]:
    out: dict[str, Shape] = {f"{name}.weight": (rows, cols)}
    if bias:
        out[f"{name}.bias"] = (rows,)
    return out


def _layer_tensors(config: ModelConfig, prefix: str, *, moe: bool) -> dict[str, Shape]:
    out: dict[str, Shape] = {f"{prefix}input_layernorm.weight": (config.hidden_size,)}
    if isinstance(config.attention, MLAConfig):
        out.update(_mla_tensors(config.attention, config.hidden_size, f"{prefix}self_attn."))
    else:
        out.update(_gqa_tensors(config.attention, config.hidden_size, f"{prefix}self_attn."))
    out[f"{prefix}post_attention_layernorm.weight"] = (config.hidden_size,)
    if moe:
        assert config.moe is not None
        out.update(_moe_tensors(config.moe, config.hidden_size, f"{prefix}mlp."))
    else:
        out.update(_mlp_tensors(config.hidden_size, config.intermediate_size, f"{prefix}mlp.", config.mlp_bias))
    return out


def _gqa_tensors(gqa: GQAConfig, hidden: int, prefix: str) -> dict[str, Shape]:
    query = gqa.num_attention_heads * gqa.head_dim
    key = gqa.num_key_value_heads * gqa.head_dim
    out = _linear(f"{prefix}q_proj", query, hidden, gqa.qkv_bias)
    out.update(_linear(f"{prefix}k_proj", key, hidden, gqa.qkv_bias))
    out.update(_linear(f"{prefix}v_proj", key, hidden, gqa.qkv_bias))
    if gqa.qk_norm:
        out[f"{prefix}q_norm.weight"] = (gqa.head_dim,)
        out[f"{prefix}k_norm.weight"] = (gqa.head_dim,)
    out.update(_linear(f"{prefix}o_proj", hidden, query, gqa.o_bias))
    return out


def _mla_tensors(mla: MLAConfig, hidden: int, prefix: str) -> dict[str, Shape]:
    query = mla.num_attention_heads * mla.qk_head_dim
    out: dict[str, Shape] = {}
    if mla.q_lora_rank is None:
        out.update(_linear(f"{prefix}q_proj", query, hidden))
    else:
        out.update(_linear(f"{prefix}q_a_proj", mla.q_lora_rank, hidden, mla.attention_bias))
        out[f"{prefix}q_a_layernorm.weight"] = (mla.q_lora_rank,)
        out.update(_linear(f"{prefix}q_b_proj", query, mla.q_lora_rank))
    out.update(
        _linear(f"{prefix}kv_a_proj_with_mqa", mla.kv_lora_rank + mla.qk_rope_head_dim, hidden, mla.attention_bias)
    )
    out[f"{prefix}kv_a_layernorm.weight"] = (mla.kv_lora_rank,)
    per_head = mla.qk_nope_head_dim + mla.v_head_dim
    out.update(_linear(f"{prefix}kv_b_proj", mla.num_attention_heads * per_head, mla.kv_lora_rank))
    out.update(_linear(f"{prefix}o_proj", hidden, mla.num_attention_heads * mla.v_head_dim, mla.attention_bias))
    return out


def _mlp_tensors(hidden: int, width: int, prefix: str, bias: bool = False) -> dict[str, Shape]:
    out = _linear(f"{prefix}gate_proj", width, hidden, bias)
    out.update(_linear(f"{prefix}up_proj", width, hidden, bias))
    out.update(_linear(f"{prefix}down_proj", hidden, width, bias))
    return out


def _moe_tensors(moe: MoEConfig, hidden: int, prefix: str) -> dict[str, Shape]:
    out: dict[str, Shape] = {f"{prefix}gate.weight": (moe.n_routed_experts, hidden)}
    if moe.has_selection_bias:
        out[f"{prefix}gate.e_score_correction_bias"] = (moe.n_routed_experts,)
    for part in EXPERT_PARTS:
        rows, cols = (hidden, moe.moe_intermediate_size) if part == "down_proj" else (moe.moe_intermediate_size, hidden)
        out[f"{prefix}experts.{part}.weight"] = (moe.n_routed_experts, rows, cols)
    if moe.n_shared_experts:
        out.update(_mlp_tensors(hidden, moe.shared_intermediate_size, f"{prefix}shared_experts."))
    return out


def _mtp_tensors(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    hidden = config.hidden_size
    out: dict[str, Shape] = {
        f"{prefix}enorm.weight": (hidden,),
        f"{prefix}hnorm.weight": (hidden,),
        f"{prefix}eh_proj.weight": (hidden, 2 * hidden),
    }
    out.update(_layer_tensors(config, prefix, moe=config.moe is not None))
    out[f"{prefix}shared_head.norm.weight"] = (hidden,)
    return out
