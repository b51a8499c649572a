"""Published sizes of published models, recomputed from their configurations."""

from __future__ import annotations

import pytest

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from shoal.cost.model_cost import cache_bytes_per_token, flops_per_token, model_cost, params_by_part

V3 = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    attention=MLAConfig(
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_shared_experts=1,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=1,
)
V2_LITE = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    attention=MLAConfig(
        num_attention_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    moe=MoEConfig(
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
    ),
)
SMOLLM2 = ModelConfig(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    attention=GQAConfig(num_attention_heads=9, num_key_value_heads=3, head_dim=64),
    tie_word_embeddings=True,
)


def test_deepseek_v3_has_its_published_size() -> None:
    cost = model_cost(V3)
    assert round(cost.total_params / 1e9, 2) == 671.03
    assert round(cost.active_params / 1e9) == 37
    assert cost.cache_bytes_per_token == 70_272
    assert cost.full_cache_bytes_per_token == 4_997_120
    assert 11.4e9 <= cost.params["mtp"] <= 11.7e9


def test_deepseek_v2_lite_has_its_published_size() -> None:
    cost = model_cost(V2_LITE)
    assert round(cost.total_params / 1e9, 1) == 15.7
    assert cost.active_params // 10**8 == 24  # published as 2.4 B; 2.45 B exactly
    assert cost.cache_bytes_per_token == 31_104
    assert cost.full_cache_bytes_per_token == 276_480


def test_a_tied_dense_model_counts_its_head_once_and_multiplies_it() -> None:
    cost = model_cost(SMOLLM2)
    assert cost.total_params == cost.active_params == 134_515_008
    assert "head" not in cost.params
    assert cost.flops_per_token["head"] == 2 * 49152 * 576
    assert cost.cache_bytes_per_token == 30 * 2 * 3 * 64 * 2


@pytest.mark.parametrize("config", [V3, V2_LITE, SMOLLM2])
def test_parts_add_up(config: ModelConfig) -> None:
    cost = model_cost(config)
    parts = params_by_part(config)
    assert sum(parts.values()) - parts.get("mtp", 0) == cost.total_params
    # Norms and the router's selection bias are weights but no matrix products.
    assert cost.total_flops_per_token == pytest.approx(2 * cost.active_params, rel=1e-3)


def test_attention_over_the_context_grows_linearly_and_mla_pays_for_its_latent() -> None:
    at_1k, at_2k = (flops_per_token(V3, context=size)["attention_over_context"] for size in (1024, 2048))
    assert at_2k == 2 * at_1k == 61 * 2048 * 2 * 128 * (512 + 64 + 512)
    assert "attention_over_context" not in flops_per_token(V3)


def test_cache_bytes_follow_the_stored_type() -> None:
    assert cache_bytes_per_token(V3, 1) * 4 == cache_bytes_per_token(V3, 4)
