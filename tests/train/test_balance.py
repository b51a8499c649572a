"""The selection bias against the published rule, written out; statistics by hand; and a router that evens out."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from shoal.config import MLAConfig, ModelConfig, MoEConfig  # noqa: E402
from shoal.model import Model, Routing, random_model  # noqa: E402
from shoal.train.balance import RouterBalance  # noqa: E402

E = 4


def tiny(**more) -> ModelConfig:
    moe = {
        "n_routed_experts": E,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 4,
        "first_k_dense_replace": 1,
        **more,
    }
    attention = MLAConfig(num_attention_heads=1, kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2)
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
        attention=attention, moe=MoEConfig(**moe),
    )  # fmt: skip


def routing(picks: list[int]) -> Routing:
    indices = torch.tensor(picks, dtype=torch.long).view(-1, 1)
    return Routing(torch.ones_like(indices, dtype=torch.float32), indices, torch.zeros(len(picks), E))


def bias(model: Model, layer: int) -> list[float]:
    return model.model.layers[layer].mlp.gate.e_score_correction_bias.tolist()


def test_biases_move_by_the_sign_of_the_load_of_the_whole_step():
    model, balance = random_model(tiny(), 0), RouterBalance(0.25)
    # Over both batches expert 0 has 4 picks, 1 and 2 have 2 (the mean), 3 has none. Either batch alone says otherwise.
    balance.observe({1: routing([0, 0, 0, 0]), 2: routing([3, 3, 3, 3])})
    balance.observe({1: routing([1, 1, 2, 2]), 2: routing([3, 3, 3, 3])})
    assert bias(model, 1) == [0, 0, 0, 0], "nothing moves before the step ends"
    balance.update(model)
    assert bias(model, 1) == [-0.25, 0, 0, 0.25]
    assert bias(model, 2) == [0.25, 0.25, 0.25, -0.25], "and is not centred"
    balance.observe({1: routing([3]), 2: routing([0])})
    balance.update(model)
    assert bias(model, 1) == [0, 0.25, 0.25, 0], "the next step counts anew"


def test_statistics_are_those_of_the_last_step():
    model, balance = random_model(tiny(), 0), RouterBalance()
    assert balance.statistics() == {}
    balance.observe({1: routing([0, 0, 0, 1]), 2: routing([0, 1, 2, 3])})
    assert balance.statistics() == {}, "the step has not ended"
    balance.update(model)
    uneven, even = balance.statistics()[1], balance.statistics()[2]
    assert (uneven.load, uneven.max_vio, uneven.dead) == ([3, 1, 0, 0], 2.0, 2)
    assert uneven.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert (even.load, even.max_vio, even.dead) == ([1, 1, 1, 1], 0.0, 0)
    assert even.entropy == pytest.approx(1.0)


def test_a_step_without_experts_or_picks_changes_nothing():
    model, balance = random_model(tiny(), 0), RouterBalance()
    balance.update(model)
    balance.observe({1: routing([])})
    balance.update(model)
    assert bias(model, 1) == [0, 0, 0, 0]
    assert balance.statistics()[1].max_vio == -1.0


def test_routers_without_a_bias_are_counted_only():
    model = random_model(tiny(topk_method="greedy", scoring_func="softmax"), 0)
    balance = RouterBalance()
    balance.observe({1: routing([0, 0]), 2: routing([1, 1])})
    balance.update(model)
    assert balance.statistics()[2].load == [0, 2, 0, 0]


def test_a_collapsed_router_evens_out():
    """Inputs that all prefer one expert: the biases alone spread them until every expert is busy."""
    model, balance = random_model(tiny(), 0), RouterBalance(0.01)
    gate = model.model.layers[1].mlp.gate
    x_TD = torch.randn(400, 8, generator=torch.Generator().manual_seed(1)) + 2.0
    with torch.no_grad():
        gate.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
        gate.weight[0] += 0.5
    first = None
    for _ in range(120):
        balance.observe({1: gate(x_TD)})
        balance.update(model)
        first = first or balance.statistics()[1]
    assert first.max_vio > 2.5
    assert balance.statistics()[1].max_vio < 0.3


def test_processes_share_their_counts():
    """The picks of another process are added before anything moves. (Real processes: test_parallel.py.)"""
    others = torch.tensor([[0, 2, 2, 0], [0, 1, 0, 0]])
    model, balance = random_model(tiny(), 0), RouterBalance(0.25, lambda counts_LE: counts_LE + others)
    balance.observe({1: routing([0, 0, 0, 0]), 2: routing([0])})
    balance.update(model)
    assert bias(model, 1) == [-0.25, 0, 0, 0.25]
    assert balance.statistics()[1].load == [4, 2, 2, 0]
