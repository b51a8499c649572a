"""`shoal tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from shoal.cli.console import human_count, needs_torch, note
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.tune.recipe import TuneRecipe, TuneSettings
    from shoal.tune.sft import Data

AnyTune = TypeVar("AnyTune", bound="TuneRecipe")
LOSSES = ("loss", "val_loss", "best_loss")


def run(
    model: Annotated[str, typer.Option("--model", "-m", help="Short name, Hugging Face folder or GGUF file.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Examples: .jsonl, .jsonl.gz or a .json list.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change; --dry-run lists them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where everything about the run goes.")] = None,
    budget: Annotated[str, typer.Option(help="Parameters to train: a share such as 0.3%, or a count.")] = "0.3%",
    full: Annotated[bool, typer.Option("--full", help="Train every weight instead of adapters.")] = False,
    base: Annotated[str, typer.Option(help="The frozen weights: keep, int8 or int4.")] = "keep",
    form: Annotated[str, typer.Option("--format", help="auto, messages, prompt, alpaca or sharegpt.")] = "auto",
    validation: Annotated[Path | None, typer.Option(help="Examples that are never learnt from.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; by default what --epochs takes.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="How often each example is seen.")] = 3.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the data, print all settings, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Tune a model on examples: adapters under a budget, or all weights.

    The same command goes on where an earlier one ended, however it ended.

    A line is a conversation ("messages"), a "prompt" and its "completion", an Alpaca or a ShareGPT record; only the
    answers are learnt. Adapters go where the data's routing and gradient say, --budget parameters at most, and are
    written to DIR/adapter as a PEFT folder, which Hugging Face PEFT loads and `shoal chat`, `serve` and `convert` take
    with --adapter (serve: NAME=DIR); --full writes a whole model to DIR/model. One example in twenty is held out, and
    the best weights are kept.

    Ctrl-C and SIGTERM save and end; so does touching DIR/STOP; DIR/SAVE saves.

    [bold]Examples[/bold]
      shoal tune --model smollm2-135m --data examples.jsonl --out runs/mine
      shoal tune --model ./DeepSeek-V2-Lite --data chats.jsonl --out runs/lite --base int4 --budget 0.1%
      shoal tune --model smollm2-135m --data examples.jsonl --out runs/full --full optimiser.lr=2e-5
    """
    with needs_torch("tuning"):
        from shoal.tune.recipe import TuneSettings
        from shoal.tune.sft import Data, default_recipe, settle, tune
    from shoal import hub
    from shoal.cli.train import Screen, prepare_process, show_outcome, show_recipe
    from shoal.formats.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(hub.resolve(model))
    settings = TuneSettings(
        model=model, data=str(data), format=form, validation=str(validation) if validation else None,
        method="full" if full else "adapters", budget=budget, base=base,
    )  # fmt: skip
    recipe = changed(partial(default_recipe, checkpoint), settings, changes or [])
    found = Data(recipe, checkpoint)
    describe_data(found)
    recipe = settle(recipe, found, steps=steps, epochs=epochs)
    if dry_run:
        show_recipe(recipe, as_json)
        return 0
    if out is None:
        raise ConfigError("out", "is needed: the folder for log, checkpoints and adapter")
    prepare_process()
    with Screen() as screen:
        outcome = tune(recipe, out, found, screen)
    show_outcome(outcome, out, as_json, LOSSES)
    return 0 if outcome.signal is None else 128 + outcome.signal


def changed(make: Callable[[TuneSettings], AnyTune], settings: TuneSettings, changes: Sequence[str]) -> AnyTune:
    """The recipe that `make` gives for some settings, with `key=value` changes applied."""
    from shoal.train.overrides import override

    recipe = override(make(settings), changes)
    if recipe.tune.method != settings.method:  # changed by its key: its learning rate is another
        recipe = override(make(replace(settings, method=recipe.tune.method)), changes)
    return recipe


def describe_data(data: Data) -> None:
    report = data.report
    note(
        f"{report.sequences} sequences, {human_count(report.tokens)} tokens, {human_count(report.learnt)} of them "
        f"learnt, in {len(data.rows)} rows; {len(data.held_out) if data.held_out else 0} rows held out"
    )
    if report.cut or report.dropped:
        note(f"{report.cut} sequences lost their end to sequence_length, {report.dropped} with it every answer")
