"""Losses against torch's own over full logits, every written gradient in float64, and a batch learnt by heart."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from shoal.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig  # noqa: E402
from shoal.errors import ConfigError  # noqa: E402
from shoal.model import Model, Routing, random_model  # noqa: E402
from shoal.train import losses  # noqa: E402
from shoal.train.batches import IGNORE  # noqa: E402
from shoal.train.losses import LossSettings, TextBatch, language_loss, linear_cross_entropy  # noqa: E402
from shoal.train.optim import OptimiserSettings, make_optimisers  # noqa: E402

X, D, V = 37, 6, 23


def config(*, mtp: int = 1, tied: bool = False, vocab: int = 61) -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        attention=MLAConfig(
            num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        moe=MoEConfig(
            n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
            first_k_dense_replace=1,
        ),
        rope=RopeConfig(interleave=True), num_nextn_predict_layers=mtp, tie_word_embeddings=tied,
    )  # fmt: skip


def some_batch(rows: int = 3, length: int = 12, vocab: int = 61, *, packed: bool = False) -> TextBatch:
    text = torch.randint(vocab, (rows, length + 1), generator=torch.Generator().manual_seed(5))
    tokens, targets = text[:, :-1], text[:, 1:].clone()
    if not packed:
        return TextBatch(tokens, targets)
    documents = (torch.arange(length) >= 5).long() + (torch.arange(length) >= 6).long()
    documents = documents.expand(rows, length)
    targets[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORE
    return TextBatch(tokens, targets, documents)


@pytest.fixture
def head_case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(X, D, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (X,), generator=generator)
    targets[::5] = IGNORE
    weights = torch.rand(X, generator=generator, dtype=torch.float64)
    return hidden, head, targets, weights


def plain_cross_entropy(hidden, head, targets, weights, z_weight):
    logits = hidden @ head.T
    each = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    square = logits.logsumexp(-1).square() * (targets != IGNORE)
    return (weights * (each + z_weight * square)).sum(), each, square


@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_head_loss_and_gradients_equal_those_over_full_logits(head_case, z_weight, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 16 * V)  # chunks of 16, 16 and 5 tokens
    results = []
    for function in (linear_cross_entropy, plain_cross_entropy):
        total, each, square = function(*head_case, z_weight)
        gradients = torch.autograd.grad(3.0 * total, head_case[:2])
        results.append((total, each.detach(), square.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_head_gradients_against_differences(head_case):
    hidden, head, targets, weights = head_case
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, weights, 0.1)[0], (hidden, head))


def test_gradients_that_are_handed_over_as_they_are_stay_whole(head_case):
    """Without a factor no copy is made; whoever adds to them or differentiates again must not change them."""
    hidden, head, targets, weights = head_case
    total = linear_cross_entropy(hidden, head, targets, weights)[0]
    once = [gradient.clone() for gradient in torch.autograd.grad(total, (hidden, head), retain_graph=True)]
    for _ in range(3):
        total.backward(retain_graph=True)
    for tensor, gradient in zip((hidden, head), once, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * gradient, rtol=1e-12, atol=0)


def test_logits_are_never_whole(monkeypatch):
    """The largest tensor made is a chunk of logits or the head, not [X, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1 << 18)
    tokens, vocab = 400, 2048
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head = torch.randn(vocab, 4, requires_grad=True)
    with Watch():
        linear_cross_entropy(hidden, head, torch.zeros(tokens, dtype=torch.long), torch.ones(tokens))[0].backward()
    assert 0 < largest <= losses.CHUNK_LOGITS < tokens * vocab


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_language_loss_equals_its_definition(packed, tied):
    """Main, two MTP depths and z, from full logits and written out token by token; gradients of every parameter."""
    model = random_model(config(mtp=2, tied=tied), 1).double()
    batch = some_batch(packed=packed)
    settings = LossSettings(mtp_weight=0.4, balance_weight=0.0, z_weight=0.01)

    def by_definition() -> torch.Tensor:
        text = torch.cat((batch.tokens_BT, torch.full((3, 1), -1)), dim=1)
        text[:, -1] = batch.targets_BT[:, -1]
        documents = torch.zeros_like(batch.tokens_BT) if batch.documents_BT is None else batch.documents_BT
        documents = torch.cat((documents, documents[:, -1:]), dim=1)
        states = model.states(batch.tokens_BT, documents_BT=batch.documents_BT)
        ahead = model.predict_further_over_text(states.hidden_BTD, batch.tokens_BT, documents_BT=batch.documents_BT)
        count, total = 0, torch.zeros((), dtype=torch.float64)
        for depth, hidden in enumerate([states.hidden_BTD, *(more.hidden_BTD for more in ahead)]):
            logp = model.logits(hidden).log_softmax(-1)
            lse = model.logits(hidden).logsumexp(-1)
            for row in range(3):
                for i in range(hidden.shape[1]):
                    if documents[row, i] == documents[row, i + depth + 1]:
                        count += depth == 0
                        loss = -logp[row, i, text[row, i + depth + 1]] + 0.01 * lse[row, i] ** 2
                        total = total + (loss if depth == 0 else 0.4 / 2 * loss)
        return total / count

    ours, theirs = language_loss(model, batch, settings), by_definition()
    torch.testing.assert_close(ours.total, theirs, rtol=1e-10, atol=0)
    parameters = dict(model.named_parameters())
    for name, a, b in zip(
        parameters,
        torch.autograd.grad(ours.total, list(parameters.values())),
        torch.autograd.grad(theirs, list(parameters.values())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_of_several_batches_costs_what_one_batch_does():
    model = random_model(config(), 1).double()
    settings = LossSettings(balance_weight=0.1)
    whole = some_batch(rows=4, packed=True)
    whole.targets_BT[0, :7] = IGNORE  # unequal counts
    count = int((whole.targets_BT != IGNORE).sum())
    parts = [TextBatch(*(part[rows] for part in whole)) for rows in (slice(0, 1), slice(1, 4))]
    total = sum(language_loss(model, part, settings, num_targets=count, num_rows=4).total for part in parts)
    torch.testing.assert_close(total, language_loss(model, whole, settings).total, rtol=1e-12, atol=0)


def test_a_batch_without_targets_costs_nothing_and_is_finite():
    batch = some_batch()
    batch.targets_BT.fill_(IGNORE)
    result = language_loss(random_model(config(), 1), batch, LossSettings(balance_weight=0.0))
    result.total.backward()
    assert result.total.item() == 0.0


def test_balance_loss_follows_the_paper_and_has_the_gradient_of_the_scores():
    moe = config().moe
    scores = torch.rand(10, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    indices = scores.topk(2, dim=-1).indices
    routing = Routing(scores.gather(1, indices), indices, scores)
    expected = 0.0
    for row in range(2):  # two rows of five tokens
        of_row = range(row * 5, row * 5 + 5)
        for expert in range(8):
            picked = sum(expert in indices[t].tolist() for t in of_row)
            mean = sum((scores[t, expert] / scores[t].sum()).item() for t in of_row) / 5
            expected += 8 / (2 * 5) * picked * mean / 2
    assert losses.balance_loss(routing, moe, 2).item() == pytest.approx(expected, rel=1e-12)

    def of_scores(values):  # the picks stay: they have no gradient
        return losses.balance_loss(routing._replace(scores_TE=values), moe, 2)

    assert torch.autograd.gradcheck(of_scores, (scores,))


def test_balance_loss_is_one_when_even_and_in_the_total():
    moe = config().moe
    tokens = torch.arange(8)
    even = Routing(torch.ones(8, 2), torch.stack((tokens, (tokens + 1) % 8), 1), torch.full((8, 8), 0.5))
    assert float(losses.balance_loss(even, moe, 2)) == pytest.approx(1.0)
    model, batch = random_model(config(), 1), some_batch()
    without = language_loss(model, batch, LossSettings(balance_weight=0.0))
    result = language_loss(model, batch, LossSettings(balance_weight=0.5))
    assert set(result.routings) == {1, 2}, "the MTP layer's routing too"
    assert set(result.parts) == {"next", "mtp", "balance"}
    assert float(result.total - without.total) == pytest.approx(0.5 * float(result.parts["balance"]), rel=1e-4)


def test_padding_has_no_part_in_the_balance_and_is_not_counted():
    """Rows of tuning data are filled up; each is balanced as it would be alone and whole."""
    model, batch = random_model(config(mtp=0), 1), some_batch(rows=2)
    documents = torch.zeros_like(batch.tokens_BT)
    lengths = (7, 12)
    for row, length in enumerate(lengths):
        documents[row, length:] = -1
    result = language_loss(model, batch._replace(documents_BT=documents), LossSettings())
    alone = [
        language_loss(
            model, TextBatch(batch.tokens_BT[[row], :length], batch.targets_BT[[row], :length]), LossSettings()
        )
        for row, length in enumerate(lengths)
    ]
    balances = [float(one.parts["balance"]) for one in alone]
    assert abs(balances[0] - balances[1]) > 1e-3
    assert float(result.parts["balance"]) == pytest.approx(sum(balances) / 2, rel=1e-5)
    for layer, routing in result.routings.items():
        assert torch.equal(routing.indices_TK, torch.cat([one.routings[layer].indices_TK for one in alone]))


def test_bfloat16_costs_about_what_float32_does():
    model, batch = random_model(config(), 1), some_batch(rows=4, length=32)
    plain = language_loss(model, batch, LossSettings())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = language_loss(model, batch, LossSettings())
    low.total.backward()
    assert low.total.dtype == torch.float32
    assert float(low.total) == pytest.approx(float(plain.total), rel=2e-3)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("low", [False, True])
def test_a_tiny_model_learns_a_batch_by_heart(optimiser, low):
    model, batch = random_model(config(), 1), some_batch(packed=True)
    chain = make_optimisers(model, OptimiserSettings(optimiser=optimiser, lr=1e-2, weight_decay=0.0))
    for _ in range(100):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            result = language_loss(model, batch, LossSettings())
        result.total.backward()
        for one in chain:
            one.step()
            one.zero_grad()
    assert float(result.parts["next"]) < 0.1
    assert float(result.parts["mtp"]) < 0.1


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="mtp_weight"):
        LossSettings(mtp_weight=-1.0)
    with pytest.raises(ConfigError, match="mtp_from"):
        LossSettings(mtp_from=1.5)
    assert dataclasses.asdict(LossSettings())["mtp_weight"] == 0.3


def test_model_without_mtp_or_experts_has_one_part():
    model = random_model(dataclasses.replace(config(mtp=0), moe=None), 1)
    assert isinstance(model, Model)
    assert set(language_loss(model, some_batch(), LossSettings()).parts) == {"next"}
