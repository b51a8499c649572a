"""Memory of training, from a model's configuration: what stays (weights, gradients, optimiser) and what a pass keeps.

State follows `shoal.train`: float32 master weights and gradients; AdamW's two moments, or Muon's one for matrices; and
under bf16 autocast a bfloat16 copy of every matrix while a step runs. Activations are what the layers of `shoal.model`
keep for the backward pass under autocast: the residual stream before each norm and what routers read in float32, inputs
and outputs of products in bfloat16 (on a CPU; a GPU keeps somewhat more for its norms, attention and grouped experts).
Small vectors a token are left out; a test holds the sum against what PyTorch really saves.

Letters: D hidden_size, N heads, H nope, R rope, V value head, C latent, F intermediate, E experts, K active experts.
"""

from __future__ import annotations

import math

from shoal.config import MLAConfig, ModelConfig
from shoal.formats.layout import count_params, expected_tensors

F32, BF16 = 4, 2


def state_bytes(config: ModelConfig, *, optimiser: str = "adamw", bf16: bool = True) -> dict[str, int]:
    """Bytes that do not depend on the batch, by part, over all devices together."""
    total = count_params(config, mtp=True)
    matrices = sum(
        math.prod(shape)
        for name, shape in expected_tensors(config).items()
        if len(shape) > 1 and name not in ("model.embed_tokens.weight", "lm_head.weight")
    )
    moments = 2 * total - (matrices if optimiser == "muon" else 0)
    out = {"weights": F32 * total, "gradients": F32 * total, "optimiser": F32 * moments}
    if bf16:
        out["bf16_copies"] = BF16 * total
    return out


def activation_bytes(config: ModelConfig, *, tokens: int, checkpointing: bool = False) -> dict[str, int]:
    """Bytes that one forward pass over `tokens` tokens keeps for the backward pass, by part, in bf16 mixed precision.

    With activation checkpointing each layer keeps its input, and the largest layer is made again.
    """
    layers = [_layer(config, config.is_moe_layer(index)) for index in range(config.num_hidden_layers)]
    layers += [_layer(config, config.moe is not None) for _ in config.mtp_layers]
    hidden = config.hidden_size
    # What the last norm reads. The loss makes the gradient of its input at once instead of keeping logits.
    depths = 1 + config.num_nextn_predict_layers
    out = {"loss": depths * (F32 + BF16) * hidden}
    if config.num_nextn_predict_layers:
        # What both norms read, and the joint input of eh_proj.
        out["mtp_join"] = config.num_nextn_predict_layers * (F32 + BF16 + 2 * BF16) * hidden
    if checkpointing:
        out["layer_inputs"] = len(layers) * F32 * hidden
        out["one_layer"] = max(sum(layer.values()) for layer in layers)
    else:
        for part in dict.fromkeys(name for layer in layers for name in layer):
            out[part] = sum(layer.get(part, 0) for layer in layers)
    return {part: count * tokens for part, count in out.items()}


def _layer(config: ModelConfig, moe: bool) -> dict[str, int]:
    """Bytes a token that one layer keeps."""
    return {"norms": 2 * F32 * config.hidden_size, "attention": _attention(config)} | (
        _experts(config) if moe else {"dense_mlp": _mlp(config.hidden_size, config.intermediate_size)}
    )


def _attention(config: ModelConfig) -> int:
    attention, hidden = config.attention, config.hidden_size
    if isinstance(attention, MLAConfig):
        heads = attention.num_attention_heads
        latents = attention.kv_lora_rank + (attention.q_lora_rank or 0)
        inputs = hidden + latents + heads * attention.v_head_dim  # of q and kv_a, of kv_b, of o
        normed = attention.cache_width + (attention.q_lora_rank or 0)
        return BF16 * (inputs + normed + heads * (2 * attention.qk_head_dim + attention.v_head_dim))
    query = attention.num_attention_heads * attention.head_dim
    return BF16 * (hidden + 3 * query + attention.cache_width)


def _mlp(hidden: int, width: int) -> int:
    """The input; gate, its SiLU, up and their product."""
    return BF16 * (hidden + 4 * width)


def _experts(config: ModelConfig) -> dict[str, int]:
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    # One operator: it keeps its input and the two products before the gate, and makes the rest again.
    picked = BF16 * (hidden + moe.num_experts_per_tok * 2 * moe.moe_intermediate_size)
    return {
        "router": F32 * (hidden + 2 * moe.n_routed_experts),
        "routed_experts": picked,
        "shared_experts": _mlp(0, moe.shared_intermediate_size) if moe.n_shared_experts else 0,  # of the same input
    }
