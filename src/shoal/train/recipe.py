"""What a training run is: one frozen value that says everything, made by a Python function, changed by dotted keys.

A recipe lives in `recipes/<name>/recipe.py` with a function `recipe() -> Recipe` and, where it makes its own data, a
function `prepare(folder: Path, recipe: Recipe) -> None` that fills an empty folder with `tokens/` (token shards) and
`tokenizer/` (`tokenizer.json` and its companions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.train.losses import LossSettings
from shoal.train.optim import OptimiserSettings

PRECISIONS = ("bf16", "fp32")
SCHEDULES = ("wsd", "cosine", "constant")
MAX_COUNT = 1 << 40


def whole(name: str, value: object, low: int, high: int = MAX_COUNT) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(name, f"must be a whole number from {low} to {high}, got {value!r}")


def number(name: str, value: object, low: float, high: float) -> None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(name, f"must be a number from {low:g} to {high:g}, got {value!r}")


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(name, f"{value!r} is not one of {', '.join(choices)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(name, f"must be true or false, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the tokens come from.

    Attributes:
        folder: holds `tokens/` and `tokenizer/`; None: the run's own `data/`, which the recipe prepares.
        held_out: share of the tokens that training never sees, taken from whole documents at the end.
        verify: compare all files with their digests before the first step.
    """

    folder: str | None = None
    held_out: float = 0.02
    verify: bool = True

    def __post_init__(self) -> None:
        number("data.held_out", self.held_out, 0.0, 0.9)
        flag("data.verify", self.verify)
        if self.folder is not None and (not isinstance(self.folder, str) or not self.folder):
            raise ConfigError("data.folder", f"must be a path, got {self.folder!r}")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How the learning rate rises and falls: see `schedule.lr_factor`.

    Attributes:
        kind: `wsd` (warm-up, stable, decay), `cosine`, or `constant` after the warm-up.
        warmup: steps until the peak.
        decay: share of all steps that the decay of `wsd` takes.
        floor: what remains of the peak at the end.
    """

    kind: str = "wsd"
    warmup: int = 100
    decay: float = 0.2
    floor: float = 0.0

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, SCHEDULES)
        whole("schedule.warmup", self.warmup, 0)
        number("schedule.decay", self.decay, 0.0, 1.0)
        number("schedule.floor", self.floor, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """Keeping the experts busy without a loss (DeepSeek-V3 §2.1.2).

    Attributes:
        bias_speed: γ, how far a step moves the selection bias of an expert. Published: 0.001.
        bias_until: share of the steps after which the biases rest. Published: 0.966.
    """

    bias_speed: float = 1e-3
    bias_until: float = 1.0

    def __post_init__(self) -> None:
        number("router.bias_speed", self.bias_speed, 0.0, 1.0)
        number("router.bias_until", self.bias_until, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When the state is saved, besides the end. `every` counts steps (0: never), `keep` the newest that stay."""

    every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        whole("checkpoint.every", self.every, 0)
        whole("checkpoint.keep", self.keep, 1, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """The loss on held-out tokens, every `every` steps (0: never) and at the end, over `sequences` of them."""

    every: int = 200
    sequences: int = 32

    def __post_init__(self) -> None:
        whole("validation.every", self.every, 0)
        whole("validation.sequences", self.sequences, 1)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Continuations of `prompts`, written to the log every `every` steps (0: never) and at the end; greedy at 0."""

    prompts: tuple[str, ...] = ()
    every: int = 200
    max_tokens: int = 48
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not all(isinstance(prompt, str) and prompt for prompt in self.prompts):
            raise ConfigError("samples.prompts", f"must be texts, got {self.prompts!r}")
        whole("samples.every", self.every, 0)
        whole("samples.max_tokens", self.max_tokens, 1, 1 << 20)
        number("samples.temperature", self.temperature, 0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How several processes, started by `torchrun`, share a run. Weights and optimiser state are cut over all of them.

    Attributes:
        expert: processes that deal the experts of a layer out among them; tokens travel to the experts' owners.
        timeout: seconds that a process waits for another in the middle of a step before it ends the run.
    """

    expert: int = 1
    timeout: float = 600.0

    def __post_init__(self) -> None:
        whole("parallel.expert", self.expert, 1, 1 << 20)
        number("parallel.timeout", self.timeout, 1.0, 1e6)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete run.

    Attributes:
        steps: optimiser steps; the schedule is laid out over them.
        sequence_length: tokens of a sequence, T.
        batch: sequences of a step, over all processes.
        micro_batch: sequences that a process runs at once; a step adds up as many passes as it needs.
        precision: `bf16`: products in bfloat16 over float32 master weights; `fp32`: all in float32.
        clip: longest gradient of a step; 0 leaves it as it is.
        activation_checkpointing: forget the activations of a layer and make them again in the backward pass.
        compile: `torch.compile` the layers. Pays after some hundred steps.
        tensorboard: write the log for TensorBoard too (the `tensorboard` extra).
        export_dtype: of the finished model on disk.
    """

    model: ModelConfig
    steps: int
    sequence_length: int = 512
    batch: int = 16
    micro_batch: int = 8
    seed: int = 0
    precision: str = "bf16"
    clip: float = 1.0
    activation_checkpointing: bool = False
    compile: bool = False
    tensorboard: bool = False
    export_dtype: str = "bfloat16"
    data: DataSettings = field(default_factory=DataSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    losses: LossSettings = field(default_factory=LossSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1)
        whole("sequence_length", self.sequence_length, 2, self.model.max_position_embeddings)
        whole("batch", self.batch, 1)
        whole("micro_batch", self.micro_batch, 1)
        whole("seed", self.seed, 0, (1 << 63) - 1)
        if self.batch % self.micro_batch:
            raise ConfigError("micro_batch", f"{self.micro_batch} does not divide the batch of {self.batch}")
        one_of("precision", self.precision, PRECISIONS)
        one_of("export_dtype", self.export_dtype, ("bfloat16", "float16", "float32"))
        number("clip", self.clip, 0.0, 1e6)
        for name in ("activation_checkpointing", "compile", "tensorboard"):
            flag(name, getattr(self, name))
        if self.schedule.warmup > self.steps:
            raise ConfigError("schedule.warmup", f"{self.schedule.warmup} exceeds the {self.steps} steps")
        if self.model.num_nextn_predict_layers >= self.sequence_length - 1:
            raise ConfigError("sequence_length", f"{self.sequence_length} leaves the MTP layers nothing to predict")
        experts = 1 if self.model.moe is None else self.model.moe.n_routed_experts
        if experts % self.parallel.expert:
            raise ConfigError("parallel.expert", f"{self.parallel.expert} does not divide {experts} experts evenly")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens that the whole run reads."""
        return self.steps * self.tokens_per_step

    def check_world(self, world: int) -> None:
        """Raise ConfigError unless `world` processes can share experts, and a batch in whole micro-batches."""
        if world % self.parallel.expert:
            one = "needs as many processes; start them with torchrun --nproc-per-node"
            problem = one if world == 1 else f"does not divide {world} processes"
            raise ConfigError("parallel.expert", f"{self.parallel.expert} {problem}")
        if self.batch % (world * self.micro_batch):
            problem = f"{self.batch} is not shared evenly by {world} processes of micro_batch {self.micro_batch}"
            raise ConfigError("batch", problem)


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Every setting under its dotted key, in order: what `--dry-run` prints and checkpoints keep."""
    out: dict[str, object] = {}
    for one in fields(value):  # type: ignore[arg-type]
        inner, name = getattr(value, one.name), prefix + one.name
        if is_dataclass(inner):
            out.update(flatten(inner, f"{name}."))
        else:
            out[name] = list(inner) if isinstance(inner, tuple) else inner
    return out
