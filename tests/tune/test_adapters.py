"""Adapters against Hugging Face PEFT in both directions, merged and not, and against plain algebra."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from shoal.errors import ConfigError, FileError  # noqa: E402
from shoal.formats.adapter import check_adapter, load_adapter, merge, save_adapter  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.formats.hf_folder import save_folder  # noqa: E402
from shoal.model import load_model  # noqa: E402
from shoal.tune.adapters import (  # noqa: E402
    as_adapter,
    attach,
    attach_adapter,
    count,
    detach,
    factors_of,
    targets,
)

FAMILIES = ("v3", "v2", "llama", "qwen2", "qwen3")
TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(5))


def uneven_ranks(model):
    """Ranks 1 to 3, experts 0 to 2, some targets left out."""
    out = {}
    for number, (target, (experts, _, _)) in enumerate(targets(model).items()):
        if experts > 1:
            out[target] = tuple((e + number) % 3 for e in range(experts))
        elif number % 5 != 4:
            out[target] = (1 + number % 3,)
    return out


def disturb(factors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in factors.values():
            one.a.copy_(torch.randn(one.a.shape, generator=generator) / one.a.shape[1] ** 0.5)
            one.b.copy_(torch.randn(one.b.shape, generator=generator) * 0.5)


def close(found, expected, tolerance=2e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def plain_logits(model):
    with torch.no_grad():
        return model(TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_save_with_the_same_logits(hf_folder, tmp_path, family):
    theirs, folder = hf_folder(family)
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    before = plain_logits(model)
    ranks = uneven_ranks(model)
    factors = attach(model, ranks, scale=0.7)
    assert torch.equal(plain_logits(model), before) or (plain_logits(model) - before).abs().max() < 1e-5
    disturb(factors)
    ours = plain_logits(model)
    assert (ours - before).abs().max() > 0.05 * before.abs().max()
    save_adapter(as_adapter(factors, base=str(folder)), model.config, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        close(adapted(TOKENS).logits, ours)
    trained = sum(f.a.numel() + f.b.numel() for f in factors.values())
    assert trained == count({t: r for t, r in ranks.items() if any(r)}, targets_of(checkpoint))
    # merged on disk, read by transformers
    save_folder(merge(checkpoint, load_adapter(tmp_path / "adapter")), tmp_path / "merged")
    close(plain_logits(load_model(open_checkpoint(tmp_path / "merged"))), ours)
    # taken off, the model is what it was
    detach(model)
    close(plain_logits(model), before)
    assert factors_of(model) == {}
    # and loaded again, it goes on
    again = attach_adapter(load_model(checkpoint), load_adapter(tmp_path / "adapter"))
    assert {t: f.ranks for t, f in again.items()} == {t: r for t, r in ranks.items() if any(r)}


def targets_of(checkpoint):
    return targets(load_model(checkpoint))


@pytest.mark.parametrize("stacks", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"], []])
def test_we_load_what_peft_saves(hf_folder, tmp_path, stacks):
    theirs, folder = hf_folder("v3")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_b_proj", "kv_b_proj", "o_proj"],
        target_parameters=["shared_experts.up_proj.weight", *(f"mlp.experts.{name}" for name in stacks)],
        rank_pattern={"o_proj": 2, r"layers.1.mlp.experts.down_proj": 1}, alpha_pattern={"o_proj": 9},
    )  # fmt: skip
    adapted = peft.get_peft_model(theirs, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        expected = adapted(TOKENS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(folder)
    adapter = load_adapter(tmp_path / "adapter")
    check_adapter(adapter, checkpoint.config)
    close(plain_logits(load_model(merge(checkpoint, adapter))), expected)
    model = load_model(checkpoint)
    attach_adapter(model, adapter)
    close(plain_logits(model), expected)
    with torch.no_grad():
        close(model(TOKENS, absorbed=True), expected, 1e-4)


def test_adapters_of_single_experts_from_before_transformers_5(hf_folder, tmp_path):
    _, folder = hf_folder("v3")
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    generator = np.random.default_rng(0)
    name = "model.layers.2.mlp.experts.5.up_proj"
    a, b = generator.normal(size=(2, 48)).astype(np.float32), generator.normal(size=(24, 2)).astype(np.float32)
    (tmp_path / "old").mkdir()
    from safetensors.numpy import save_file

    key = f"base_model.model.{name}.lora_"
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, tmp_path / "old" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    merged = load_model(merge(checkpoint, load_adapter(tmp_path / "old")))
    with torch.no_grad():
        model.model.layers[2].mlp.experts.up_proj.weight[5] += torch.from_numpy(2 * b @ a)
    close(plain_logits(merged), plain_logits(model))


def test_only_factors_learn_and_experts_without_rank_have_none(hf_folder):
    _, folder = hf_folder("v3")
    model = load_model(open_checkpoint(folder))
    factors = attach(model, {"model.layers.1.mlp.experts.down_proj": (0, 2, 0, 0, 1, 0, 0, 0)})
    model(TOKENS).logsumexp(-1).sum().backward()
    (one,) = factors.values()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "model.layers.1.mlp.experts.down_factors.a", "model.layers.1.mlp.experts.down_factors.b",
    ]  # fmt: skip
    assert one.a.shape == (3, 24)
    assert one.b.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type: is 'IA3'; only LORA"),
        ({"use_dora": True}, "use_dora: True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\] is not supported"),
        ({"lora_alpha": None}, "lora_alpha|alpha_pattern"),
        ({"rank_pattern": {"x[0-9]": 3}}, r"rank_pattern: the key 'x\[0-9\]' is a regular expression"),
        ({"r": 5, "rank_pattern": {}}, "has factors"),
        ({"rank_pattern": [3]}, "rank_pattern: must be an object"),
        ({"target_parameters": 3}, "target_parameters: must be a list"),
    ],
)
def test_an_adapter_that_does_something_else_is_refused(hf_folder, tmp_path, change, said):
    _, folder = hf_folder("llama")
    model = load_model(open_checkpoint(folder))
    factors = attach(model, {"model.layers.0.self_attn.q_proj": (2,)})
    save_adapter(as_adapter(factors), model.config, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = {**json.loads(path.read_text()), "alpha_pattern": {}, **change}
    path.write_text(json.dumps(config))
    with pytest.raises(FileError, match=said):
        load_adapter(tmp_path / "adapter")


def test_an_adapter_of_another_model_names_the_matrix(hf_folder, tmp_path):
    _, folder = hf_folder("v3")
    _, other = hf_folder("llama")
    model = load_model(open_checkpoint(folder))
    factors = attach(model, {"model.layers.0.self_attn.q_b_proj": (2,)})
    save_adapter(as_adapter(factors), model.config, tmp_path / "adapter")
    with pytest.raises(FileError, match=re.escape("model.layers.0.self_attn.q_b_proj: is no matrix of this model")):
        merge(open_checkpoint(other), load_adapter(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match="no matrix of this model"):
        attach(load_model(open_checkpoint(other)), {"model.layers.0.self_attn.q_b_proj": (2,)})
