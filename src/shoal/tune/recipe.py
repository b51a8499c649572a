"""What a tuning run is: a training recipe plus where it starts from, what it learns, and which weights it moves."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.errors import ConfigError
from shoal.train.recipe import Recipe, flag, number, one_of, whole
from shoal.tune.adapters import SCALE
from shoal.tune.placement import EXPERT_SHARE, PROBES

METHODS = ("adapters", "lora", "full")


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Attributes:
    model: the folder or GGUF file to start from.
    data: a file of examples (`tune.examples`), of the shape `format`.
    validation: another file that is never learnt from; none: the share `held_out` of the examples.
    method: `adapters` placed by routing and gradient (`tune.placement`), `lora` of one rank on every matrix whose name
        ends in one of `targets`, or `full` for all weights.
    budget: most parameters that adapters may train, as a share (`0.3%`) or a count.
    base: `keep` the frozen weights in floating point, or hold them in `int8` or `int4`.
    scale: what an adapter's product is multiplied by. Adam moves B equally far whatever the scale, so a larger one is a
        larger learning rate of B than of A (LoRA+, arXiv 2402.12354).
    probe_rows: packed rows that the placement looks at.
    probes: the highest rank that it gives.
    expert_share: share of a layer's gate weight whose experts may get adapters.
    patience: validations without improvement that end the run (0: never).
    keep_best: keep the weights of the best validation in every checkpoint, and write those at the end, not the last.
    """

    model: str
    data: str
    format: str = "auto"
    validation: str | None = None
    held_out: float = 0.05
    method: str = "adapters"
    budget: str = "0.3%"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    base: str = "keep"
    scale: float = SCALE
    probe_rows: int = 16
    probes: int = PROBES
    expert_share: float = EXPERT_SHARE
    patience: int = 0
    keep_best: bool = True

    def __post_init__(self) -> None:
        one_of("tune.method", self.method, METHODS)
        one_of("tune.base", self.base, ("keep", "int8", "int4"))
        number("tune.held_out", self.held_out, 0.0, 0.9)
        number("tune.scale", self.scale, 1e-3, 1e3)
        number("tune.expert_share", self.expert_share, 0.0, 1.0)
        whole("tune.probe_rows", self.probe_rows, 1, 1 << 16)
        whole("tune.probes", self.probes, 1, 1 << 10)
        whole("tune.patience", self.patience, 0, 1 << 20)
        flag("tune.keep_best", self.keep_best)
        if self.method == "full" and self.base != "keep":
            raise ConfigError("tune.base", f"{self.base!r} cannot be trained in full; tune adapters on it")


@dataclass(frozen=True, kw_only=True)
class TuneRecipe(Recipe):
    """A complete tuning run. Of the training settings, `data.*` has no meaning here, and `compile` is refused."""

    tune: TuneSettings = field(default_factory=lambda: TuneSettings(model="", data=""))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile:
            raise ConfigError("compile", "is for training from text; adapters and frozen weights run as they are")
