"""A reshaped model against the one it was made from, in PyTorch, in the engine and in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.engine.conftest import TinyTokenizer, open_tiny, some_tokens, tiny  # noqa: E402

from shoal.errors import ConfigError, FileError  # noqa: E402
from shoal.formats.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from shoal.formats.hf_save import save_folder  # noqa: E402
from shoal.model import load_model  # noqa: E402
from shoal.tune.reshape import ExpertShape, HealSettings, Shape, fit, heal, measure, reshape, with_experts  # noqa: E402

ROPE = {"rope_theta": 500.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "heads of their own": {"model_type": "llama", "num_key_value_heads": 6, "tie_word_embeddings": True},
    "biases": {"model_type": "llama", "attention_bias": True},
    "qwen2": {"model_type": "qwen2", "hidden_size": 48},
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 3.0, **ROPE}},
    "llama3": {"model_type": "llama", "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, **ROPE}},
    "yarn": {"model_type": "llama", "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **ROPE}},
}  # fmt: skip
T = 120


def logits(checkpoint: Checkpoint, tokens: list[int]) -> Any:
    with torch.no_grad():
        return load_model(checkpoint)(torch.tensor([tokens]))[0].numpy()


def from_folder(folder: Path) -> Any:
    import transformers

    options = {"dtype": torch.float32, "experts_implementation": "eager"}  # grouped products want rows of 16 bytes
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def no_tokenizer() -> Any:
    raise FileError("tiny", "was made without a tokenizer")


def apart(ours: Any, theirs: Any) -> float:
    """Root mean square of the difference, beside that of the logits."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


@pytest.mark.parametrize("name", CASES)
def test_nothing_left_out_changes_nothing(name: str, tmp_path: Path) -> None:
    hf, _ = tiny(CASES[name])
    hf.save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    tokens = some_tokens(T)
    with torch.no_grad():
        before = hf(torch.tensor([tokens])).logits[0].numpy()
    full = reshape(source, Shape.full(source.config))
    assert full.config.model_type == "deepseek_v3"
    assert apart(logits(full, tokens), before) < 2e-5
    save_folder(full, tmp_path / "out", dtype="float32")
    theirs = from_folder(tmp_path / "out")
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    with torch.no_grad():
        assert apart(theirs(torch.tensor([tokens])).logits[0].numpy(), before) < 2e-5
    opened = replace(open_checkpoint(tmp_path / "out"), load_tokenizer=TinyTokenizer)
    assert apart(open_tiny(opened).logits(tokens), before) < 2e-5


def test_slow_frequencies_do_without_rotation(tmp_path: Path) -> None:
    """Pairs that hardly turn within the text belong into the latent, where only the mixture of K and V is left."""
    _, source = tiny({"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 1e6, **ROPE}})
    tokens = some_tokens(T)
    gqa = source.config.attention
    most = 2 * gqa.num_key_value_heads * gqa.head_dim
    before = logits(source, tokens)
    partial = reshape(source, Shape(latent=most, rope=2))
    assert apart(logits(partial, tokens), before) < 1e-3
    assert apart(logits(reshape(source, Shape(latent=most // 4 * 2, rope=2)), tokens), before) > 1e-2


@pytest.mark.parametrize("shape", [
    ExpertShape(how="split", experts=6, active=6, shared=1), ExpertShape(how="split", experts=5, active=5),
    ExpertShape(how="copy", experts=4, active=2), ExpertShape(how="copy", experts=4, active=2, first_k_dense_replace=1),
], ids=str)  # fmt: skip
def test_experts_that_all_work_or_are_all_alike_change_nothing(shape: ExpertShape, tmp_path: Path) -> None:
    _, source = tiny({"model_type": "llama"})
    tokens = some_tokens(T)
    before = logits(source, tokens)
    made = with_experts(reshape(source, Shape.full(source.config)), load_model(source), shape, [some_tokens(32, 2)])
    assert apart(logits(made, tokens), before) < 2e-5
    save_folder(replace(made, load_tokenizer=no_tokenizer), tmp_path / "out", dtype="float32")
    theirs = from_folder(tmp_path / "out")
    assert theirs.config.n_routed_experts == shape.experts
    with torch.no_grad():
        assert apart(theirs(torch.tensor([tokens])).logits[0].numpy(), before) < 2e-5
    assert apart(open_tiny(made).logits(tokens), before) < 2e-5


def test_the_router_finds_the_experts_that_matter() -> None:
    """Half of the experts, chosen by the router, lose less than half of them chosen blindly."""
    _, source = tiny({"model_type": "llama"})
    tokens = some_tokens(T)
    before = logits(source, tokens)
    dense, model = reshape(source, Shape.full(source.config)), load_model(source)
    seen = [some_tokens(64, seed) for seed in range(2, 18)]
    made = with_experts(dense, model, ExpertShape(how="split", experts=10, active=5), seen)
    lost = apart(logits(made, tokens), before)
    blind = load_model(made)
    for layer in blind.model.layers:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.e_score_correction_bias.zero_()
    with torch.no_grad():
        assert lost < 0.8 * apart(blind(torch.tensor([tokens]))[0].numpy(), before)


def test_calibration_and_a_fit_each_bring_the_small_model_closer() -> None:
    _, source = tiny({"model_type": "llama"})
    model = load_model(source)
    tokens, seen = some_tokens(T), [some_tokens(T, seed) for seed in range(2, 26)]
    before, shape = logits(source, tokens), Shape(latent=28, rope=12)
    blind = reshape(source, shape)
    informed = reshape(source, shape, measure(model, seen))
    layers: list[Any] = []
    fitted = fit(load_model(source), informed, seen, epochs=6, lr=0.005, report=layers.append)
    lost = [apart(logits(one, tokens), before) for one in (blind, informed, fitted)]
    assert lost[2] < lost[1] < 0.5 * lost[0]
    assert [one.layer for one in layers] == [0, 1]
    assert all(one.after < 0.9 * one.before for one in layers)
    for name, tensor in fitted.tensors.items():
        if name.endswith("kv_a_layernorm.weight"):
            np.testing.assert_array_equal(tensor.read(), informed.tensors[name].read())


@pytest.mark.parametrize(("case", "shape", "field"), [
    ({"model_type": "qwen3"}, (22, 20), "qk_norm"),
    ({"model_type": "llama", "mlp_bias": True}, (22, 20), "mlp_bias"),
    ({"model_type": "deepseek_v3"}, (22, 20), "model_type"),
    ({"model_type": "llama"}, (22, 22), "rope"), ({"model_type": "llama"}, (22, 7), "rope"),
    ({"model_type": "llama"}, (21, 20), "latent"), ({"model_type": "llama"}, (40, 20), "latent"),
])  # fmt: skip
def test_what_cannot_be_reshaped_is_refused_by_name(case: dict[str, Any], shape: tuple[int, int], field: str) -> None:
    _, source = tiny(case)
    with pytest.raises(ConfigError) as refused:
        reshape(source, Shape(latent=shape[0], rope=shape[1]))
    assert refused.value.field == field


@pytest.mark.parametrize(("shape", "field"), [
    (ExpertShape(how="melt", experts=4, active=2), "moe"), (ExpertShape(how="split", experts=4, active=2), "experts"),
    (ExpertShape(how="copy", experts=4, active=2, shared=1), "shared"),
    (ExpertShape(how="split", experts=5, active=6), "num_experts_per_tok"),
    (ExpertShape(how="copy", experts=5, active=1, first_k_dense_replace=2), "first_k_dense_replace"),
], ids=str)  # fmt: skip
def test_experts_that_do_not_fit_are_refused_by_name(shape: ExpertShape, field: str) -> None:
    _, source = tiny({"model_type": "llama"})
    with pytest.raises(ConfigError) as refused:
        shape.config(source.config)
    assert refused.value.field == field


def test_norms_leave_the_latent_alone_in_bfloat16_too(tmp_path: Path) -> None:
    """The constants are numbers that bfloat16 holds, so rounding costs no more than it does the source."""
    _, source = tiny({"model_type": "qwen2", "hidden_size": 48})
    tokens = some_tokens(T)
    before = logits(source, tokens)
    costs = []
    for one in (source, reshape(source, Shape.full(source.config))):
        save_folder(replace(one, load_tokenizer=no_tokenizer), tmp_path / one.config.model_type, dtype="bfloat16")
        costs.append(apart(logits(open_checkpoint(tmp_path / one.config.model_type), tokens), before))
    assert costs[1] < 1.5 * costs[0]


def test_healing_learns_and_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    _, source = tiny({"model_type": "llama"})
    seen = [some_tokens(48, seed) for seed in range(2, 10)]
    teacher = load_model(source)
    small = reshape(source, Shape(latent=22, rope=8), measure(teacher, seen))
    settings = HealSettings(steps=12, lr=0.01, save_every=5)
    steps: list[Any] = []
    healed = heal(teacher, small, seen, settings, report=steps.append)
    assert [one.step for one in steps] == list(range(1, 13))
    assert sum(one.kl for one in steps[-4:]) < 0.8 * sum(one.kl for one in steps[:4])

    class KilledError(Exception):
        pass

    def kill(step: Any) -> None:
        if step.step == 8:
            raise KilledError

    with pytest.raises(KilledError):
        heal(teacher, small, seen, settings, state=tmp_path, report=kill)
    rest: list[Any] = []
    resumed = heal(teacher, small, seen, settings, state=tmp_path, report=rest.append)
    assert rest == steps[5:]
    for name, tensor in healed.tensors.items():
        np.testing.assert_array_equal(resumed.tensors[name].read(), tensor.read())
    with pytest.raises(FileError, match="other settings"):
        heal(teacher, small, seen, replace(settings, lr=0.02), state=tmp_path)
    with pytest.raises(FileError, match="other text"):
        heal(teacher, small, seen[::-1], settings, state=tmp_path)
