"""Parameters, cache bytes and operations of a model, from its configuration alone.

Letters: D hidden_size, N heads, K key/value heads, H nope, R rope, C latent, V value head, S cached tokens, L layers.
One multiply-add counts as two operations (FLOPs). Norms, rotary positions, softmax and activations are left out:
together they stay below one percent of the matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.config import MLAConfig, ModelConfig
from shoal.formats.layout import count_active_params, count_params, expected_tensors

# Order of the rows that `shoal info` prints.
PARTS = ("embedding", "attention", "dense_mlp", "router", "routed_experts", "shared_experts", "norms", "head", "mtp")


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """The cost sheet of a model.

    Attributes:
        total_params: weights of the main model; a tied head counts once, MTP layers not at all.
        active_params: weights that one token multiplies, output head included, embedding row not.
        params: weights by part (`PARTS`), MTP layers included.
        cache_bytes_per_token: bytes that one more token of context holds in the cache, over all layers.
        full_cache_bytes_per_token: the same if keys and values of every query head were cached (no MLA, no grouping).
        flops_per_token: operations of one decoding step by part, at `context` cached tokens.
        context: the number of cached tokens that `flops_per_token` assumes.
    """

    total_params: int
    active_params: int
    params: Mapping[str, int]
    cache_bytes_per_token: int
    full_cache_bytes_per_token: int
    flops_per_token: Mapping[str, int]
    context: int

    @property
    def total_flops_per_token(self) -> int:
        return sum(self.flops_per_token.values())


def model_cost(config: ModelConfig, *, context: int = 0, cache_value_bytes: int = 2) -> ModelCost:
    """The cost sheet at `context` cached tokens; cached values take `cache_value_bytes` bytes each (2: bfloat16)."""
    return ModelCost(
        total_params=count_params(config),
        active_params=count_active_params(config),
        params=params_by_part(config),
        cache_bytes_per_token=cache_bytes_per_token(config, cache_value_bytes),
        full_cache_bytes_per_token=full_cache_bytes_per_token(config, cache_value_bytes),
        flops_per_token=flops_per_token(config, context=context),
        context=context,
    )


def params_by_part(config: ModelConfig) -> dict[str, int]:
    """Number of weights by part; parts that the model lacks are left out. A tied head has no weights of its own."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in expected_tensors(config).items():
        counts[part_of(config, name)] += math.prod(shape)
    return {part: count for part, count in counts.items() if count}


def cache_bytes_per_token(config: ModelConfig, value_bytes: int = 2) -> int:
    """L · width · value_bytes, where width is C + R for MLA (DeepSeek-V2 §2.1.4) and 2 · K · head_dim for GQA."""
    return config.num_hidden_layers * config.attention.cache_width * value_bytes


def full_cache_bytes_per_token(config: ModelConfig, value_bytes: int = 2) -> int:
    """L · N · (key width + value width) · value_bytes: plain multi-head attention with the same heads."""
    attention = config.attention
    if isinstance(attention, MLAConfig):
        per_head = attention.qk_head_dim + attention.v_head_dim
    else:
        per_head = 2 * attention.head_dim
    return config.num_hidden_layers * attention.num_attention_heads * per_head * value_bytes


def flops_per_token(config: ModelConfig, *, context: int = 0) -> dict[str, int]:
    """Operations of one decoding step by part: 2 · weights used, and the attention over `context` cached tokens.

    Attention over the cache, for each layer and cached token: GQA 4 · N · head_dim (scores and weighted sum); MLA in
    its absorbed form, which a decoder runs, 2 · N · (C + R) for the scores and 2 · N · C for the sum (DeepSeek-V2
    §2.1.2; the kv_b projection is then applied to query and output, at the same cost as to one token).
    """
    flops: dict[str, int] = {}
    for part, count in params_by_part(config).items():
        if part in ("embedding", "norms", "mtp"):
            continue
        if part == "routed_experts" and config.moe is not None:
            count = count // config.moe.n_routed_experts * config.moe.num_experts_per_tok
        flops[part] = 2 * count
    flops["head"] = 2 * config.vocab_size * config.hidden_size
    attention = config.attention
    if isinstance(attention, MLAConfig):
        per_cached = 2 * attention.num_attention_heads * (2 * attention.kv_lora_rank + attention.qk_rope_head_dim)
    else:
        per_cached = 4 * attention.num_attention_heads * attention.head_dim
    if context:
        flops["attention_over_context"] = config.num_hidden_layers * per_cached * context
    return flops


def part_of(config: ModelConfig, name: str) -> str:
    """Which of `PARTS` the tensor of this name (`formats.layout`) belongs to."""
    pieces = name.split(".")
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    if pieces[1] == "layers" and int(pieces[2]) in config.mtp_layers:
        return "mtp"
    if pieces[-2].endswith("norm"):
        return "norms"
    if "self_attn" in pieces:
        return "attention"
    if "shared_experts" in pieces:
        return "shared_experts"
    if "experts" in pieces:
        return "routed_experts"
    return "router" if pieces[4] == "gate" else "dense_mlp"
