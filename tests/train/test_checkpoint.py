"""Checkpoints: killed anywhere, on a full disk, damaged afterwards, a run goes on from the newest whole one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.errors import FileError, RunError
from shoal.train import checkpoint
from shoal.train.recipe import CheckpointSettings

HERE = Path(__file__).parent


def small_state(value: float = 1.0):
    tensors = {"a": torch.full((3, 2), value), "b": torch.tensor(7.0), "c": torch.ones(5, dtype=torch.bfloat16)}
    return {"model": tensors, "random": {"state": torch.arange(9, dtype=torch.uint8)}}


def silent(text: str) -> None:
    raise AssertionError(text)


def test_killed_before_every_operation_on_the_disk_a_run_goes_on_bit_equal(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tests_train_conftest.py").symlink_to(HERE / "conftest.py")
    path = os.pathsep.join([str(tmp_path / "modules"), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, HERE / "kill_everywhere.py", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["places"] > 50
    assert result["operations"].keys() >= {"open", "os.fsync", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def test_what_is_saved_is_what_is_found(tmp_path):
    checkpoint.save(tmp_path, 3, small_state(), {"x": [1, "é"]}, keep=2)
    saved = checkpoint.newest(tmp_path, silent)
    assert (saved.step, saved.meta) == (3, {"x": [1, "é"]})
    for part, tensors in small_state().items():
        found = saved.tensors(part)
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path / "none", silent) is None


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 10, 200_000_000):
        checkpoint.save(tmp_path, step, small_state(), {}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000010", "step-200000000"]
    assert checkpoint.newest(tmp_path, silent).step == 200_000_000


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "missing"])
def test_a_damaged_newest_falls_back_with_one_warning(tmp_path, name, how):
    if (name, how) == ("state.json", "flipped"):
        pytest.skip("the last byte of state.json is a line end")
    for step in (1, 2):
        checkpoint.save(tmp_path, step, small_state(step), {}, keep=2)
    damage(tmp_path / "step-00000002" / name, how)
    said: list[str] = []
    saved = checkpoint.newest(tmp_path, said.append)
    assert saved.step == 1
    assert float(saved.tensors("model")["a"][0, 0]) == 1.0
    assert len(said) == 1
    assert f"step-00000002/{name}" in said[0]
    assert checkpoint.newest(tmp_path, silent).step == 1  # the damaged one lies aside
    checkpoint.save(tmp_path, 2, small_state(), {}, keep=2)  # and leaves its place free
    assert checkpoint.newest(tmp_path, silent).step == 2


def test_when_none_is_whole_the_run_does_not_silently_start_anew(tmp_path):
    checkpoint.save(tmp_path, 1, small_state(), {}, keep=2)
    damage(tmp_path / "step-00000001" / "model.safetensors", "truncated")
    with pytest.raises(FileError, match=r"step-00000001: is damaged .*no other checkpoint is left"):
        checkpoint.newest(tmp_path, silent)
    assert (tmp_path / "step-00000001").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": "x"}, "is no checkpoint of version 1"),
        ({"step": 5}, "does not describe step 1"),
        ({"files": {"../../x.safetensors": {"bytes": 1, "sha256": "0" * 64}}}, "lists '../../x.safetensors'"),
        ({"files": {"model.safetensors": {"bytes": 1}}}, "without a digest"),
        ({"files": []}, "must list files"),
        ({"meta": None}, "does not describe step 1"),
    ],
)
def test_a_state_that_lies_is_refused(tmp_path, change, problem):
    checkpoint.save(tmp_path, 1, small_state(), {}, keep=2)
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileError, match=problem):
        checkpoint.newest(tmp_path, silent)


@pytest.fixture
def full_disk():
    """Every file that grows past 4 KB meets the error that a full disk raises, or its sibling for limits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, full_disk):
    checkpoint.save(tmp_path, 1, small_state(), {}, keep=1)
    full_disk()
    large = {"model": {"a": torch.zeros(4096)}}
    with pytest.raises(RunError, match=r"step 2 could not be saved: .*cannot be written: .*step 1 is intact"):
        checkpoint.save(tmp_path, 2, large, {}, keep=1)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert checkpoint.newest(tmp_path, silent).step == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_says_so(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        checkpoint.save(tmp_path, 1, small_state(), {}, keep=1)


def test_a_run_on_a_full_disk_goes_on_after_it_is_cleared(recipe, run, read_losses, tmp_path, full_disk):
    recipe = replace(recipe, checkpoint=CheckpointSettings(every=2))
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "run", until=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full_disk()
    with pytest.raises(RunError, match=r"step 4 could not be saved: .*step 2 is intact"):
        run(recipe, tmp_path / "run")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run(recipe, tmp_path / "run")
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    shutil.rmtree(tmp_path / "run" / "model")
    full_disk()
    with pytest.raises(RunError, match=r"step 6 is saved, but not its model: .*cannot be written"):
        run(recipe, tmp_path / "run")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run(recipe, tmp_path / "run")[0].model.is_dir()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.endswith("partial")) == []


@pytest.mark.parametrize("part", ["model", "optimiser"])
def test_a_checkpoint_of_another_shape_is_refused(recipe, run, tmp_path, part):
    """The recipe that is stored beside it normally says so first; tensors are checked all the same."""
    run(recipe, tmp_path / "run", until=2)
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints", silent)
    state = {name: saved.tensors(name) for name in saved.parts}
    name = next(name for name, value in state[part].items() if name.endswith("lm_head.weight") and value.dim())
    state[part][name] = state[part][name][:-1]
    checkpoint.save(tmp_path / "run" / "checkpoints", 3, state, saved.meta, keep=1)
    with pytest.raises(FileError, match=r"lm_head\.weight: has shape \[256, 16\], the recipe asks for \[257, 16\]"):
        run(recipe, tmp_path / "run")


def in_pieces(folder, change=lambda places: None):
    """A checkpoint of a 5 × 2 tensor that two processes have written, three rows and two."""
    path, whole = folder / "step-00000007", torch.arange(10.0).view(5, 2)
    path.mkdir(parents=True)
    files = {}
    for rank, rows in enumerate((slice(0, 3), slice(3, 5))):
        places = {"x": ([rows.start, 0], [5, 2])}
        if rank:
            change(places)
        files |= checkpoint.write_part(path / f"model-{rank:05d}.safetensors", {"x": whole[rows]}, places)
    checkpoint.seal(path, 7, files, {})
    return whole


def test_pieces_become_whole(tmp_path):
    whole = in_pieces(tmp_path)
    saved = checkpoint.newest(tmp_path, silent)
    assert torch.equal(saved.tensors("model")["x"], whole)
    assert saved.parts["model"]["x"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda places: places.update(x=([3, 0], [6, 2])), "does not say where its pieces belong"),
        (lambda places: places.update(x=([4, 0], [5, 2])), "does not say where its pieces belong"),
        (lambda places: places.update(x=([-1, 0], [5, 2])), "does not say where its pieces belong"),
        (lambda places: places.update(x=(["a", 0], [5, 2])), "does not say where its pieces belong"),
        (lambda places: places.pop("x"), "does not say where its pieces belong"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(tmp_path, change, problem):
    in_pieces(tmp_path, change)
    with pytest.raises(FileError, match=problem):
        checkpoint.newest(tmp_path, silent)


def test_a_missing_piece_is_noticed(tmp_path):
    in_pieces(tmp_path)
    state = tmp_path / "step-00000007" / "state.json"
    content = json.loads(state.read_text())
    del content["files"]["model-00000.safetensors"]
    state.write_text(json.dumps(content))
    with pytest.raises(FileError, match="x: holds 4 of the 10 values of model"):
        checkpoint.newest(tmp_path, silent)
