"""Muon against torch's own and against the polar factor of an SVD; who is optimised by what; resuming to the bit."""

from __future__ import annotations

import copy
import math

import pytest

torch = pytest.importorskip("torch")

from shoal.config import MLAConfig, ModelConfig, MoEConfig  # noqa: E402
from shoal.errors import ConfigError  # noqa: E402
from shoal.model import Model, random_model  # noqa: E402
from shoal.train.losses import LossSettings, TextBatch, language_loss  # noqa: E402
from shoal.train.optim import Muon, OptimiserSettings, make_optimisers, orthogonalise  # noqa: E402


def make_model(*, tied: bool = False) -> Model:
    moe = MoEConfig(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, n_shared_experts=1, first_k_dense_replace=1
    )
    attention = MLAConfig(num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    config = ModelConfig(
        model_type="deepseek_v3", vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        attention=attention, moe=moe, tie_word_embeddings=tied, num_nextn_predict_layers=1,
    )  # fmt: skip
    return random_model(config, 0)


def step(model: Model, chain, seed: int) -> float:
    text = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(seed))
    total = language_loss(model, TextBatch(text[:, :-1], text[:, 1:]), LossSettings()).total
    total.backward()
    for one in chain:
        one.step()
        one.zero_grad()
    return total.item()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_is_torchs_muon(shape):
    ours = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    theirs = copy.deepcopy(ours)
    mine = Muon([ours], lr=0.02, weight_decay=0.1, momentum=0.9)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        mine.step()
        reference.step()
        # bfloat16 products in another order: 8 bits, a few roundings deep
        moved, expected = ours.detach() - before, theirs.detach() - before
        torch.testing.assert_close(moved, expected, rtol=0, atol=0.04 * float(expected.abs().max()))


def test_a_stack_is_as_many_matrices():
    stack = torch.nn.Parameter(torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(0)))
    parts = [torch.nn.Parameter(part.clone()) for part in stack.detach()]
    together, apart = Muon([stack], lr=0.02), Muon(parts, lr=0.02)
    stack.grad = (
        torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1.0, 1e-3, 30.0])[:, None, None]
    )
    for part, grad in zip(parts, stack.grad, strict=True):
        part.grad = grad.clone()
    together.step()
    apart.step()
    torch.testing.assert_close(stack, torch.stack(list(parts)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 12, 30), (30, 12)])
def test_newton_schulz_has_the_singular_vectors_of_an_svd(shape):
    """In float64: the same vectors exactly, and values as the polynomial maps them, around 1."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    ours = orthogonalise(matrix)
    torch.testing.assert_close(ours, u @ (s[..., None] * vh), rtol=0, atol=1e-12)
    polar = u @ vh
    assert float((ours * polar).sum() / (ours.norm() * polar.norm())) > 0.97
    assert float(s.min()) > 0.6 and float(s.max()) < 1.25


def test_muon_moves_as_far_as_adamw_does():
    """RMS of the update about 0.2 · lr, whatever the shape (arXiv 2502.16982 §2.2)."""
    for shape in [(64, 256), (256, 64), (4, 32, 96)]:
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=1.0, weight_decay=0.0).step()
        assert 0.15 < float(weight.detach().square().mean().sqrt()) < 0.25


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"\[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_every_parameter_has_one_optimiser_and_the_right_decay(optimiser, tied):
    model = make_model(tied=tied)
    names = {id(p): name for name, p in model.named_parameters()}
    chain = make_optimisers(model, OptimiserSettings(optimiser=optimiser, weight_decay=0.2))
    owner = [
        (names[id(p)], type(one).__name__, group["weight_decay"])
        for one in chain
        for group in one.param_groups
        for p in group["params"]
    ]
    assert sorted(name for name, _, _ in owner) == sorted(names.values())
    for name, kind, decay in owner:
        vector, table = name.endswith(("norm.weight", "layernorm.weight")), name.startswith(("lm_head", "model.embed"))
        assert kind == ("AdamW" if vector or table or optimiser == "adamw" else "Muon"), name
        assert decay == (0.0 if vector or "embed" in name else 0.2), name


def test_embedding_decays_on_request():
    model = make_model()
    (one,) = make_optimisers(model, OptimiserSettings(decay_embedding=True))
    assert any(p is model.model.embed_tokens.weight for p in one.param_groups[0]["params"])


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_resuming_is_equal_to_the_bit(optimiser, tmp_path):
    settings = OptimiserSettings(optimiser=optimiser, lr=1e-2)
    model = make_model()
    chain = make_optimisers(model, settings)
    for seed in range(3):
        step(model, chain, seed)
    torch.save({"model": model.state_dict(), "chain": [one.state_dict() for one in chain]}, tmp_path / "state")
    expected = [step(model, chain, seed) for seed in (3, 4)]
    resumed = make_model()
    chain = make_optimisers(resumed, settings)
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed.load_state_dict(state["model"])
    for one, saved in zip(chain, state["chain"], strict=True):
        one.load_state_dict(saved)
    assert [step(resumed, chain, seed) for seed in (3, 4)] == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("optimiser", "sgd"), ("lr", -1.0), ("lr", math.nan), ("beta2", 1.0), ("muon_steps", 0), ("weight_decay", -0.1)],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ConfigError, match=field):
        OptimiserSettings(**{field: value})
