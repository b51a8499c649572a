"""What two processes do together, for test_parallel.py, which starts them by torchrun: one start, many cases.

Each case leaves a run's folder, or a line of what it found; rank 0 writes these to `found.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tests_train_conftest import Listener, tiny_model
from tests_train_parallel_cases import BASE, CASES, RESUMED  # what the test trains alone, to compare

from shoal.errors import FileError, RunError
from shoal.model import Model, random_model
from shoal.train import checkpoint, loop, measure
from shoal.train.losses import LossSettings, TextBatch, language_loss
from shoal.train.optim import Muon
from shoal.train.parallel import Company
from shoal.train.process import launched
from shoal.train.recipe import ParallelSettings, Recipe


def main(folder: Path) -> None:
    measure.PROBE_SIDE, measure.PROBE_SECONDS = 16, 0.0
    found: dict[str, object] = {}
    with launched() as process:
        assert isinstance(process, Company)
        base = BASE(folder / "data")
        for name, (changes, expert) in CASES.items():
            train(dealt(replace(base, **changes), expert), folder / name, process)
        for name, (first, then) in RESUMED.items():
            recipe = base if not first else dealt(base, first)
            if first:
                train(recipe, folder / name, process, until=3)
            if then:
                train(dealt(base, then), folder / name, process)
        found["gradient"] = {kind: gradient_error(process, kind) for kind in ("dealt", "cut", "lopsided")}
        found["muon"] = muon_error(process)
        found["signal"] = signalled(process, dealt(base, 2), folder / "signal")
        found["refused"] = refused(process, dealt(base, 2), folder / "refused")
        if process.leads:
            (folder / "found.json").write_text(json.dumps(found))


def dealt(recipe: Recipe, expert: int) -> Recipe:
    return replace(recipe, parallel=ParallelSettings(expert=expert))


def train(recipe: Recipe, out: Path, process: Company, until: int | None = None) -> loop.Outcome:
    return loop.train(recipe, out, Listener(), until=until, process=process)


def whole(process: Company, value: torch.Tensor) -> torch.Tensor:
    value = process.whole(value)
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gradient_error(process: Company, kind: str) -> float:
    """The largest difference, in float64, of a value's gradient from that of one process with the whole batch."""
    process.begin(dealt(BASE(Path()), 1 if kind == "cut" else 2))
    config, generator = tiny_model(), torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, 257, (4, 17), generator=generator)
    targets_BT = tokens_BT[:, 1:].clone()
    targets_BT[1:, 5:] = -100  # the second process has few targets
    batch = TextBatch(tokens_BT[:, :-1], targets_BT, torch.arange(16).div(6, rounding_mode="floor").expand(4, -1))

    def backward(model: Model, rows: slice) -> None:
        part = TextBatch(*(None if x is None else x[rows] for x in batch))
        settings, count = LossSettings(balance_weight=0.1, z_weight=0.01), (targets_BT != -100).sum()
        language_loss(model, part, settings, num_targets=count, num_rows=4).total.backward()

    def fresh() -> Model:
        model = random_model(config, 0, dtype=torch.float64)
        if kind == "lopsided":  # nobody goes to the second process's experts
            for layer in (1, 2):
                model.model.layers[layer].mlp.gate.e_score_correction_bias[:2] = 9.0
        return model

    alone, together = fresh(), process.wrap(fresh())
    backward(alone, slice(None))
    backward(together, slice(process.rank * 2, process.rank * 2 + 2))
    grads = {name: p.grad for name, p in together.named_parameters()}
    assert grads.keys() == {name for name, _ in alone.named_parameters()}
    return max(float((whole(process, grads[name]) - p.grad).abs().max()) for name, p in alone.named_parameters())


def muon_error(process: Company) -> float:
    """The largest difference of weights after three steps of Muon from those of one process with equal gradients."""
    process.begin(dealt(BASE(Path()), 2))
    generator = torch.Generator().manual_seed(2)
    alone = random_model(tiny_model(), 0)
    together = process.wrap(random_model(tiny_model(), 0))

    def matrices(model: Model) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if p.dim() > 1}

    ours, theirs = matrices(together), matrices(alone)
    pair = Muon(ours.values(), lr=0.1), Muon(theirs.values(), lr=0.1)
    for _ in range(3):
        for name, p in theirs.items():
            p.grad = torch.randn(p.shape, generator=generator)
            mine = process.whole(ours[name].detach())
            ours[name].grad = torch.zeros_like(ours[name])
            cut = torch.distributed.tensor.distribute_tensor(
                p.grad, mine.device_mesh, mine.placements, src_data_rank=None
            )
            ours[name].grad.to_local().copy_(cut.to_local())
        for optimiser in pair:
            optimiser.step()
    return max(float((whole(process, ours[name].detach()) - p.detach()).abs().max()) for name, p in theirs.items())


def signalled(process: Company, recipe: Recipe, out: Path) -> list[int]:
    """The second process gets SIGTERM in step 3: the step that each saved and the signal that each reports."""
    real = loop.Run.run_step

    def run_step(run: loop.Run) -> loop.Record:
        if run.step == 2 and process.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)

    loop.Run.run_step = run_step
    outcome = train(recipe, out, process)
    loop.Run.run_step = real
    steps = [outcome.step, process.largest(outcome.step), -process.largest(-outcome.step)]
    return [*steps, -process.largest(-(outcome.signal or 0))]


def refused(process: Company, recipe: Recipe, out: Path) -> list[str]:
    """The second process's disk refuses at step 4: what each process says, and what is left."""
    real = checkpoint.write_part

    def write_part(file: Path, *rest):
        if process.rank == 1 and "00000004" in str(file):
            raise FileError(file, "cannot be written: No space left on device")
        return real(file, *rest)

    checkpoint.write_part = write_part
    problem = ""
    try:
        train(recipe, out, process)
    except RunError as error:
        problem = str(error)
    checkpoint.write_part = real
    agreed = process.largest(len(problem)) == -process.largest(-len(problem))
    return [problem, str(agreed), *sorted(path.name for path in (out / "checkpoints").iterdir())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
