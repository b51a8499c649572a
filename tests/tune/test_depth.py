"""Fewer layers: against transformers with the same ones taken out, and the choice against trying every one by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from shoal.config import GQAConfig, ModelConfig  # noqa: E402
from shoal.errors import ConfigError  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.formats.hf_save import save_folder  # noqa: E402
from shoal.model import as_checkpoint, load_model, random_model  # noqa: E402
from shoal.train.batches import IGNORE  # noqa: E402
from shoal.train.losses import TextBatch  # noqa: E402
from shoal.tune.depth import influence, keep_layers, least_loss, loss_of, most_influential  # noqa: E402

LAYERS, VOCABULARY = 5, 61


@pytest.fixture
def model():
    config = ModelConfig(
        model_type="llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8), initializer_range=0.25,
    )  # fmt: skip
    return random_model(config, 3)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    out = []
    for rows in (1, 2):
        tokens = torch.randint(VOCABULARY, (rows, 24), generator=generator)
        targets = tokens.roll(-1, 1)
        targets[:, :5] = targets[:, 15:18] = IGNORE
        documents = torch.zeros_like(tokens)
        documents[:, 11:] = 1
        documents[:, 21:] = -1
        targets[:, 20:] = IGNORE
        out.append(TextBatch(tokens, targets, documents))
    return out


def loss_by_hand(model, batches, kept):
    """Another model, made of these layers alone, run as every model is."""
    fewer = load_model(keep_layers(as_checkpoint(model), kept))
    logits = [fewer(one.tokens_BT, documents_BT=one.documents_BT).flatten(0, 1) for one in batches]
    targets = torch.cat([one.targets_BT.flatten() for one in batches])
    return F.cross_entropy(torch.cat(logits), targets, ignore_index=IGNORE).item()


@pytest.mark.parametrize(("family", "kept"), [("llama", [1]), ("v3", [0, 2]), ("v3", [1, 2]), ("v2", [0])])
def test_the_model_is_that_of_transformers_with_the_layers_taken_out(hf_folder, tmp_path, family, kept):
    theirs, folder = hf_folder(family)
    save_folder(keep_layers(open_checkpoint(folder), kept), tmp_path / "fewer")
    theirs.model.layers = nn.ModuleList([theirs.model.layers[layer] for layer in kept])
    theirs.config.num_hidden_layers = len(kept)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = load_model(open_checkpoint(tmp_path / "fewer"))(tokens)
        torch.testing.assert_close(ours, theirs(tokens, use_cache=False).logits, rtol=1e-3, atol=1e-4)


def test_a_layer_that_does_nothing_goes_first(model, batches):
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
        for one in batches:  # what the model itself would write: every other layer is missed
            likeliest_BT = model(one.tokens_BT, documents_BT=one.documents_BT).argmax(-1)
            one.targets_BT.copy_(torch.where(one.targets_BT == IGNORE, IGNORE, likeliest_BT))
    told = []
    assert least_loss(model, batches, 4, lambda *one: told.append(one)) == [0, 1, 3, 4]
    whole = loss_by_hand(model, batches, range(LAYERS))
    assert told == [(2, pytest.approx(whole, rel=1e-5))]
    found = influence(model, batches)
    assert abs(found[2]) < 1e-6 < min(value for layer, value in enumerate(found) if layer != 2)
    assert most_influential(found, 4) == [0, 1, 3, 4]


def test_each_time_the_layer_goes_that_the_loss_misses_least(model, batches):
    kept, told = list(range(LAYERS)), []
    found = least_loss(model, batches, 2, lambda *one: told.append(one))
    for layer, nats in told:
        tried = {one: loss_by_hand(model, batches, [k for k in kept if k != one]) for one in kept}
        assert layer == min(tried, key=tried.__getitem__)
        assert nats == pytest.approx(tried[layer], rel=1e-5)
        kept.remove(layer)
    assert found == kept and len(told) == 3
    assert loss_of(model, batches, kept) == pytest.approx(told[-1][1], rel=1e-6)


def test_influence_counts_real_tokens_only(model, batches):
    before = influence(model, batches)
    for one in batches:
        one.tokens_BT[one.documents_BT < 0] = 7
    assert influence(model, batches) == before
    total, count = 0.0, 0
    for one in batches:
        seen = []
        hooks = [
            layer.register_forward_hook(lambda _, given, out, seen=seen: seen.append((given[0], out[0])))
            for layer in model.model.layers
        ]
        model(one.tokens_BT, documents_BT=one.documents_BT)
        for hook in hooks:
            hook.remove()
        for b, t in (one.documents_BT >= 0).nonzero().tolist():
            x, y = (states[b, t].detach().double() for states in seen[3])
            total += 1 - float(x @ y / (x.norm() * y.norm()))
            count += 1
    assert before[3] == pytest.approx(total / count, rel=1e-4)


def test_layers_that_are_not_there_are_refused(model, batches):
    checkpoint = as_checkpoint(model)
    for kept in ([], [1, 0], [0, 0], [-1, 2], [0, LAYERS]):
        with pytest.raises(ConfigError, match="layers"):
            keep_layers(checkpoint, kept)
    for keep in (0, LAYERS + 1):
        with pytest.raises(ConfigError, match="layers"):
            least_loss(model, batches, keep)
