"""Tuning runs from start to PEFT folder: the loss against transformers', resuming to the bit, the best weights kept."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.tune.conftest import TALKS  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from shoal.cli.tune import changed  # noqa: E402
from shoal.errors import ConfigError, FileError  # noqa: E402
from shoal.formats.adapter import load_adapter, merge  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.formats.safetensors import SafetensorsFile  # noqa: E402
from shoal.model import load_model  # noqa: E402
from shoal.train.log import read_log  # noqa: E402
from shoal.train.recipe import SampleSettings  # noqa: E402
from shoal.tune.recipe import TuneSettings  # noqa: E402
from shoal.tune.sft import Data, TuneRun, default_recipe, hold_out, settle, tune  # noqa: E402


class Quiet:
    def note(self, text):
        pass

    def step(self, record, until):
        pass


TRAINING = ("batch", "validation", "checkpoint", "samples", "precision", "activation_checkpointing", "compile")


def recipe_for(folder, data, steps=6, **settings):
    changes = {name: settings.pop(name) for name in list(settings) if name in TRAINING}
    checkpoint = open_checkpoint(folder)
    settings["validation"] = settings.pop("validation_file", None)
    tuning = TuneSettings(model=str(folder), data=str(data), **{"budget": "0.2%", "probe_rows": 2, **settings})
    recipe = replace(default_recipe(checkpoint, tuning), precision="fp32", sequence_length=64, batch=2, micro_batch=1)
    recipe = replace(recipe, **changes)
    found = Data(recipe, checkpoint)
    return settle(recipe, found, steps=steps, epochs=1), found


def run(folder, data, out, steps=6, until=None, **settings):
    recipe, found = recipe_for(folder, data, steps, **settings)
    return tune(recipe, out, found, Quiet(), until=until)


def tensors(path):
    file = SafetensorsFile(path)
    return {name: np.array(file.view(name)) for name in file.entries}


def test_the_loss_is_what_transformers_gives_each_conversation_alone(small_llama, lines, tmp_path, smollm):
    data = lines(*TALKS)
    recipe, found = recipe_for(small_llama, data, steps=1, batch=2, held_out=0.0, method="lora")
    recipe = replace(recipe, batch=len(found.rows), micro_batch=len(found.rows))
    outcome = tune(recipe, tmp_path / "run", found, Quiet())
    theirs = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
    tokenizer, chat = smollm
    total = count = 0.0
    for talk in TALKS:
        prompt = chat.encode(tokenizer, talk["messages"][:1])
        whole = [*prompt, *tokenizer.encode(talk["messages"][1]["content"]), tokenizer.token_id("<|im_end|>")]
        labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
        with torch.no_grad():
            mean = theirs(torch.tensor([whole]), labels=labels).loss.item()
        total, count = total + mean * (len(whole) - len(prompt)), count + len(whole) - len(prompt)
    assert outcome.record["loss"] == pytest.approx(total / count, rel=1e-4)


def test_tuning_learns_and_peft_loads_the_result(small_llama, lines, tmp_path):
    data = lines(*TALKS)
    outcome = run(small_llama, data, tmp_path / "run", steps=30, base="int8", batch=4)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [record["step"] for record in log] == list(range(1, 31))
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert "val_loss" in log[-1]
    assert outcome.model == tmp_path / "run" / "adapter"
    theirs = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(theirs, outcome.model).eval()
    ours = load_model(merge(open_checkpoint(small_llama), load_adapter(outcome.model)))
    tokens = torch.arange(40)[None] * 7
    with torch.no_grad():
        expected, found = adapted(tokens).logits, ours(tokens)
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()
    placed = json.loads((tmp_path / "run" / "placement.json").read_text())
    trained = sum(kind["parameters"] for kind in placed["kinds"])
    assert 0.8 * placed["budget"] < trained <= placed["budget"]


@pytest.mark.parametrize("method", ["adapters", "full"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(small_llama, lines, tmp_path, method):
    data = lines(*TALKS)
    settings = {"method": method}
    outcome = run(small_llama, data, tmp_path / "whole", **settings)
    first = run(small_llama, data, tmp_path / "parts", until=4, **settings)
    assert (first.step, outcome.step) == (4, 6)
    second = run(small_llama, data, tmp_path / "parts", **settings)
    name = "adapter_model.safetensors" if method == "adapters" else "model.safetensors"
    whole, parts = tensors(outcome.model / name), tensors(second.model / name)
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[key], parts[key]) for key in whole)
    losses = [[r["loss"] for r in read_log(tmp_path / where / "log.jsonl")] for where in ("whole", "parts")]
    assert losses[0] == losses[1]
    if method == "adapters":  # the base is not copied into checkpoints
        (saved,) = (tmp_path / "whole" / "checkpoints").glob("*6/model.safetensors")
        assert saved.stat().st_size < 0.4 * (small_llama / "model.safetensors").stat().st_size
    with pytest.raises(ConfigError, match=r"tune\.scale"):
        run(small_llama, data, tmp_path / "parts", steps=8, scale=3.0, method=method)


@pytest.mark.parametrize("method", ["adapters", "lora"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_as_it_did(small_llama, lines, tmp_path, method):
    recipe, found = recipe_for(small_llama, lines(*TALKS), steps=3, method=method)
    tune(recipe, tmp_path / "whole", found, Quiet())
    (tmp_path / "parts").mkdir()
    killed = TuneRun(recipe, tmp_path / "parts", found, Quiet())
    killed.run_step()
    killed.close()
    assert (tmp_path / "parts" / "placement.json").exists() and not (tmp_path / "parts" / "checkpoints").exists()
    torch.rand(7)  # another process has drawn other random numbers
    again = TuneRun(recipe, tmp_path / "parts", found, Quiet())
    again.go(3)
    again.close()
    losses = [[r["loss"] for r in read_log(tmp_path / where / "log.jsonl")] for where in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["adapters", "full"])
def test_samples_in_between_whatever_the_weights_are_held_in(small_llama, lines, tmp_path, method):
    samples = SampleSettings(prompts=("say",), every=2, max_tokens=3)
    outcome = run(small_llama, lines(*TALKS), tmp_path / "run", 2, samples=samples, precision="bf16", method=method)
    (sample,) = outcome.record["samples"]
    assert sample["prompt"] == "say" and isinstance(sample["text"], str)


def test_activations_are_recomputed_if_asked_and_compiling_is_refused(small_llama, lines, tmp_path):
    data = lines(*TALKS)
    recipe, found = recipe_for(small_llama, data, steps=2, activation_checkpointing=True)
    (tmp_path / "again").mkdir()
    again = TuneRun(recipe, tmp_path / "again", found, Quiet())
    calls, layer = [], again.model.model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    record = again.run_step()
    again.close()
    assert len(calls) == 2 * recipe.batch // recipe.micro_batch  # forward, and once more in the backward pass
    assert record["loss"] == run(small_llama, data, tmp_path / "plain", steps=1).record["loss"]
    with pytest.raises(ConfigError, match="compile: is for training from text"):
        replace(recipe, compile=True)


def test_patience_ends_a_run_that_keeps_no_best_weights_too(small_llama, lines, tmp_path):
    from shoal.train.recipe import ValidationSettings

    data, other = lines(*TALKS), lines({"prompt": "say", "completion": "nothing"}, name="other.jsonl")
    validation = ValidationSettings(every=2)
    outcome = tune_with_validation(small_llama, data, other, tmp_path / "run", validation, keep_best=False)
    assert outcome.step < 60
    (saved,) = (tmp_path / "run" / "checkpoints").glob(f"*{outcome.step}")
    assert not (saved / "best.safetensors").exists()
    again = tune_with_validation(small_llama, data, other, tmp_path / "run", validation, keep_best=False)
    assert (again.step, again.record) == (outcome.step, None)


def test_the_best_weights_are_kept_and_patience_ends_the_run(small_llama, lines, tmp_path):
    from shoal.train.recipe import ValidationSettings

    data, other = lines(*TALKS), lines({"prompt": "say", "completion": "nothing"}, name="other.jsonl")
    outcome = tune_with_validation(small_llama, data, other, tmp_path / "run", ValidationSettings(every=2))
    log = read_log(tmp_path / "run" / "log.jsonl")
    seen = [record["val_loss"] for record in log if "val_loss" in record]
    assert outcome.step < 60
    assert len(seen) - 1 - int(np.argmin(seen)) == 3
    assert outcome.record["best_loss"] == min(seen)
    best_at = 2 * (int(np.argmin(seen)) + 1)
    again = tune_with_validation(
        small_llama, data, other, tmp_path / "best", ValidationSettings(every=2), until=best_at
    )
    name = "adapter_model.safetensors"
    assert again.step == best_at
    best = tensors(outcome.model / name)
    (saved,) = (tmp_path / "best" / "checkpoints").glob(f"*{best_at}/best.safetensors")
    kept = tensors(saved)
    key = next(name for name in best if name.endswith("q_proj.lora_B.weight"))
    ours = key.removeprefix("base_model.model.").removesuffix("lora_B.weight") + "factors.b"
    assert np.array_equal(best[key], kept[ours])


def tune_with_validation(folder, data, other, out, validation, until=None, **settings):
    checkpoint = open_checkpoint(folder)
    tuning = TuneSettings(
        model=str(folder), data=str(data), validation=str(other), budget="0.2%", probe_rows=2, patience=3, scale=16.0,
        **settings,
    )  # fmt: skip
    recipe = default_recipe(checkpoint, tuning)
    recipe = replace(recipe, precision="fp32", sequence_length=64, batch=4, micro_batch=4, validation=validation)
    recipe = replace(recipe, optimiser=replace(recipe.optimiser, lr=0.02))
    found = Data(recipe, checkpoint)
    return tune(settle(recipe, found, steps=60, epochs=1), out, found, Quiet(), until=until)


@pytest.mark.parametrize("base", ["keep", "int4"])
def test_experts_are_chosen_and_the_router_stays(hf_folder, lines, tmp_path, smollm, base):
    from tests.tune.conftest import V3

    from shoal.formats.hf_save import save_folder
    from shoal.model import as_checkpoint, random_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = open_checkpoint(hf_folder("v3")[1])
    assert V3["n_routed_experts"] == 8
    tokenizer, chat = smollm
    config = replace(small.config, vocab_size=49152, eos_token_id=tuple(tokenizer.eos_token_ids), initializer_range=0.1)
    folder = tmp_path / "moe"
    save_folder(as_checkpoint(random_model(config, 1)), folder)
    tokenizer.save(folder)
    chat.save(folder)
    outcome = run(folder, lines(*TALKS), tmp_path / "run", steps=4, budget="1%", base=base)
    ranks = json.loads((tmp_path / "run" / "placement.json").read_text())["ranks"]
    experts = {target: each for target, each in ranks.items() if ".experts." in target}
    assert experts and all(0 in each for each in experts.values())
    assert not any("gate.weight" in target or target.endswith(".gate") for target in ranks)
    assert {"max_vio", "balance"} <= outcome.record.keys()
    base, tuned = load_model(open_checkpoint(folder)), merge(open_checkpoint(folder), load_adapter(outcome.model))
    changed = [
        name for name, value in base.state_dict().items()
        if not np.array_equal(value.numpy(), np.asarray(tuned.tensors[name].read()))
    ]  # fmt: skip
    assert changed and not any(".gate." in name or "norm" in name or "embed" in name for name in changed)


def test_the_method_decides_the_learning_rate_wherever_it_was_chosen(small_llama):
    checkpoint = open_checkpoint(small_llama)
    settings, make = TuneSettings(model=str(small_llama), data="x"), partial(default_recipe, checkpoint)
    assert changed(make, settings, ["batch=4"]).optimiser.lr == 1e-3
    full = changed(make, settings, ["batch=4", "tune.method=full"])
    assert (full.tune.method, full.optimiser.lr, full.batch) == ("full", 5e-5, 4)
    assert changed(make, settings, ["tune.method=full", "optimiser.lr=2e-5"]).optimiser.lr == 2e-5


def test_holding_out_is_by_seed_and_never_from_a_handful(lines):
    from shoal.tune.examples import read_examples

    examples = read_examples(lines(*TALKS))
    kept, held = hold_out(examples, 0.25, 0)
    assert (len(kept), len(held)) == (12, 4)
    assert sorted(e.line for e in [*kept, *held]) == list(range(1, 17))
    assert [e.line for e in hold_out(examples, 0.25, 1)[1]] != [e.line for e in held]
    assert hold_out(examples[:9], 0.25, 0) == (examples[:9], [])


def test_what_cannot_be_tuned_says_why(small_llama, lines, tmp_path, monkeypatch):
    data = lines(*TALKS)
    with pytest.raises(ConfigError, match=r"tune\.base: 'int8' cannot be trained in full"):
        recipe_for(small_llama, data, method="full", base="int8")
    with pytest.raises(ConfigError, match="budget: 10 parameters are too few"):
        run(small_llama, data, tmp_path / "run", budget="10")
    with pytest.raises(FileError, match="cannot be read"):
        recipe_for(small_llama, tmp_path / "absent.jsonl")
    long = lines({"prompt": "x " * 200, "completion": "y"}, name="long.jsonl")
    with pytest.raises(ConfigError, match="sequence_length: 64 leaves no answer"):
        recipe_for(small_llama, long)
    with pytest.raises(ConfigError, match=r"sequence_length: 64 leaves no answer in .*long\.jsonl"):
        recipe_for(small_llama, data, validation_file=str(long))
    recipe, found = recipe_for(small_llama, data)
    with pytest.raises(ConfigError, match=r"model: is not that of .*, whose settings tuning cannot change"):
        tune(replace(recipe, model=replace(recipe.model, rms_norm_eps=1e-3)), tmp_path / "run", found, Quiet())
    with monkeypatch.context() as little:
        little.setattr("shoal.train.process.available_bytes", lambda: 1_600_000)
        with pytest.raises(ConfigError, match=r"model: takes at least 0\.01 GB of memory to train"):
            run(small_llama, data, tmp_path / "run")
        assert run(small_llama, data, tmp_path / "small", steps=1, base="int4").step == 1
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    with pytest.raises(FileError, match=r"adapter: is here without a recipe\.json"):
        run(small_llama, data, tmp_path / "mine")
    assert math.isfinite(run(small_llama, data, tmp_path / "other", steps=1).record["loss"])
