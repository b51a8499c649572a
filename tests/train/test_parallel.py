"""Several processes, started by torchrun, do what one does; any number goes on with what any other left."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from shoal.formats.checkpoint import open_checkpoint
from shoal.model import load_model
from shoal.train import checkpoint

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start `python -m torch.distributed.run` with two processes."""
    modules = tmp_path_factory.mktemp("modules")
    for name in ("conftest", "parallel_cases"):
        (modules / f"tests_train_{name}.py").symlink_to(HERE / f"{name}.py")
    path = os.pathsep.join([str(modules), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SHOAL_THREADS": "1"}

    def go(*arguments: str | Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    sys.path.insert(0, str(modules))
    yield go
    sys.path.remove(str(modules))


@pytest.fixture(scope="module")
def cases(start):
    import tests_train_parallel_cases

    return tests_train_parallel_cases


@pytest.fixture(scope="module")
def together(start, cases, data, tmp_path_factory):
    """The folder in which two processes have done all of `together.py`."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "data").symlink_to(data)
    quick_alone(cases.BASE(folder / "data"), folder / "alone, dealt", until=3)
    process = start(HERE / "together.py", folder)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return folder


def quick_alone(recipe, out, until=None):
    import tests_train_conftest

    from shoal.train.loop import train

    train(recipe, out, tests_train_conftest.Listener(), until=until)
    return out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_curve(ours: list[dict], theirs: list[dict], rel: float = 1e-5) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() >= other.keys()
        for name in {"loss", "mtp", "balance", "z", "grad_norm", "val_loss"} & mine.keys():
            assert mine[name] == pytest.approx(other[name], rel=rel), (mine["step"], name)


@pytest.fixture(scope="module")
def alone(together, cases):
    """The lines of a case's log, had one process run it."""
    made: dict[str, list[dict]] = {}

    def go(name: str) -> list[dict]:
        changes = cases.CASES[name][0]
        key = str(changes)
        if key not in made:
            recipe = dataclasses.replace(cases.BASE(together / "data"), **changes)
            made[key] = lines(quick_alone(recipe, together / f"alone {name}"))
        return made[key]

    return go


@pytest.mark.parametrize("name", ["cut", "dealt", "recomputed"])
def test_two_processes_take_the_steps_of_one(together, alone, name):
    ours, theirs = lines(together / name), alone(name)
    assert_same_curve(ours, theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["router"] == other["router"]  # the picks of the whole batch, counted over both
        assert mine.get("samples") == other.get("samples")


@pytest.mark.parametrize("name", ["bf16", "muon"])
def test_in_16_bits_the_steps_are_about_the_same(together, alone, name):
    """Newton-Schulz too runs in bfloat16, where a gradient's last bit may move an update's second digit."""
    assert_same_curve(lines(together / name), alone(name), rel=5e-3)


def test_of_equal_gradients_muon_makes_equal_weights(together):
    assert json.loads((together / "found.json").read_text())["muon"] < 1e-6


def test_gradients_are_those_of_one_process(together):
    """In float64, with experts dealt out, without, and with a process whose experts nobody picks."""
    found = json.loads((together / "found.json").read_text())["gradient"]
    assert found.keys() == {"dealt", "cut", "lopsided"}
    assert max(found.values()) < 1e-14, found


@pytest.mark.parametrize("name", ["alone, dealt", "dealt, cut", "dealt, alone"])
def test_any_number_goes_on_with_what_any_other_left(together, alone, cases, name):
    if name == "dealt, alone":
        quick_alone(cases.BASE(together / "data"), together / name)
    assert_same_curve(lines(together / name), alone("cut"))


def test_every_process_writes_its_own_pieces_once(together):
    """No file holds it all, and together they hold every value once."""
    saved = checkpoint.newest(together / "dealt" / "checkpoints", pytest.fail)
    files = {path.name: path.stat().st_size for path in saved.path.glob("*.safetensors")}
    assert {"model-00000.safetensors", "model-00001.safetensors", "optimiser-00001.safetensors"} <= files.keys()
    assert 0.5 < files["model-00000.safetensors"] / files["model-00001.safetensors"] < 2
    stored = saved.parts["model"]["model.layers.1.mlp.experts.gate_proj.weight"]
    assert (stored.shape, [piece.offset for piece in stored.pieces]) == ((4, 8, 16), [(0, 0, 0), (2, 0, 0)])
    assert len(saved.parts["model"]["model.layers.1.mlp.gate.e_score_correction_bias"].pieces) == 1


def test_the_exported_model_is_the_one_that_was_trained(together):
    saved = checkpoint.newest(together / "dealt" / "checkpoints", pytest.fail).tensors("model")
    state = load_model(open_checkpoint(together / "dealt" / "model")).state_dict()
    assert state.keys() == saved.keys()
    for name, value in saved.items():
        rounded = value if name.endswith("bias") else value.bfloat16().float()
        assert torch.equal(state[name], rounded), name


def test_a_signal_to_one_process_saves_and_ends_all(together):
    assert json.loads((together / "found.json").read_text())["signal"] == [3, 3, 3, signal.SIGTERM]
    assert checkpoint.steps_in(together / "signal" / "checkpoints") == [2, 3]


def test_a_disk_that_refuses_one_process_is_told_by_all(together):
    problem, agreed, *left = json.loads((together / "found.json").read_text())["refused"]
    assert problem.startswith("step 4 could not be saved: rank 1: ")
    assert "step-00000004/model-00001.safetensors: cannot be written: No space left on device" in problem
    assert problem.endswith("; the checkpoint of step 2 is intact")
    assert (agreed, left) == ("True", ["step-00000002"])


def test_a_dead_process_is_named_and_the_run_ends(start, cases, data, tmp_path):
    (tmp_path / "recipe.py").write_text(
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from tests_train_parallel_cases import BASE\n"
        f"def recipe():\n    return replace(BASE(Path({str(data)!r})), steps=100000)\n"
    )
    process = start("-m", "shoal", "train", tmp_path / "recipe.py", "--out", tmp_path / "run", "parallel.expert=2")
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    victim = next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == "1" and "train" in child.cmdline()
    )
    victim.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("shoal: error: ")]
    assert f"rank 1 of 2 (process {victim.pid} on {socket.gethostname()}) is gone; the same command goes on" in line
    assert "Traceback" not in said.split("shoal: error: ")[0]
    done = lines(tmp_path / "run")[-1]["step"]
    quick_alone(dataclasses.replace(cases.BASE(data), steps=100000), tmp_path / "run", until=done + 1)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, done + 2))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
