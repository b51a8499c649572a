"""Probes against the gradient itself; the knapsack against every other way to spend; experts by their work."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from shoal.errors import ConfigError  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.model import load_model  # noqa: E402
from shoal.tune.adapters import count, factors_of, targets  # noqa: E402
from shoal.tune.placement import (  # noqa: E402
    Piece,
    allocate,
    choose_experts,
    parse_budget,
    place,
    probe,
    uniform_ranks,
)

TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def loss(model):
    return model(TOKENS).log_softmax(-1)[..., :-1, :].gather(-1, TOKENS[:, 1:, None]).mean().neg()


def even(model):
    return {i: torch.ones(8) / 8 for i in (1, 2)} if model.config.moe else {}


@pytest.mark.parametrize("family", ["v3", "llama"])
def test_probes_find_the_gradients_leading_part(hf_folder, family):
    _, folder = hf_folder(family)
    model = load_model(open_checkpoint(folder))
    probed = probe(model, lambda: loss(model).backward(), lambda: even(model), probes=24)
    assert factors_of(model) == {}
    model.requires_grad_(True)
    loss(model).backward()
    grads = dict(model.named_parameters())
    checked = 0
    for (target, expert), piece in probed.pieces.items():
        if target.endswith("gate_up_proj"):
            stem = target.removesuffix("gate_up_proj")
            gradient = torch.cat([grads[f"{stem}{p}_proj.weight"].grad[expert] for p in ("gate", "up")])
        else:
            gradient = grads[f"{target}.weight"].grad
            gradient = gradient[expert] if gradient.dim() == 3 else gradient
        _, sigma, right = torch.linalg.svd(gradient, full_matrices=False)
        assert piece.sigma[0] == pytest.approx(float(sigma[0]), rel=1e-3)
        assert abs(float(piece.right[0] @ right[0])) == pytest.approx(1, abs=1e-2)
        checked += 1
    assert checked > 10


def test_only_experts_that_do_the_work_are_probed(hf_folder):
    _, folder = hf_folder("v3")
    model = load_model(open_checkpoint(folder))
    shares = {1: torch.tensor([0.0, 0, 0.6, 0, 0, 0.4, 0, 0]), 2: torch.ones(8) / 8}
    probed = probe(model, lambda: loss(model).backward(), lambda: shares, probes=2)
    assert {e for t, e in probed.pieces if t == "model.layers.1.mlp.experts.down_proj"} == {2}
    assert len({e for t, e in probed.pieces if t == "model.layers.2.mlp.experts.down_proj"}) == 3


def test_the_fewest_experts_with_enough_of_the_weight():
    share = torch.tensor([0.1, 0.4, 0.05, 0.45])
    assert choose_experts(share, 0.4) == {3}
    assert choose_experts(share, 0.5) == {1, 3}
    assert choose_experts(share, 1.0) == {0, 1, 2, 3}


def test_the_budget_is_kept_and_no_other_spending_of_it_is_worth_more():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (1, 3, 5), "b": (2, 4, 4), "c": (1, 2, 6)}  # a rank costs 8 everywhere
    pieces = {
        (target, expert): Piece(torch.rand(2, generator=generator).sort().values.flip(0), torch.zeros(2, shape[2]))
        for target, shape in shapes.items()
        for expert in range(shape[0])
    }  # fmt: skip
    for budget in (8, 30, 48, 1000):
        ranks = allocate(pieces, shapes, budget)
        assert count(ranks, shapes) == min(budget // 8 * 8, 8 * 8)
        worth = sum(float(pieces[t, e].sigma[:r].sum()) for t, each in ranks.items() for e, r in enumerate(each))
        best = max(
            sum(float(pieces[key].sigma[:r].sum()) for key, r in zip(pieces, choice, strict=True))
            for choice in itertools.product(range(3), repeat=4)
            if 8 * sum(choice) <= budget
        )
        assert worth == pytest.approx(best)
    with pytest.raises(ConfigError, match="budget: 7 parameters are too few: the smallest adapter takes 8"):
        allocate(pieces, shapes, 7)


def test_a_cheap_matrix_wins_over_a_dear_one_of_little_more_gradient():
    pieces = {
        ("dear", 0): Piece(torch.tensor([1.2]), torch.zeros(1, 9)),
        ("cheap", 0): Piece(torch.tensor([1.0]), torch.zeros(1, 3)),
    }
    assert allocate(pieces, {"dear": (1, 9, 9), "cheap": (1, 3, 3)}, 20) == {"cheap": (1,)}


def test_placing_starts_where_the_model_was_and_its_first_step_goes_down(hf_folder):
    _, folder = hf_folder("v3")
    model = load_model(open_checkpoint(folder))
    before = loss(model).item()
    probed = probe(model, lambda: loss(model).backward(), lambda: even(model))
    budget = 4000
    factors = place(model, probed, budget)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0.9 * budget < sum(p.numel() for p in trained) <= budget
    assert loss(model).item() == pytest.approx(before, abs=1e-5)
    loss(model).backward()
    with torch.no_grad():
        for one in factors.values():
            one.b -= 0.05 * one.b.grad
    assert loss(model).item() < before - 1e-4


def test_plain_lora_of_the_same_budget(hf_folder):
    _, folder = hf_folder("llama")
    shapes = targets(load_model(open_checkpoint(folder)))
    ranks = uniform_ranks(shapes, 1000, ["q_proj", "v_proj"])
    assert len(ranks) == 4 and len(set(ranks.values())) == 1
    assert 1000 - count(dict.fromkeys(ranks, (1,)), shapes) < count(ranks, shapes) <= 1000
    with pytest.raises(ConfigError, match="targets: no matrix"):
        uniform_ranks(shapes, 1000, ["nothing"])


@pytest.mark.parametrize(("text", "expected"), [("0.3%", 3000), ("400", 400), ("1_000", 1000)])
def test_budgets_as_share_or_count(text, expected):
    assert parse_budget(text, 1_000_000) == expected


@pytest.mark.parametrize("text", ["", "0%", "x%", "nan", "60%", "-5", "1e99"])
def test_impossible_budgets(text):
    with pytest.raises(ConfigError, match="budget"):
        parse_budget(text, 1_000_000)
