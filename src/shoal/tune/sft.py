"""Supervised tuning: the training loop, begun from a model that is there, on packed examples, moving what was chosen.

Everything that keeps a run safe is the loop's own (`train.loop`): checkpoints that survive a kill, signals, the log,
resuming. A checkpoint of adapters holds the adapters and their optimiser; the base is read from where it came from.

DIR gets `adapter/` (a PEFT folder) or, after full tuning, `model/` (a Hugging Face folder).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoal import hub
from shoal.errors import ConfigError, FileError
from shoal.formats.adapter import save_adapter
from shoal.formats.atomic import atomic_file
from shoal.formats.checkpoint import Checkpoint, open_checkpoint
from shoal.formats.digest import file_digest
from shoal.formats.hf_config import read_json
from shoal.formats.hf_save import save_folder
from shoal.formats.layout import count_params
from shoal.formats.tokenizer import check_fits
from shoal.model import Model, as_checkpoint, load_model
from shoal.train import state
from shoal.train.batches import Batch, Batches, permute
from shoal.train.checkpoint import Saved, State, steps_in
from shoal.train.evaluate import NEXT_ONLY
from shoal.train.log import Record
from shoal.train.loop import ADAPTER, CHECKPOINTS, MODEL, Observer, Outcome, Run, claim, held_bytes
from shoal.train.losses import language_loss
from shoal.train.network import recompute_layers
from shoal.train.optim import OptimiserSettings
from shoal.train.process import Process
from shoal.train.recipe import (
    CheckpointSettings,
    DataSettings,
    RouterSettings,
    ScheduleSettings,
    ValidationSettings,
)
from shoal.train.replace import replaced
from shoal.train.tensors import autocast, to_device
from shoal.tune.adapters import as_adapter, attach, factors_of, targets
from shoal.tune.examples import Example, read_examples
from shoal.tune.frozen import BITS, GROUP, load_base
from shoal.tune.placement import parse_budget, place, probe, summarise, uniform_ranks
from shoal.tune.recipe import TuneRecipe, TuneSettings
from shoal.tune.tokens import Report, Rows, encode_examples, pack

PLACEMENT = "placement.json"
LEARNING_RATES = {"adapters": 1e-3, "lora": 1e-3, "full": 5e-5}


def default_recipe(checkpoint: Checkpoint, settings: TuneSettings) -> TuneRecipe:
    """Settings that suit tuning on a modest machine. `settle` lays them out over the data."""
    return TuneRecipe(
        model=checkpoint.config,
        steps=1 << 30,
        sequence_length=min(1024, checkpoint.config.max_position_embeddings),
        batch=8,
        micro_batch=2,
        data=DataSettings(held_out=0.0),
        optimiser=OptimiserSettings(lr=LEARNING_RATES[settings.method], beta2=0.99, weight_decay=0.0),
        schedule=ScheduleSettings(kind="cosine", warmup=0),
        losses=replace(NEXT_ONLY, balance_weight=1e-4 if checkpoint.config.moe else 0.0),
        router=RouterSettings(bias_speed=0.0),
        checkpoint=CheckpointSettings(every=50),
        validation=ValidationSettings(every=50, sequences=64),
        tune=settings,
    )


class Data:
    """The examples of a run as rows, and what they came from.

    Raises:
        FileError: a file is missing or a line is bad.
        ConfigError: nothing is left to learn from.
    """

    def __init__(self, recipe: TuneRecipe, checkpoint: Checkpoint) -> None:
        self.tokenizer = checkpoint.load_tokenizer()
        check_fits(self.tokenizer, checkpoint.config.vocab_size)
        self.chat = checkpoint.load_chat()
        self.ends = checkpoint.config.eos_token_id
        tune = recipe.tune
        examples = read_examples(tune.data, shape=tune.format)
        if tune.validation is not None:
            held_out, where = read_examples(tune.validation, shape=tune.format), tune.validation
        else:
            examples, held_out = hold_out(examples, tune.held_out, recipe.seed)
            where = tune.data
        self.rows, self.report = self._rows(examples, tune.data, recipe.sequence_length)
        kept = self._rows(held_out, where, recipe.sequence_length)[0]
        if not len(self.rows) or (tune.validation is not None and not len(kept)):
            empty = where if len(self.rows) else tune.data
            raise ConfigError("sequence_length", f"{recipe.sequence_length} leaves no answer in {empty}")
        self.held_out = kept if len(kept) else None
        digests = (bytes.fromhex(file_digest(Path(path))) for path in (tune.data, where))
        self.digest = hashlib.sha256(b"".join(digests)).hexdigest()

    def _rows(self, examples: list[Example], where: str, length: int) -> tuple[Rows, Report]:
        sequences, report = encode_examples(
            examples, self.tokenizer, self.chat, where=where, max_tokens=length, ends=self.ends
        )
        return pack(sequences, length, pad=self.tokenizer.pad_token_id or 0), report


def hold_out(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and examples never learnt from, drawn by `seed`; none of the latter from fewer than 10."""
    count = round(share * len(examples)) if len(examples) >= 10 else 0
    chosen = {permute(i, len(examples), f"{seed}/held out") for i in range(count)}
    return (
        [example for i, example in enumerate(examples) if i not in chosen],
        [example for i, example in enumerate(examples) if i in chosen],
    )


AnyTune = TypeVar("AnyTune", bound=TuneRecipe)


def settle(recipe: AnyTune, data: Data, *, steps: int | None, epochs: float) -> AnyTune:
    """The recipe laid out over `steps`, or over `epochs` of the data where nobody said a number."""
    if steps is None:
        steps = recipe.steps if recipe.steps < 1 << 30 else math.ceil(epochs * len(data.rows) / recipe.batch)
    steps = max(1, steps)
    warmup = recipe.schedule.warmup or min(20, steps // 10)
    return replace(recipe, steps=steps, schedule=replace(recipe.schedule, warmup=warmup))


def tune(recipe: TuneRecipe, out: Path, data: Data, observer: Observer, *, until: int | None = None) -> Outcome:
    """Start a tuning run in `out`, or go on with the one that is there.

    Raises:
        ConfigError, FileError, RunError: as `train.loop.train`.
    """
    Process().begin(recipe)
    with claim(recipe, out):
        run = TuneRun(recipe, out, data, observer)
        try:
            return run.go(recipe.steps if until is None else min(until, recipe.steps))
        finally:
            run.close()


def base_bytes(recipe: TuneRecipe) -> int:
    """Bytes of the frozen weights, at the least."""
    whole = 2.0 if recipe.precision == "bf16" else 4.0
    each = BITS[recipe.tune.base] / 8 + 2 / GROUP if recipe.tune.base in BITS else whole
    return int(count_params(recipe.model) * each)


class TuneRun(Run):
    """A tuning run in memory.

    Attributes:
        best: the weights of the best validation so far, and its loss.
    """

    def __init__(self, recipe: TuneRecipe, out: Path, data: Data, observer: Observer) -> None:
        self.recipe: TuneRecipe = recipe
        self.out, self.observer, self.process = out, observer, Process()
        self.tokenizer, self.data = data.tokenizer, data
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.waited = math.inf, 0
        self.source = open_checkpoint(hub.resolve(recipe.tune.model))
        if self.source.config != recipe.model:
            raise ConfigError("model", f"is not that of {recipe.tune.model}, whose settings tuning cannot change")
        self.process.require_memory(held_bytes(recipe) if recipe.tune.method == "full" else base_bytes(recipe))
        model = self._model()
        if recipe.activation_checkpointing:
            recompute_layers(model)
        batches = Batches(windows=data.rows, batch=recipe.batch, seed=recipe.seed)
        self._begin(model, batches, data.held_out, data.digest)

    def flops_per_token(self, step: int) -> float:
        whole = super().flops_per_token(step)
        # With adapters no gradient of the base's weights is made.
        return whole if self.recipe.tune.method == "full" else whole * 2 / 3

    def _model(self) -> Model:
        recipe, tune = self.recipe, self.recipe.tune
        if tune.method == "full":
            return self.process.wrap(load_model(self.source))
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        model = self.process.wrap(load_base(self.source, weights=tune.base, dtype=dtype))
        if tune.base != "keep":
            attach(model, {})  # a stack in few bits runs expert by expert only
        shapes = targets(model)
        budget = parse_budget(tune.budget, count_params(recipe.model))
        path = self.out / PLACEMENT
        generator = torch.Generator().manual_seed(recipe.seed)
        if path.exists() and steps_in(self.out / CHECKPOINTS):
            # An earlier start has placed them, and their values come from the checkpoint.
            attach(model, _read_placement(path), scale=tune.scale)
            return model.to(self.process.device)
        if tune.method == "lora":
            torch.manual_seed(recipe.seed)
            attach(model, uniform_ranks(shapes, budget, tune.targets), scale=tune.scale)
        else:
            self.observer.note(f"placing {budget} parameters")
            batches = self._probe_batches(generator)
            probed = probe(
                model,
                lambda: self._backward(model, batches),
                lambda: self._shares(model, batches),
                probes=tune.probes,
                expert_share=tune.expert_share,
            )
            place(model, probed, budget, scale=tune.scale)
        factors = factors_of(model)
        with atomic_file(path) as file:
            kinds = summarise(factors)
            ranks = {target: one.ranks for target, one in factors.items()}
            file.write(json.dumps({"budget": budget, "kinds": kinds, "ranks": ranks}, indent=1).encode())
        return model.to(self.process.device)

    def _probe_batches(self, generator: torch.Generator) -> list[Batch]:
        rows, size = self.data.rows, self.recipe.micro_batch
        order = torch.randperm(len(rows), generator=generator)[: self.recipe.tune.probe_rows].tolist()
        return [rows.read(order[start : start + size]) for start in range(0, len(order), size)]

    def _backward(self, model: Model, batches: list[Batch]) -> None:
        total = sum(int((batch.targets_BT != -100).sum()) for batch in batches)
        for batch in batches:
            with autocast(self.recipe, self.process.device):
                loss = language_loss(model, to_device(batch, self.process.device), NEXT_ONLY, num_targets=total).total
            loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _shares(self, model: Model, batches: list[Batch]) -> dict[int, Tensor]:
        """The share of the gate weight that each expert gets, by layer, over the examples' tokens."""
        sums: dict[int, Tensor] = {}
        for batch in batches if model.config.moe else []:
            tokens, _, documents = to_device(batch, self.process.device)
            assert documents is not None
            with autocast(self.recipe, self.process.device):
                routings = model.states(tokens, documents_BT=documents).routings
            used = (documents >= 0).flatten()
            for layer, routing in routings.items():
                sums.setdefault(layer, torch.zeros(routing.scores_TE.shape[1])).index_add_(
                    0, routing.indices_TK[used].flatten().cpu(), routing.weights_TK[used].flatten().float().cpu()
                )
        return {layer: sum_E / sum_E.sum() for layer, sum_E in sums.items()}

    # ---- validation decides what is kept

    def _measure(self, record: Record, until: int) -> None:
        super()._measure(record, until)
        loss = record.get("val_loss")
        if loss is None:
            return
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            if self.recipe.tune.keep_best:
                self.best = {name: value.detach().clone() for name, value in state.changing(self.model).items()}
        else:
            self.waited += 1
        record["best_loss"] = self.best_loss

    def finished(self) -> bool:
        return 0 < self.recipe.tune.patience <= self.waited

    def _state(self) -> State:
        return {**super()._state(), **({"best": self.best} if self.best else {})}

    def _meta(self) -> dict[str, Any]:
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {**super()._meta(), "best_loss": best, "waited": self.waited}

    def _restored(self, saved: Saved) -> None:
        if "best" in saved.parts:
            self.best = saved.tensors("best")
        if saved.meta["best_loss"] is not None:
            self.best_loss = float(saved.meta["best_loss"])
        self.waited = int(saved.meta["waited"])

    def _export(self) -> Path:
        """Write the best weights that a validation saw, or the last ones if there was none."""
        if self.best:
            with torch.no_grad():
                for name, value in state.changing(self.model).items():
                    value.copy_(self.best[name])
        if self.recipe.tune.method == "full":
            checkpoint = as_checkpoint(self.model, like=self.source)
            with replaced(self.out / MODEL) as fresh:
                save_folder(checkpoint, fresh, dtype=self.recipe.export_dtype)
            return self.out / MODEL
        with replaced(self.out / ADAPTER) as fresh:
            save_adapter(as_adapter(factors_of(self.model), base=self.recipe.tune.model), self.recipe.model, fresh)
        return self.out / ADAPTER


def _read_placement(path: Path) -> Mapping[str, tuple[int, ...]]:
    try:
        return {target: tuple(int(rank) for rank in each) for target, each in read_json(path)["ranks"].items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        raise FileError(path, "is damaged; remove it with the run's checkpoints to start anew") from None
