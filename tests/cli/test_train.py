"""`shoal train`: the smoke recipe runs, resumes, and its model answers in the engine; mistakes take one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from shoal.cli.train import describe
from shoal.engine import LLM, SamplingParams

# Small and few: what is tested is the way from text to a model, not how fast it is.
SMALL = ("sequence_length=32", "batch=4", "micro_batch=4", "validation.sequences=2", "samples.every=0")
COMMAND = (sys.executable, "-m", "shoal", "train", "smoke")


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The smoke recipe after its first four steps, as another process left it."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    done = subprocess.run([*COMMAND, "--out", out, "--steps", "4", "--json", *SMALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["step"], facts["model"]) == (4, str(out / "model"))
    assert "step 4/4" in done.stderr
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    return out


def test_the_same_command_goes_on_and_its_model_answers(shoal, begun):
    out = begun
    result = shoal("train", "smoke", "--out", str(out), "--steps", "6", *SMALL)
    assert result.code == 0
    assert "going on after step 4" in result.err
    assert result.out.splitlines()[0] == "step      6"
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]
    reply = LLM(str(out / "model")).generate("import", SamplingParams(temperature=0, max_tokens=4))
    assert 1 <= len(reply.token_ids) <= 4


def test_dry_run_prints_settings_that_can_be_pasted(shoal):
    result = shoal("train", "smoke", "--dry-run", "optimiser.lr=0.5", 'samples.prompts=["x"]')
    assert result.code == 0
    printed = result.out.splitlines()
    assert "optimiser.lr=0.5" in printed
    assert "model.moe.n_routed_experts=16" in printed
    again = shoal("train", "smoke", "--dry-run", *(line for line in printed if not line.startswith("model.model_type")))
    assert again.out == result.out
    assert json.loads(shoal("train", "smoke", "--dry-run", "--json").out)["steps"] == 40


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("train", "smoke"), "--out"),
        (("train", "smok", "--out", "x"), "smok: no such recipe; did you mean smoke?"),
        (("train", "smoke", "--out", "x", "stepz=3"), "stepz: is no setting of this recipe; did you mean steps?"),
        (("train", "smoke", "--out", "x", "batch=7"), "micro_batch: 8 does not divide the batch of 7"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(shoal, tmp_path, monkeypatch, arguments, problem):
    monkeypatch.chdir(tmp_path)
    result = shoal(*arguments)
    assert result.code == 2
    assert problem in result.err
    assert os.listdir(tmp_path) == []


def test_sigterm_ends_a_real_process_with_143_and_its_work_is_kept(tmp_path, begun):
    out = tmp_path / "run"
    command = [*COMMAND, "--out", str(out), "steps=100000", f"data.folder={begun / 'data'}", *SMALL]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "log.jsonl").exists() and len((out / "log.jsonl").read_bytes().splitlines()) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    last = lines(out)[-1]["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert "the same command goes on from here" in err


def test_a_step_in_one_line():
    record = {
        "step": 3, "loss": 2.5, "val_loss": 2.75, "lr": 1e-3, "grad_norm": 0.5, "tok_s": 1234.5, "utilisation": 0.25,
        "max_vio": 0.5, "dead_experts": 2, "eta_s": 3725.0,
    }  # fmt: skip
    assert describe(record, 9) == (
        "step 3/9  loss 2.5000  held-out 2.7500  lr 1.00e-03  grad 0.50  1234 tok/s  25% of the matrix rate"
        "  balance 0.50  2 idle experts  1:02:05 left"
    )


@pytest.mark.parametrize(
    ("environment", "arguments", "problem"),
    [
        ({}, ["parallel.expert=3"], "parallel.expert: 3 does not divide 16 experts"),
        ({}, ["parallel.expert=2"], "parallel.expert: 2 needs as many processes; start them with torchrun"),
        ({"WORLD_SIZE": "two"}, [], "WORLD_SIZE: must be a whole number as torchrun sets it, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, [], "RANK: must be less than the WORLD_SIZE of 2, got 2"),
        ({"WORLD_SIZE": "2"}, [], "RANK: must be a whole number as torchrun sets it, got ''"),
    ],
)
def test_processes_that_do_not_fit_the_recipe_are_named(shoal, monkeypatch, tmp_path, environment, arguments, problem):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = shoal("train", "smoke", "--out", str(tmp_path / "run"), *arguments)
    assert result.code == 2
    assert problem in result.err
    assert not (tmp_path / "run").exists()
