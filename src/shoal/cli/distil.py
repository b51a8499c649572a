"""`shoal distil`."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.console import Meter, needs_torch, note
from shoal.errors import ConfigError, FileError

if TYPE_CHECKING:
    from shoal.engine import LLM
    from shoal.train.loop import Outcome
    from shoal.tune.distil import DistilRecipe
    from shoal.tune.teacher import Verifier


def run(
    teacher: Annotated[str, typer.Option("--teacher", "-t", help="Short name, Hugging Face folder or GGUF file.")],
    student: Annotated[str, typer.Option("--student", "-s", help="The same of the model that learns.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Examples, as for `shoal tune`.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change; --dry-run lists them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where everything about the run goes.")] = None,
    mode: Annotated[str, typer.Option(help="sequences, logits or on-policy.")] = "logits",
    verify: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:NAME", help="Python: (example, answer) → whether it is right."),
    ] = None,
    adapters: Annotated[bool, typer.Option("--adapters", help="Train adapters, not all of the student.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; by default what --epochs takes.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="How often each example is seen.")] = 3.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the data, print all settings, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Teach a student model what a teacher model knows.

    The same command goes on where an earlier one ended, however it ended.

    sequences: the teacher answers every example, answers that --verify refuses are thrown out, the student is tuned on
    the rest; any two models will do. logits: the student learns the teacher's likeliest tokens at each token of the
    given answers. on-policy: the student answers, and at each token moves towards what the teacher would have written.
    The last two need the same tokenizer and refuse another.

    The teacher runs in the engine and may be quantised. DIR gets model/ (or adapter/), as after `shoal tune`.

    [bold]Examples[/bold]
      shoal distil --teacher smollm2-135m --student ./small --data chats.jsonl --out runs/small
      shoal distil -t ./big -s ./small --data q.jsonl --out runs/q --mode sequences --verify recipes/sql/task.py:right
    """
    with needs_torch("distillation"):
        from shoal.tune.distil import DistilSettings, open_teacher, with_teacher
        from shoal.tune.recipe import TuneSettings
        from shoal.tune.sft import Data, default_recipe, settle
    from shoal import hub, settings
    from shoal.cli.train import prepare_process, show_outcome, show_recipe
    from shoal.cli.tune import LOSSES, changed
    from shoal.formats.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(hub.resolve(student))
    tuning = TuneSettings(model=student, data=str(data), method="adapters" if adapters else "full")

    def make(tuning: TuneSettings) -> DistilRecipe:
        return with_teacher(default_recipe(checkpoint, tuning), DistilSettings(teacher=teacher, mode=mode))

    recipe = changed(make, tuning, changes or [])
    checker = _verifier(verify) if verify is not None else None
    if dry_run:
        show_recipe(settle(recipe, Data(recipe, checkpoint), steps=steps, epochs=epochs), as_json)
        return 0
    if out is None:
        raise ConfigError("out", "is needed: the folder for log, checkpoints and model")
    prepare_process()
    llm = open_teacher(recipe.distil.teacher, max_context=recipe.sequence_length, threads=settings.threads())
    outcome = _run(recipe, checkpoint, llm, out, checker, steps, epochs)
    show_outcome(outcome, out, as_json, LOSSES)
    return 0 if outcome.signal is None else 128 + outcome.signal


def _run(
    recipe: DistilRecipe, student: Any, teacher: LLM, out: Path, verify: Verifier | None, steps: int | None,
    epochs: float,
) -> Outcome:  # fmt: skip
    from shoal.cli.train import Screen
    from shoal.cli.tune import describe_data
    from shoal.engine import SamplingParams
    from shoal.tune.distil import distil
    from shoal.tune.examples import read_examples
    from shoal.tune.sft import Data, settle, tune
    from shoal.tune.teacher import write_answers

    if recipe.distil.mode == "sequences":
        out.mkdir(parents=True, exist_ok=True)
        params = SamplingParams(temperature=recipe.distil.temperature, max_tokens=recipe.distil.max_tokens)
        examples = read_examples(recipe.tune.data, shape=recipe.tune.format)
        answers = out / "answers.jsonl"
        with Meter("the teacher answers") as meter:
            asked, kept = write_answers(
                teacher, examples, answers, samples=recipe.distil.samples, params=params, verify=verify, progress=meter
            )
        note(f"{kept} of {asked} answers kept")
        recipe = replace(recipe, tune=replace(recipe.tune, data=str(_kept(answers, out / "kept.jsonl")), format="auto"))
    elif verify is not None:
        raise ConfigError("verify", "goes with --mode sequences")
    data = Data(recipe, student)
    describe_data(data)
    settled = settle(recipe, data, steps=steps, epochs=epochs)
    with Screen() as screen:
        if recipe.distil.mode == "sequences":
            return tune(settled, out, data, screen)
        return distil(settled, out, data, teacher, screen)


def _kept(answers: Path, path: Path) -> Path:
    """The accepted lines as a file of their own, the same bytes each time."""
    import orjson

    from shoal.formats.atomic import atomic_file

    records = [orjson.loads(line) for line in answers.read_bytes().splitlines()]
    kept = [record for record in records if record.pop("accepted")]
    if not kept:
        raise ConfigError("teacher", "gave no answer that was accepted")
    with atomic_file(path) as file:
        file.write(b"".join(orjson.dumps(record) + b"\n" for record in kept))
    return path


def _verifier(text: str) -> Verifier:
    """The function NAME of FILE.py. The file is Python and runs as such."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(f"shoal_verifier_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError("verify", f"{text!r} is not FILE.py:NAME of a file that is there")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, OSError) as error:
        raise FileError(path, f"cannot be run: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise FileError(path, "is no function of this file", item=name)
    return function  # type: ignore[no-any-return]
