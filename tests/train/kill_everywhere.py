"""Kill a run with SIGKILL before every change that it makes to the disk, and see it go on as if nothing had been.

Run by test_checkpoint.py in a process of its own: children are forked, so that PyTorch is imported once. Prints one
JSON object: how many places there were, and the operations a run was killed before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # on first use, an optimiser imports it: once here, not in every child
from tests_train_conftest import losses_in, make_data, tiny_model, tiny_recipe  # conftest.py, by the test's name for it

from shoal.model import random_model
from shoal.train import measure
from shoal.train.loop import train
from shoal.train.recipe import CheckpointSettings, Recipe, ValidationSettings

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Silent:
    def note(self, text: str) -> None:
        pass

    def step(self, record: dict, until: int) -> None:
        pass


def in_child(work: Callable[[], object]) -> int:
    """Do `work` in a forked process; how that ended: 0, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_and_be_killed(recipe: Recipe, out: Path, place: int) -> None:
    """Train, but die before the operation number `place` (from 0) on a file under `out`; say which it is first."""
    seen = 0

    def count(what: str) -> None:
        nonlocal seen
        if seen == place:
            (out.parent / "operation").write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def watch(event: str, arguments: tuple) -> None:
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        inside_rmtree = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # names relative to an open folder
        if event in OPERATIONS and not reads and (inside_rmtree or str(arguments[0]).startswith(f"{out}/")):
            count(event)

    real = os.fsync

    def fsync(handle: int) -> None:  # the one operation that has no audit event
        count("os.fsync")
        real(handle)

    os.fsync = fsync
    sys.addaudithook(watch)
    train(recipe, out, Silent(), until=3)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    random_model(tiny_model(), 0)  # what PyTorch imports on first use, it shall not import again in every child
    measure.PROBE_SIDE, measure.PROBE_SECONDS = 16, 0.0
    recipe = tiny_recipe(
        make_data(folder / "data"),
        steps=4,
        checkpoint=CheckpointSettings(every=1, keep=1),
        validation=ValidationSettings(every=0),
        model=tiny_model(num_nextn_predict_layers=0),
    )
    assert in_child(lambda: train(recipe, folder / "whole", Silent())) == 0
    expected = losses_in(folder / "whole")
    assert in_child(lambda: train(recipe, folder / "base", Silent(), until=2)) == 0
    shutil.rmtree(folder / "base" / "model")
    operations: Counter[str] = Counter()
    out = folder / "killed"
    while True:
        shutil.copytree(folder / "base", out)
        place = operations.total()
        ended = in_child(lambda place=place: run_and_be_killed(recipe, out, place))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
        operations[(folder / "operation").read_text()] += 1
        assert in_child(lambda: train(recipe, out, Silent())) == 0, place
        assert losses_in(out) == expected, place
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"], place
        assert not list(out.rglob("*.partial")), place
        assert (out / "model" / "config.json").exists(), place
        shutil.rmtree(out)
    print(json.dumps({"places": operations.total(), "operations": operations}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
