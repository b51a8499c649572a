"""The life of a training run: prepare or resume, step until done, saving so that no work is lost.

A step reads its tokens (`batches`), runs forward and backward in bfloat16 over float32 weights (`losses`), refuses
numbers that are none, clips, moves the weights (`optim`) and the routers' biases (`balance`), writes a line (`log`),
and now and then validates, samples and saves (`evaluate`, `checkpoint`). Where there are several processes, `process`
hides it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson
import torch
from torch import Tensor

from shoal.cost.train_flops import train_flops
from shoal.cost.train_memory import state_bytes
from shoal.data.shards import INDEX, Shards, open_shards
from shoal.errors import ConfigError, FileError, RunError
from shoal.formats.atomic import atomic_file, atomic_folder, sole_user
from shoal.formats.digest import file_digest
from shoal.model import Model, as_checkpoint
from shoal.train import checkpoint, state
from shoal.train.balance import RouterBalance
from shoal.train.batches import IGNORE, Batches, Rows, split
from shoal.train.evaluate import continue_text, evaluating, validation_loss
from shoal.train.export import export, load_tokenizer, saved_model
from shoal.train.find import Prepare
from shoal.train.log import Log, Record
from shoal.train.losses import Losses, TextBatch, language_loss
from shoal.train.measure import matrix_rate
from shoal.train.network import make_model
from shoal.train.optim import make_optimisers
from shoal.train.process import Process
from shoal.train.recipe import Recipe, flatten
from shoal.train.requests import Requests
from shoal.train.schedule import lr_factor
from shoal.train.tensors import autocast, micro_batches

CHECKPOINTS, MODEL, ADAPTER, DATA = "checkpoints", "model", "adapter", "data"
LOG, RECIPE = "log.jsonl", "recipe.json"
# Settings that a run cannot change once it has begun: other data in another order, or another network.
FIXED = ("model.", "tune.", "seed", "sequence_length", "batch", "data.held_out", "optimiser.optimiser")


class Observer(Protocol):
    """Who is told how it goes."""

    def note(self, text: str) -> None: ...

    def step(self, record: Record, until: int) -> None:
        """A step is done; `record` is its line of the log, the run ends after step `until`."""


class Quiet:
    """Listens and says nothing."""

    def note(self, text: str) -> None:
        pass

    def step(self, record: Record, until: int) -> None:
        pass


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: steps done.
        record: the last line of the log; None if no step was run.
        signal: the signal that ended it, or None.
        model: the exported folder, if the run reached its end.
    """

    step: int
    record: Record | None
    signal: int | None
    model: Path | None


def train(
    recipe: Recipe,
    out: Path,
    observer: Observer,
    *,
    until: int | None = None,
    prepare: Prepare | None = None,
    process: Process | None = None,
) -> Outcome:
    """Start a run in `out`, or go on with the one that is there.

    Args:
        until: end after this step; a larger number than the recipe's makes the recipe longer. Default: the recipe's.
        prepare: makes the data if the recipe names no folder.

    Raises:
        ConfigError: the recipe does not fit itself, its data, this machine's memory, or the run it is to continue.
        FileError: something on disk is missing, damaged, or in use by another run.
        RunError: the loss is no number, or the disk refuses.
    """
    process = process or Process()
    observer = observer if process.leads else Quiet()
    until = recipe.steps if until is None else until
    recipe = replace(recipe, steps=max(recipe.steps, until))
    process.begin(recipe)
    process.require_memory(held_bytes(recipe))
    try:
        with contextlib.ExitStack() as held:
            with process.in_turn():
                if process.leads:
                    held.enter_context(claim(recipe, out))
                    _prepare_data(recipe, out, prepare, observer)
            run = Run(recipe, out, observer, process)
            held.callback(run.close)
            return run.go(until)
    except RuntimeError as error:  # perhaps an operation of all processes, one of which is gone
        blame = process.lost(error)
        if blame is None:
            raise
        steps = checkpoint.steps_in(out / CHECKPOINTS)
        left = f"the same command goes on after step {steps[-1]}" if steps else "no checkpoint was due yet"
        raise RunError(f"{blame}; {left}") from error


def held_bytes(recipe: Recipe) -> int:
    """Bytes of weights, gradients and optimiser state, which a run holds from its first step to its last."""
    held = state_bytes(recipe.model, optimiser=recipe.optimiser.optimiser, bf16=False)
    return sum(held.values())


class Run:
    """A run in memory, just begun or just resumed.

    Attributes:
        step: steps done.
        saved: the step of the newest checkpoint; -1: there is none.
    """

    def __init__(self, recipe: Recipe, out: Path, observer: Observer, process: Process) -> None:
        self.recipe, self.out, self.observer, self.process = recipe, out, observer, process
        data = _where(recipe, out)
        self.tokenizer_folder = data / "tokenizer"
        self.tokenizer = load_tokenizer(self.tokenizer_folder, recipe.model)
        with process.in_turn():
            shards = _open_data(recipe, data, verify=recipe.data.verify and process.leads)
        windows, held_out = split(shards, recipe.sequence_length, recipe.data.held_out)
        batches = Batches(windows=windows, batch=recipe.batch, seed=recipe.seed)
        self._begin(make_model(recipe, process), batches, held_out, file_digest(shards.folder / INDEX))

    def _begin(self, model: Model, batches: Batches, held_out: Rows | None, data_digest: str) -> None:
        """Set up everything else around a model and its data, and go back to the newest checkpoint."""
        recipe, process = self.recipe, self.process
        self.model, self.batches, self.held_out, self.data_digest = model, batches, held_out, data_digest
        self.optimisers = make_optimisers(self.model, recipe.optimiser)
        self.balance = RouterBalance(recipe.router.bias_speed, process.sum)
        self.step = 0
        self.saved = -1
        self._resume()
        if process.leads:
            _write_recipe(recipe, self.out)
        self.rate = matrix_rate(torch.bfloat16 if recipe.precision == "bf16" else torch.float32, process.device)
        self.pace = Pace()
        self.log = Log(self.out / LOG, self.step, tensorboard=recipe.tensorboard) if process.leads else None

    def go(self, until: int) -> Outcome:
        """Step until `until` steps are done or somebody asks to stop; save; export at the end."""
        requests = Requests(self.out)
        if self.process.leads:
            requests.forget_files()
        record: Record | None = None
        signal = None
        with requests.listening():
            while self.step < until and not self.finished():
                record = self.run_step()
                self._measure(record, until)
                due = self.recipe.checkpoint.every
                # What reaches one process holds for all, after the same step.
                signal = self.process.largest(requests.signal or 0) or None
                stop = signal or self.process.largest(self.process.leads and requests.take_stop())
                save = self.process.largest(self.process.leads and requests.take_save())
                self._report(record, until)
                if stop or save or self.step == until or self.finished() or (due and self.step % due == 0):
                    self.save()
                if stop and self.step < until and not self.finished():
                    return Outcome(self.step, record, signal, None)
        try:
            return Outcome(self.step, record, signal, self._export())
        except (FileError, OSError) as error:
            problem = checkpoint.problem_of(error, self.out)
            raise RunError(f"step {self.step} is saved, but not its model: {problem}") from error

    def finished(self) -> bool:
        """Whether the run ends before its last step, for reasons of its own."""
        return False

    def run_step(self) -> Record:
        """One update of the weights; what came of it.

        Raises:
            RunError: loss or gradient is not finite. Nothing has been updated.
        """
        started, worked = time.perf_counter(), time.process_time()
        recipe, process = self.recipe, self.process
        batch = self.batches.batch_at(self.step, rank=process.rank, world=process.world)
        num_targets = process.sum(torch.tensor(int((batch.targets_BT != IGNORE).sum()), device=process.device))
        sums: dict[str, Tensor] = {}
        for micro in micro_batches(batch, recipe.micro_batch, process.device):
            with autocast(recipe, process.device):
                losses = self.losses(micro, num_targets)
            losses.total.backward()  # type: ignore[no-untyped-call]
            self.balance.observe(losses.routings)
            for name, value in losses.parts.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
        parts = dict(zip(sums, process.sum(torch.stack(list(sums.values()))).tolist(), strict=True))
        self._require_finite("loss", parts)
        norm = float(process.clip(self.model, recipe.clip))
        self._require_finite("gradient", {"length": norm})
        lr = recipe.optimiser.lr * lr_factor(self.step, recipe.steps, recipe.schedule)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        resting = self.step >= recipe.router.bias_until * recipe.steps
        self.balance.speed = 0.0 if resting else recipe.router.bias_speed
        self.balance.update(self.model)
        self.step += 1
        seconds = time.perf_counter() - started
        tok_s = recipe.tokens_per_step / seconds
        flops = self.flops_per_token(self.step - 1)
        return {
            "step": self.step,
            "loss": parts.pop("next"),
            **parts,
            "lr": lr,
            "grad_norm": norm,
            "tok_s": tok_s,
            "seconds": seconds,
            "cpu_seconds": time.process_time() - worked,
            "tokens": self.step * recipe.tokens_per_step,
            "flops": recipe.tokens_per_step * flops,
            "utilisation": tok_s * flops / (self.rate * process.world),
            **self._router_statistics(),
        }

    def flops_per_token(self, step: int) -> float:
        """Operations that step `step` (from 0) takes for a token."""
        recipe = self.recipe
        mtp = recipe.losses.at(step, recipe.steps).mtp_weight > 0
        return train_flops(recipe.model, recipe.sequence_length, mtp=mtp).model

    def losses(self, micro: TextBatch, num_targets: Tensor) -> Losses:
        """What a part of a step costs; `num_targets` are the targets of the whole step."""
        settings, rows = self.recipe.losses.at(self.step, self.recipe.steps), self.recipe.batch
        return language_loss(self.model, micro, settings, num_targets=num_targets, num_rows=rows)

    def _router_statistics(self) -> Record:
        layers = self.balance.statistics()
        if not layers:
            return {}
        return {
            "max_vio": sum(load.max_vio for load in layers.values()) / len(layers),
            "dead_experts": sum(load.dead for load in layers.values()),
            "router": {str(layer): load._asdict() for layer, load in layers.items()},
        }

    def _require_finite(self, what: str, values: dict[str, float]) -> None:
        if all(math.isfinite(value) for value in values.values()):
            return
        shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
        last = f"the last checkpoint is of step {self.saved}" if self.saved >= 0 else "no checkpoint was due yet"
        raise RunError(f"step {self.step + 1}: the {what} is not finite ({shown}); nothing was updated, {last}")

    def _measure(self, record: Record, until: int) -> None:
        """Add to a step's record what is due after it: validation, samples, and how long the rest will take."""
        started = time.perf_counter()
        settings, last = self.recipe.validation, self.step == until
        if self.held_out is not None and settings.every and (last or self.step % settings.every == 0):
            with evaluating(self.model, self.recipe):
                record["val_loss"] = validation_loss(self.model, self.held_out, self.recipe, self.process)
            self.process.settle(self.model)
        samples = self.recipe.samples
        if samples.prompts and samples.every and (last or self.step % samples.every == 0):
            say = functools.partial(continue_text, self.model, self.tokenizer, settings=samples, seed=self.recipe.seed)
            with evaluating(self.model, self.recipe):
                record["samples"] = [
                    {"prompt": text, "text": say(prompt=text, process=self.process)} for text in samples.prompts
                ]
            self.process.settle(self.model)
        self.pace.add(record["seconds"] + time.perf_counter() - started)
        record["eta_s"] = self.pace.mean * (until - self.step)

    def _report(self, record: Record, until: int) -> None:
        if self.log is not None:
            self.log.write(record)
            self.observer.step(record, until)

    def save(self) -> None:
        """Save the state as the checkpoint of this step, unless it is saved already.

        Raises:
            RunError: the disk refuses; earlier checkpoints are intact.
        """
        if self.saved == self.step:
            return
        if self.log is not None:
            self.log.sync()
        folder, keep = self.out / CHECKPOINTS, self.recipe.checkpoint.keep
        self.process.save(folder, self.step, self._state(), self._meta(), keep=keep)
        self.saved = self.step

    def _state(self) -> checkpoint.State:
        return state.gather(self.model, self.optimisers, self.process)

    def _meta(self) -> dict[str, Any]:
        return {"recipe": flatten(self.recipe), "data": self.data_digest, "torch": torch.__version__}

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def _resume(self) -> None:
        saved = self.process.newest(self.out / CHECKPOINTS, self.observer.note)
        if saved is None:
            return
        _check_same(saved, self.recipe, self.data_digest, self.observer.note)
        state.restore(saved, self.model, self.optimisers, self.process)
        self._restored(saved)
        self.step = self.saved = saved.step
        self.observer.note(f"going on after step {saved.step}")

    def _restored(self, saved: checkpoint.Saved) -> None:
        """Take what else a checkpoint holds."""

    def _export(self) -> Path | None:
        """Write the finished model. Of several processes the first does, from the checkpoint that all have written."""
        with self.process.in_turn():
            if self.process.leads:
                if self.process.world == 1:
                    model = as_checkpoint(self.model)
                else:
                    path = checkpoint.path_of(self.out / CHECKPOINTS, self.step)
                    saved = checkpoint.open_saved(path, self.step, verify=False)
                    model = saved_model(saved, self.recipe.model)
                export(model, self.tokenizer_folder, self.out / MODEL, dtype=self.recipe.export_dtype)
        return self.out / MODEL


class Pace:
    """Seconds of a step, averaged so that the last ten count most."""

    def __init__(self) -> None:
        self.mean = 0.0
        self._count = 0

    def add(self, seconds: float) -> None:
        self._count += 1
        self.mean += (seconds - self.mean) / min(self._count, 10)


@contextlib.contextmanager
def claim(recipe: Recipe, out: Path) -> Any:
    """Hold the run's folder, having made sure that it is one, or free to become one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(out, f"cannot be written: {error.strerror}") from error
    with sole_user(out):
        if not (out / RECIPE).exists():
            for name in (CHECKPOINTS, MODEL, ADAPTER, DATA, LOG):
                if (out / name).exists():
                    raise FileError(out / name, f"is here without a {RECIPE}; choose a folder of no other use")
            _write_recipe(recipe, out)
        checkpoint.clear_leftovers(out)
        checkpoint.clear_leftovers(out / CHECKPOINTS)
        yield


def _write_recipe(recipe: Recipe, out: Path) -> None:
    with atomic_file(out / RECIPE) as file:
        file.write(orjson.dumps(flatten(recipe), option=orjson.OPT_INDENT_2))


def _where(recipe: Recipe, out: Path) -> Path:
    return Path(recipe.data.folder).expanduser() if recipe.data.folder is not None else out / DATA


def _prepare_data(recipe: Recipe, out: Path, prepare: Prepare | None, observer: Observer) -> None:
    """Make the run's data if the recipe brings its own and it is not there yet."""
    folder = _where(recipe, out)
    if recipe.data.folder is None and not folder.exists():
        if prepare is None:
            raise ConfigError("data.folder", "is needed: this recipe does not make its own data")
        observer.note("preparing the data")
        with atomic_folder(folder) as fresh:
            prepare(fresh, recipe)


def _open_data(recipe: Recipe, folder: Path, *, verify: bool) -> Shards:
    digest = file_digest(folder / "tokenizer" / "tokenizer.json")
    shards = open_shards(folder / "tokens", vocab_size=recipe.model.vocab_size, tokenizer_digest=digest)
    if verify:
        shards.verify()
    return shards


def _check_same(saved: checkpoint.Saved, recipe: Recipe, data_digest: str, note: Callable[[str], None]) -> None:
    """Refuse to go on with other data or another network; say what else has changed."""
    if saved.meta.get("data") != data_digest:
        raise ConfigError(
            "data.folder", f"holds other tokens than the run in {saved.path.parent.parent} was begun with"
        )
    before, now = saved.meta.get("recipe", {}), flatten(recipe)
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key.startswith(FIXED):
            raise ConfigError(key, f"is {new!r}, but the run in {saved.path.parent.parent} was begun with {old!r}")
        note(f"changed since step {saved.step}: {key} from {old!r} to {new!r}")
