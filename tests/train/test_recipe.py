"""Recipes: checked when they are made, changed by dotted keys, found by name or path."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.errors import ConfigError, FileError, UnknownModelError
from shoal.train import recipe as settings
from shoal.train.find import find_recipe, recipe_names
from shoal.train.overrides import override
from shoal.train.recipe import flatten
from shoal.train.schedule import lr_factor

MINIMAL = """
from shoal.config import GQAConfig, ModelConfig
from shoal.train.recipe import Recipe

def recipe():
    gqa = GQAConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    model = ModelConfig(model_type="llama", vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                        attention=gqa)
    return Recipe(model=model, steps=200)
"""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"steps": 0}, "steps: must be a whole number from 1"),
        ({"steps": True}, "steps: must be a whole number"),
        ({"steps": 2.0}, r"steps: must be a whole number .* got 2\.0"),
        ({"sequence_length": 65}, "sequence_length: must be a whole number from 2 to 64, got 65"),
        ({"micro_batch": 3}, "micro_batch: 3 does not divide the batch of 4"),
        ({"precision": "fp8"}, "precision: 'fp8' is not one of bf16, fp32"),
        ({"clip": float("nan")}, "clip: must be a number"),
        ({"compile": 1}, "compile: must be true or false"),
        ({"schedule": settings.ScheduleSettings(warmup=7)}, "warmup: 7 exceeds the 6 steps"),
        ({"sequence_length": 2, "steps": 6}, "sequence_length: 2 leaves the MTP layers nothing"),
        ({"parallel": settings.ParallelSettings(expert=3)}, r"parallel\.expert: 3 does not divide 4 experts"),
    ],
)
def test_an_impossible_recipe_names_field_and_value(recipe, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        replace(recipe, **changes)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: settings.DataSettings(held_out=1.0), r"data\.held_out: must be a number from 0 to 0\.9"),
        (lambda: settings.ScheduleSettings(kind="step"), r"schedule\.kind: 'step' is not one of wsd"),
        (lambda: settings.CheckpointSettings(keep=0), r"checkpoint\.keep: must be a whole number from 1"),
        (lambda: settings.SampleSettings(prompts=("",)), r"samples\.prompts: must be texts"),
        (lambda: settings.RouterSettings(bias_speed=-1), r"router\.bias_speed"),
        (lambda: settings.ParallelSettings(expert=0), r"parallel\.expert: must be a whole number from 1"),
        (lambda: settings.ParallelSettings(timeout=0.1), r"parallel\.timeout: must be a number from 1"),
        (lambda: settings.OptimiserSettings(lr=-1.0), r"optimiser\.lr: must lie between 0"),
        (lambda: settings.OptimiserSettings(beta2=1.0), r"optimiser\.beta2: must lie between 0"),
        (lambda: settings.OptimiserSettings(optimiser="sgd"), r"optimiser\.optimiser: 'sgd' is not one of"),
        (lambda: settings.LossSettings(z_weight=-1.0), r"losses\.z_weight: must lie between 0"),
        (lambda: settings.LossSettings(mtp_from=2.0), r"losses\.mtp_from: must lie between 0"),
    ],
)
def test_an_impossible_part_names_its_dotted_key(make, problem):
    with pytest.raises(ConfigError, match=problem):
        make()


@pytest.mark.parametrize(
    ("world", "changes", "problem"),
    [
        (3, {}, "batch: 4 is not shared evenly by 3 processes of micro_batch 2"),
        (4, {}, "batch: 4 is not shared evenly by 4 processes of micro_batch 2"),
        (3, {"batch": 6, "parallel": settings.ParallelSettings(expert=2)}, r"parallel\.expert: 2 does not divide 3"),
        (
            1,
            {"parallel": settings.ParallelSettings(expert=2)},
            r"parallel\.expert: 2 needs .* start them with torchrun",
        ),
    ],
)
def test_processes_that_cannot_share_a_run_are_refused(recipe, world, changes, problem):
    recipe.check_world(2)
    with pytest.raises(ConfigError, match=problem):
        replace(recipe, **changes).check_world(world)


def test_overrides_change_what_they_name_in_its_own_type(recipe):
    changed = override(
        recipe,
        [
            "steps=1_000", "optimiser.lr=3e-4", "compile=true", "model.moe.n_routed_experts=8", "data.folder=none",
            "batch=6", "micro_batch=3", 'samples.prompts=["a=b", "c"]', "model.eos_token_id=[1, 2]",
            "schedule.kind=cosine",
        ],
    )  # fmt: skip
    assert (changed.steps, changed.optimiser.lr, changed.compile) == (1000, 3e-4, True)
    assert changed.model.moe.n_routed_experts == 8
    assert changed.data.folder is None
    assert (changed.batch, changed.micro_batch) == (6, 3)
    assert changed.samples.prompts == ("a=b", "c")
    assert changed.model.eos_token_id == (1, 2)
    untouched = flatten(recipe).keys() - {
        "steps", "optimiser.lr", "compile", "model.moe.n_routed_experts", "data.folder", "batch", "micro_batch",
        "samples.prompts", "model.eos_token_id", "schedule.kind",
    }  # fmt: skip
    assert {key: flatten(changed)[key] for key in untouched} == {key: flatten(recipe)[key] for key in untouched}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optimiser.lrr=1", r"optimiser\.lrr: is no setting of this recipe; did you mean optimiser\.lr\?"),
        ("n_routed_experts=4", r"did you mean model\.moe\.n_routed_experts\?"),
        ("zzz=1", "zzz: is no setting of this recipe$"),
        ("steps", "steps: is no assignment; write key=value"),
        ("steps=ten", "steps: must be a whole number, got 'ten'"),
        ("steps=1.5", "steps: must be a whole number, got '1.5'"),
        ("steps=none", "steps: must be a whole number, got 'none'"),
        ("optimiser.lr=fast", "must be a number, got 'fast'"),
        ("optimiser.lr=nan", "lr"),
        ("compile=yes", "compile: must be true or false"),
        ("samples.prompts=hello", "must be a JSON list"),
        ("samples.prompts=[1]", "must be a JSON list"),
        ("model.moe=none", r"model\.moe: is no setting"),
        ("model.hidden_size=0", "hidden_size: must lie between"),
    ],
)
def test_a_wrong_override_is_named(recipe, text, problem):
    with pytest.raises(ConfigError, match=problem):
        override(recipe, [text])


def test_an_override_given_twice_is_an_error(recipe):
    with pytest.raises(ConfigError, match="steps: is given twice"):
        override(recipe, ["steps=1", "steps=2"])


def test_a_recipe_is_found_by_name_folder_and_file(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "mine").mkdir(parents=True)
    file = tmp_path / "recipes" / "mine" / "recipe.py"
    file.write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "recipes/mine", str(file)):
        found = find_recipe(name)
        assert (found.name, found.recipe.steps, found.prepare) == ("mine", 200, None)
    assert {"mine", "smoke"} <= set(recipe_names())


def test_an_unknown_recipe_gets_a_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError, match="smoky: no such recipe; did you mean smoke"):
        find_recipe("smoky")
    with pytest.raises(UnknownModelError, match=r"there are .*smoke"):
        find_recipe("zzzzzz")
    with pytest.raises(UnknownModelError, match="no recipe there"):
        find_recipe("./nothing")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", r"must define recipe\(\)"),
        ("def recipe(): return 3", r"must define recipe\(\) and return"),
        ("def recipe(:", "cannot be run: "),
        ("import no_such_module", "cannot be run: No module named 'no_such_module'"),
        ("def recipe(): return undefined", "cannot be run: NameError: name 'undefined' is not defined"),
        (MINIMAL.replace("steps=", "stepz="), "cannot be run: TypeError: .* unexpected keyword argument 'stepz'"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path, text, problem):
    (tmp_path / "recipe.py").write_text(text)
    with pytest.raises(FileError, match=problem):
        find_recipe(str(tmp_path / "recipe.py"))


def test_schedules():
    wsd = settings.ScheduleSettings(kind="wsd", warmup=10, decay=0.25, floor=0.1)
    factors = [lr_factor(step, 100, wsd) for step in range(100)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[10:75] == [1.0] * 65
    assert factors[75:] == sorted(factors[75:], reverse=True)
    assert factors[75] == pytest.approx(0.1 + 0.9 * (1 - (1 / 26) ** 0.5))
    cosine = settings.ScheduleSettings(kind="cosine", warmup=0, floor=0.0)
    assert lr_factor(49, 99, cosine) == pytest.approx(0.5)  # halfway from the first step to one past the last
    assert lr_factor(98, 99, cosine) > 0
    assert lr_factor(500, 99, cosine) == pytest.approx(0.0)
