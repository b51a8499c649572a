"""Logits against transformers, family by family, on tiny random models of odd sizes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from shoal.formats.layout import expected_tensors  # noqa: E402
from shoal.model import Model  # noqa: E402

T = 40


def yarn(**more):
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,  # the texts here are longer
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        **more,
    }


def linear():
    return {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}


def llama3():
    return {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 60,
    }


V2 = {"model_type": "deepseek_v2"}
V3 = {"model_type": "deepseek_v3"}
GROUPS = {"n_group": 4, "topk_group": 2}
CASES = {
    "v2-lite": {**V2, "num_attention_heads": 5},
    "v2-lite-yarn": {**V2, "rope_parameters": yarn(mscale=0.707, mscale_all_dim=0.707)},
    "v2-groups": {
        **V2,
        **GROUPS,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "q_lora_rank": 24,
        "first_k_dense_replace": 2,
        "rope_parameters": yarn(mscale=1.0, mscale_all_dim=0.4),
    },
    "v2-no-dense": {**V2, "first_k_dense_replace": 0, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "v2-bias": {**V2, "attention_bias": True, "q_lora_rank": 17, "rope_parameters": yarn()},
    "v2-all-dense": {**V2, "first_k_dense_replace": 3, "rope_parameters": yarn(mscale_all_dim=0.7)},
    "v2-yarn-factor": {**V2, "rope_parameters": yarn(attention_factor=1.3, mscale=0.5, mscale_all_dim=1.0)},
    "v3": {**V3, "num_attention_heads": 5, "num_key_value_heads": 5},
    "v3-released": {
        **V3,
        **GROUPS,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 24,
        "n_shared_experts": 1,
        "rope_parameters": yarn(mscale=1.0, mscale_all_dim=1.0),
    },
    "v3-half-split": {
        **V3,
        **GROUPS,
        "rope_interleave": False,
        "rope_parameters": yarn(mscale=0.6, mscale_all_dim=1.2),
    },
    "v3-unnormalised": {
        **V3,
        **GROUPS,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "tie_word_embeddings": True,
    },
    "v3-top1": {**V3, "num_experts_per_tok": 1, "routed_scaling_factor": 1.7, "first_k_dense_replace": 2},
    "v3-bias": {**V3, "n_group": 3, "topk_group": 1, "attention_bias": True, "q_lora_rank": 33},
    "v3-linear": {**V3, "rope_parameters": linear()},
    "llama": {"model_type": "llama"},
    "llama-3": {"model_type": "llama", "rope_parameters": llama3(), "tie_word_embeddings": True},
    "llama-linear": {"model_type": "llama", "rope_parameters": linear(), "num_key_value_heads": 1},
    "llama-yarn": {"model_type": "llama", "rope_parameters": yarn(), "num_key_value_heads": 6},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 3, "num_key_value_heads": 1},
    "qwen2-tied-yarn": {
        "model_type": "qwen2",
        "hidden_size": 60,
        "tie_word_embeddings": True,
        "rope_parameters": yarn(factor=4.0),
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True, "head_dim": 14},
}


def relative_error(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def some_tokens(batch: int = 2, length: int = T):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name, twins):
    hf, model = twins(CASES[name])
    tokens_BT = some_tokens()
    with torch.no_grad():
        theirs = hf(tokens_BT).logits
        ours = model(tokens_BT)
    assert relative_error(ours, theirs) < 1e-4
    assert theirs.std() > 0.1, "weights too small to tell anything apart"


@pytest.mark.parametrize("name", ["v2-groups", "v3-released", "v3-half-split", "llama-3", "llama-yarn", "qwen3"])
def test_far_positions_match_transformers(name, twins):
    hf, model = twins(CASES[name])
    tokens_BT = some_tokens(length=12)
    positions_BT = torch.stack((torch.arange(12) * 37 + 4000, torch.arange(12) + 90))
    with torch.no_grad():
        theirs = hf(tokens_BT, position_ids=positions_BT).logits
        ours = model(tokens_BT, positions=positions_BT)
        near = model(tokens_BT)
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(near[0], theirs[0]) > 1e-2, "the positions made no difference"


@pytest.mark.parametrize("name", ["v2-groups", "v3-released"])
def test_absorbed_and_cached_decode_match_transformers(name, twins):
    from shoal.model import new_cache

    hf, model = twins(CASES[name])
    tokens_BT = some_tokens()
    cache = new_cache(model.config, batch=2, capacity=T)
    with torch.no_grad():
        theirs = hf(tokens_BT).logits
        ours = torch.cat([model(tokens_BT[:, i : i + 1], cache=cache, absorbed=True) for i in range(T)], dim=1)
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("v") and "dense" not in name])
def test_routing_in_these_tests_is_not_trivial(name, randomised):
    model = randomised(CASES[name])
    with torch.no_grad():
        routings = model.states(some_tokens()).routings
    assert sorted(routings) == [i for i in range(model.config.num_hidden_layers) if model.config.is_moe_layer(i)]
    for routing in routings.values():
        assert len(routing.indices_TK.unique()) > model.config.moe.num_experts_per_tok + 3


@pytest.mark.parametrize(("name", "mtp"), [(name, 0) for name in CASES] + [("v2-groups", 1), ("v3-released", 2)])
def test_state_dict_is_the_layout(name, mtp, config_of):
    config = config_of({**CASES[name], "num_nextn_predict_layers": mtp})
    with torch.device("meta"):
        state = Model(config).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected_tensors(config)
