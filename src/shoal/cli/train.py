"""`shoal train`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.console import human_count, needs_torch, note, print_pairs, write_json

if TYPE_CHECKING:
    from shoal.train.log import Record
    from shoal.train.loop import Outcome
    from shoal.train.recipe import Recipe


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, its folder, or a Python file.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe to change.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where everything about the run goes.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="End after this step; by default the recipe's last.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe with all its settings, and end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Train a model from text, by a recipe.

    The same command goes on where an earlier one ended, however it ended.

    DIR gets log.jsonl (a line a step), checkpoints/ and, at the end, model/: a Hugging Face folder that Shoal,
    transformers and others load. Ctrl-C and SIGTERM save and end; so does touching DIR/STOP; DIR/SAVE saves.

    Under torchrun, processes share the run: weights are cut over them, experts dealt out with parallel.expert=N. DIR
    must lie where all of them see it. Any number of processes goes on with the checkpoints of any other.

    --steps ends early without changing the learning rate's schedule, which is laid out over the recipe's own steps.

    [bold]Examples[/bold]
      shoal train smoke --out runs/smoke
      shoal train smoke --out runs/wide model.moe.n_routed_experts=32 optimiser.lr=2e-3
      shoal train ./my/recipe.py --dry-run
      torchrun --nproc-per-node 2 -m shoal train smoke --out runs/two parallel.expert=2
    """
    with needs_torch("training"):
        from shoal.train.find import find_recipe
        from shoal.train.loop import train
        from shoal.train.overrides import override
        from shoal.train.process import launched
    with launched() as process:
        found = find_recipe(recipe)
        settings = override(found.recipe, changes or [])
        if dry_run:
            settings = settings if steps is None else replace(settings, steps=max(steps, settings.steps))
            if process.leads:
                show_recipe(settings, as_json)
            return 0
        if out is None:
            raise typer.BadParameter("is needed: the folder for log, checkpoints and model", param_hint="--out")
        prepare_process()
        with Screen() as screen:
            outcome = train(settings, out, screen, until=steps, prepare=found.prepare, process=process)
        if process.leads:
            show_outcome(outcome, out, as_json)
        return 0 if outcome.signal is None else 128 + outcome.signal


def prepare_process() -> None:
    """Threads as they are set, and memory that stays from step to step."""
    import torch

    from shoal import settings
    from shoal.machine import keep_freed_memory

    keep_freed_memory()
    threads = settings.threads()
    if threads is not None:
        torch.set_num_threads(threads)


def show_recipe(recipe: Recipe, as_json: bool) -> None:
    """The settings as `key=value`, ready to be pasted; what follows from them goes to stderr."""
    from shoal.formats.layout import count_active_params, count_params
    from shoal.train.recipe import flatten

    flat = flatten(recipe)
    if as_json:
        write_json(flat)
        return
    for key, value in flat.items():
        print(f"{key}={_as_text(value)}")
    total, active = count_params(recipe.model), count_active_params(recipe.model)
    note(f"{human_count(total)} parameters, {human_count(active)} of them active for a token")
    note(f"{human_count(recipe.tokens)} tokens in {recipe.steps} steps of {human_count(recipe.tokens_per_step)}")


def _as_text(value: object) -> str:
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, list)) else str(value)


def show_outcome(outcome: Outcome, out: Path, as_json: bool, losses: Sequence[str] = ("loss", "val_loss")) -> None:
    """How a run ended, with those losses of its last step, and where things are."""
    record = outcome.record or {}
    made = outcome.model.name if outcome.model and outcome.model.name == "adapter" else "model"
    facts: dict[str, Any] = {
        "step": outcome.step,
        **{name: record.get(name) for name in losses},
        "log": str(out / "log.jsonl"),
        made: str(outcome.model) if outcome.model else None,
    }
    if as_json:
        write_json(facts)
    else:
        shown = {name: value for name, value in facts.items() if value is not None}
        print_pairs({name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in shown.items()})
    if outcome.model is None:
        note("saved; the same command goes on from here")


class Screen:
    """A bar on a terminal; elsewhere plain lines, ever more seldom the longer the run goes on. All on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._started = time.monotonic()
        self._last = 0.0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        note(text)

    def step(self, record: Record, until: int) -> None:
        line = describe(record, until)
        special = "val_loss" in record or record["step"] == until
        if sys.stderr.isatty():
            self._advance(record["step"], until, line)
        now = time.monotonic()
        due = now - self._last >= max(1.0, 0.01 * (now - self._started))
        if special or (due and not sys.stderr.isatty()):
            self._last = now
            note(line, dim=False)
        for sample in record.get("samples", ()):
            note(f"  {sample['prompt']!r} → {sample['text']!r}")

    def _advance(self, step: int, until: int, line: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bar is None:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=until)
        self._bar.update(self._task, completed=step, description=line)


def describe(record: Record, until: int) -> str:
    """A step in one line."""
    parts = [f"step {record['step']}/{until}", f"loss {record['loss']:.4f}"]
    if "val_loss" in record:
        parts.append(f"held-out {record['val_loss']:.4f}")
    parts += [f"lr {record['lr']:.2e}", f"grad {record['grad_norm']:.2f}", f"{record['tok_s']:.0f} tok/s"]
    parts.append(f"{record['utilisation']:.0%} of the matrix rate")
    if "max_vio" in record:
        parts.append(f"balance {record['max_vio']:.2f}")
        if record["dead_experts"]:
            parts.append(f"{record['dead_experts']} idle experts")
    parts.append(f"{_clock(record['eta_s'])} left")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
