"""Routing against loops written from the papers, expert sums against the dense sum, gradients against differences."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from shoal.config import MoEConfig  # noqa: E402
from shoal.model import grouped  # noqa: E402
from shoal.model.grouped import _Experts, runs_of  # noqa: E402
from shoal.model.moe import Experts, MoE, Router, Routing, in_expert_order  # noqa: E402

E, D = 12, 9
METHODS = {
    "greedy": {"topk_method": "greedy", "scoring_func": "softmax"},
    "group_limited_greedy": {"topk_method": "group_limited_greedy", "scoring_func": "softmax"},
    "noaux_tc": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}


def config(method: str, **more) -> MoEConfig:
    base = {
        "n_routed_experts": E,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 5,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    }
    return MoEConfig(**{**base, **METHODS[method], **more})


def best(values: dict[int, float], count: int) -> list[int]:
    return sorted(values, key=lambda key: -values[key])[:count]


def route_one(moe: MoEConfig, logits: list[float], bias: list[float]) -> dict[int, float]:
    """One token's experts and weights, step by step (V2 §2.2.1-2, V3 §2.1.2)."""
    if moe.scoring_func == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = {i: math.exp(x) / total for i, x in enumerate(logits)}
    else:
        scores = {i: 1 / (1 + math.exp(-x)) for i, x in enumerate(logits)}
    chosen_by = {i: scores[i] + (bias[i] if moe.topk_method == "noaux_tc" else 0.0) for i in scores}
    if moe.topk_method != "greedy":
        size = moe.n_routed_experts // moe.n_group
        groups = {g: sorted(chosen_by[i] for i in range(g * size, (g + 1) * size)) for g in range(moe.n_group)}
        num_best = 2 if moe.topk_method == "noaux_tc" else 1
        kept = best({g: sum(values[-num_best:]) for g, values in groups.items()}, moe.topk_group)
        chosen_by = {i: value for i, value in chosen_by.items() if i // size in kept}
    chosen = best(chosen_by, moe.num_experts_per_tok)
    norm = sum(scores[i] for i in chosen) if moe.norm_topk_prob else 1.0
    return {i: scores[i] / norm * moe.routed_scaling_factor for i in chosen}


def make_router(moe: MoEConfig, seed: int = 0) -> Router:
    router = Router(moe, D)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        if moe.has_selection_bias:
            router.e_score_correction_bias.normal_(0, 0.5, generator=generator)
    return router


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (3, 1), (6, 6)])
@pytest.mark.parametrize("method", METHODS)
def test_routing_follows_the_papers(method, groups, norm):
    moe = config(method, n_group=groups[0], topk_group=groups[1], norm_topk_prob=norm)
    router = make_router(moe)
    x_TD = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    routing = router(x_TD)
    bias = router.e_score_correction_bias.tolist() if moe.has_selection_bias else [0.0] * E
    for token, logits in enumerate((x_TD @ router.weight.T).tolist()):
        ours = dict(zip(routing.indices_TK[token].tolist(), routing.weights_TK[token].tolist(), strict=True))
        assert ours == pytest.approx(route_one(moe, logits, bias), rel=1e-4), f"token {token}"


def test_selection_bias_selects_but_does_not_weigh():
    moe = config("noaux_tc", n_group=1, topk_group=1, norm_topk_prob=False)
    router = make_router(moe)
    x_TD = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    router.e_score_correction_bias[7] = 100.0
    routing = router(x_TD)
    assert (routing.indices_TK == 7).any(-1).all()
    gathered = routing.scores_TE.gather(1, routing.indices_TK) * moe.routed_scaling_factor
    assert torch.equal(routing.weights_TK, gathered)
    assert routing.scores_TE.max() < 1.0, "the returned scores are without the bias"


def test_all_groups_below_zero_still_yield_experts_of_the_kept_groups():
    """With a negative bias everywhere, a mask of 0 instead of -inf would pick experts of the dropped groups."""
    moe = config("noaux_tc")
    router = make_router(moe)
    router.e_score_correction_bias.fill_(-5.0)
    x_TD = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    routing = router(x_TD)
    groups = routing.indices_TK // (E // moe.n_group)
    assert max(len(row.unique()) for row in groups) <= moe.topk_group


def test_router_stays_in_float32_under_autocast():
    router = make_router(config("noaux_tc"))
    x_TD = torch.randn(64, D, generator=torch.Generator().manual_seed(1))
    plain = router(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x_TD)
    assert torch.equal(plain.scores_TE, cast.scores_TE)


def make_experts(width: int = 5, hidden: int = D, dtype=torch.float32) -> Experts:
    experts = Experts(E, hidden, width).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(0, 0.5, generator=generator)
    return experts


def some_routing(tokens: int, dtype=torch.float32, num: int = 3) -> Routing:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(tokens, E, generator=generator).to(dtype)
    weights, indices = scores.topk(num, dim=-1)
    return Routing(weights, indices, scores)


def dense_sum(experts: Experts, x_TD, routing: Routing):
    """Every expert on every token, then weights that are zero for the unpicked ones."""
    weights_TE = torch.zeros_like(routing.scores_TE).scatter_add(1, routing.indices_TK, routing.weights_TK)
    gate_TEF = torch.einsum("td,efd->tef", x_TD, experts.gate_proj.weight)
    up_TEF = torch.einsum("td,efd->tef", x_TD, experts.up_proj.weight)
    hidden_TEF = gate_TEF * torch.sigmoid(gate_TEF) * up_TEF
    return torch.einsum("te,tef,edf->td", weights_TE, hidden_TEF, experts.down_proj.weight)


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_experts_equal_the_dense_sum(tokens):
    experts, routing = make_experts(), some_routing(tokens)
    x_TD = torch.randn(tokens, D, generator=torch.Generator().manual_seed(4))
    out_TD = experts(x_TD, routing)
    assert out_TD.shape == (tokens, D)
    torch.testing.assert_close(out_TD, dense_sum(experts, x_TD, routing), rtol=1e-5, atol=1e-6)


def test_nothing_is_dropped_when_all_tokens_pick_one_expert():
    experts = make_experts()
    tokens = 100
    indices_TK = torch.full((tokens, 1), 4)
    routing = Routing(torch.ones(tokens, 1), indices_TK, torch.zeros(tokens, E))
    x_TD = torch.randn(tokens, D, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(experts(x_TD, routing), dense_sum(experts, x_TD, routing), rtol=1e-5, atol=1e-6)


def test_grouped_products_equal_the_experts_in_turn_and_so_do_their_gradients():
    """The path that GPUs take, here on the CPU in float32, with experts that nobody picked."""
    experts, routing = make_experts(width=16, hidden=8), some_routing(20)
    routing = routing._replace(indices_TK=routing.indices_TK // 2 * 2 + (routing.indices_TK == 5))
    x_TD = torch.randn(20, 8, generator=torch.Generator().manual_seed(4))
    upstream = torch.randn(20, 8, generator=torch.Generator().manual_seed(5))
    results = []

    def run_grouped(x, picked):
        return in_expert_order(x, picked, E, experts.run_grouped)

    for run in (experts.forward, run_grouped):
        x, weights = x_TD.clone().requires_grad_(), routing.weights_TK.clone().requires_grad_()
        out = run(x, routing._replace(weights_TK=weights))
        results.append((out, *torch.autograd.grad(out, [x, weights, *experts.parameters()], upstream)))
    for in_turn, together in zip(*results, strict=True):
        torch.testing.assert_close(together, in_turn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [1, 4, 64])
def test_rows_that_fill_a_unit_change_no_result_and_no_gradient(unit):
    experts, routing = make_experts(dtype=torch.float64), some_routing(17, torch.float64)
    routing = routing._replace(indices_TK=routing.indices_TK.clamp(min=1))  # nobody picks expert 0
    x = torch.randn(17, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    weights = routing.weights_TK.clone().requires_grad_()
    runs = runs_of(routing.indices_TK, E, unit)
    assert all(end % unit == 0 for _, end in runs.bounds) and runs.bounds[0] == (0, 0)
    assert runs.row_TK.unique().numel() == 17 * 3
    inputs = (x, weights, *experts.parameters())
    ours = _Experts.apply(*inputs, runs)
    picked = routing._replace(weights_TK=weights)
    expected = dense_sum(experts, x, picked)
    upstream = torch.randn(17, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_frozen_stacks_get_no_gradient_and_pass_on_the_same(monkeypatch):
    experts, routing = make_experts(dtype=torch.float64), some_routing(17, torch.float64)
    products, gradients, compute = [], [], grouped._outer_products

    def count(*args):
        products.append(args)
        return compute(*args)

    monkeypatch.setattr(grouped, "_outer_products", count)
    for frozen in ([], ["gate_proj.weight", "up_proj.weight"], ["down_proj.weight"]):
        for name, weight in experts.named_parameters():
            weight.grad = None
            weight.requires_grad_(name not in frozen)
        x = torch.randn(17, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
        experts(x, routing).square().sum().backward()
        gradients.append({"x": x.grad, **{name: weight.grad for name, weight in experts.named_parameters()}})
        assert {name for name, value in gradients[-1].items() if value is None} == set(frozen)
        for name, value in gradients[-1].items():
            assert value is None or torch.equal(value, gradients[0][name])
    assert len(products) == 2 + 1 + 1, "nothing is computed for what is frozen"


def test_experts_in_bfloat16_stay_near_float32():
    """Enough rows for whole units; the weights of the layer stay float32, and so do their gradients."""
    experts, routing = make_experts(width=16, hidden=32), some_routing(400)
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
    wide = experts(x, routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = experts(x, routing)
    assert low.dtype == torch.bfloat16
    for a, b in zip(
        torch.autograd.grad(low.float().square().sum(), [x, *experts.parameters()]),
        torch.autograd.grad(wide.square().sum(), [x, *experts.parameters()]),
        strict=True,
    ):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.02


def test_expert_gradients_in_float64():
    experts = make_experts(width=4, hidden=3, dtype=torch.float64)
    routing = some_routing(5, torch.float64)
    x_TD = torch.randn(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    weights_TK = routing.weights_TK.clone().requires_grad_()
    names = [name for name, _ in experts.named_parameters()]

    def run(x, weights, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, state, (x, routing._replace(weights_TK=weights)))

    assert torch.autograd.gradcheck(run, (x_TD, weights_TK, *experts.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_layer_gradients_reach_router_and_shared_experts_in_float64(method):
    moe = config(method, moe_intermediate_size=2, n_shared_experts=1)
    layer = MoE(moe, 3).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(generator=generator)
    x = torch.randn(1, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        out, routing = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return out, routing.scores_TE

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
    gate_grad = torch.autograd.grad(layer(x)[0].square().sum(), layer.gate.weight)[0]
    assert gate_grad.abs().max() > 1e-6


def test_layer_without_shared_experts():
    moe = config("greedy", n_shared_experts=0)
    layer = MoE(moe, D)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    x_BTD = torch.randn(2, 7, D, generator=torch.Generator().manual_seed(4))
    out_BTD, routing = layer(x_BTD)
    assert out_BTD.shape == x_BTD.shape
    expected = dense_sum(layer.experts, x_BTD.flatten(0, 1), routing)
    torch.testing.assert_close(out_BTD.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
