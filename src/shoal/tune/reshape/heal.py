"""Bring a reshaped model back to the one it was made from: a short distillation of the whole model.

The loss is the Kullback-Leibler divergence of the student's next-token distribution from the teacher's, over the whole
vocabulary, at every position. Only the attention moves by default; everything else is the teacher's own and fits the
teacher's states. Steps are in proportion to the size of each weight matrix, as in `fit`.

A run can be killed at any time and goes on where its last saved step left it, bit for bit: the order of the windows is
a function of the seed, and the state on disk (weights, Adam's moments, the step) appears whole or not at all.

Letters: B windows, T tokens, X = B · T, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ConfigError, FileError
from shoal.formats.checkpoint import Checkpoint
from shoal.formats.safetensors import SafetensorsFile, array_spec, write_safetensors
from shoal.model import Model, load_model
from shoal.tune.reshape.fit import groups, hold_constants, moving
from shoal.tune.reshape.layer import mla_of
from shoal.tune.reshape.tensors import with_tensors

CHUNK = 256  # positions whose logits are in memory at a time
STATE = "heal.safetensors"
BETAS, EPSILON = (0.9, 0.95), 1e-8


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """`steps` of `batch` windows. `lr` is the largest step beside the size of a matrix; it warms up over a twentieth of
    the run and falls to a tenth along a cosine. `bfloat16` multiplies in that type, twice as fast where processors
    have it. Every `save_every` steps the state is saved."""

    steps: int
    batch: int = 2
    lr: float = 1e-3
    seed: int = 0
    clip: float = 1.0
    bfloat16: bool = False
    save_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) <= 100:
                raise ConfigError(name, f"must lie between 0 and 100, got {getattr(self, name)}")


class HealStep(NamedTuple):
    """After a step: its number from 1, its divergence in nats a token, and the size of the gradient before clipping."""

    step: int
    kl: float
    gradient: float


def heal(
    teacher: Model,
    reshaped: Checkpoint,
    windows: Sequence[Sequence[int]],
    settings: HealSettings,
    *,
    state: Path | None = None,
    report: Callable[[HealStep], None] | None = None,
) -> Checkpoint:
    """The reshaped checkpoint with its attention distilled from the teacher.

    Args:
        teacher: the model that was reshaped, in float32.
        windows: token ids, all of one length, gone through in a new random order each time.
        state: a folder for the state of the run; a run that finds one goes on from it.

    Raises:
        FileError: the state in `state` belongs to another run.
    """
    if reshaped.config.vocab_size != teacher.config.vocab_size:
        raise ConfigError("vocab_size", "differs between teacher and student")
    student = load_model(reshaped).requires_grad_(False)
    params = _moving(student)
    optimiser = torch.optim.Adam(groups(params.values(), settings.lr), betas=BETAS, eps=EPSILON)
    tokens_BT = torch.tensor([list(window) for window in windows])
    facts = {"settings": _facts(settings), "text": hashlib.sha256(tokens_BT.numpy().tobytes()).hexdigest()}
    done = _restore(state, params, optimiser, facts) if state is not None else 0
    for step in range(done, settings.steps):
        _set_rate(optimiser, settings, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            kl = _backward(teacher, student, tokens_BT[_rows(len(tokens_BT), settings, step)])
        for layer in range(student.config.num_hidden_layers):
            hold_constants(mla_of(student, layer))
        gradient = float(nn.utils.clip_grad_norm_(params.values(), settings.clip))
        if not math.isfinite(kl + gradient):
            raise ConfigError("lr", f"step {step + 1} is not finite; try less than {settings.lr}")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if report is not None:
            report(HealStep(step + 1, kl, gradient))
        if state is not None and ((step + 1) % settings.save_every == 0 or step + 1 == settings.steps):
            _save(state, params, optimiser, facts, step + 1)
    made = {name: value.detach() for name, value in params.items()}
    return with_tensors(reshaped, reshaped.config, made)


def _moving(student: Model) -> dict[str, nn.Parameter]:
    """The attention's projections, by name."""
    out = {}
    for layer in range(student.config.num_hidden_layers):
        for name, parameter in moving(mla_of(student, layer)).items():
            parameter.requires_grad_(True)
            out[f"model.layers.{layer}.self_attn.{name}"] = parameter
    return out


def _backward(teacher: Model, student: Model, tokens_BT: Tensor) -> float:
    """Gradients of the mean divergence; logits are made a chunk at a time and turned into gradients at once."""
    with torch.no_grad():
        wanted_XD = teacher.states(tokens_BT).hidden_BTD.flatten(0, 1)
    hidden_BTD = student.states(tokens_BT).hidden_BTD
    hidden_XD = hidden_BTD.detach().flatten(0, 1).requires_grad_(True)
    total = 0.0
    for start in range(0, len(hidden_XD), CHUNK):
        rows = slice(start, start + CHUNK)
        with torch.no_grad():
            goal_XV = teacher.logits(wanted_XD[rows]).float().log_softmax(-1)
        made_XV = student.logits(hidden_XD[rows]).float().log_softmax(-1)
        loss = F.kl_div(made_XV, goal_XV, reduction="sum", log_target=True) / len(hidden_XD)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    hidden_BTD.backward(hidden_XD.grad.view_as(hidden_BTD))  # type: ignore[union-attr,no-untyped-call]
    return total


def _rows(count: int, settings: HealSettings, step: int) -> Tensor:
    """The windows of a step: passes over all of them, each in an order of its own."""
    per_pass = max(1, count // settings.batch)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step // per_pass)
    start = step % per_pass * settings.batch
    return torch.randperm(count, generator=generator)[start : start + settings.batch]


def _set_rate(optimiser: torch.optim.Optimizer, settings: HealSettings, step: int) -> None:
    warm = max(1, settings.steps // 20)
    along = max(0.0, step - warm) / max(1, settings.steps - warm)
    share = (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * along))
    for group in optimiser.param_groups:
        group["lr"] = group["full_lr"] * share


def _save(
    state: Path, params: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, facts: dict[str, str], step: int
) -> None:
    state.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Tensor] = {}
    for name, parameter in params.items():
        moments = optimiser.state[parameter]
        arrays |= {
            name: parameter.detach(),
            f"{name}.first": moments["exp_avg"],
            f"{name}.second": moments["exp_avg_sq"],
        }
    rates = {name: group["full_lr"] for name, group in zip(params, optimiser.param_groups, strict=True)}
    specs = [array_spec(name, value.contiguous().numpy()) for name, value in arrays.items()]
    write_safetensors(state / STATE, specs, metadata={**facts, "step": str(step), "rates": json.dumps(rates)})


def _restore(
    state: Path, params: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, facts: dict[str, str]
) -> int:
    """Steps already done."""
    path = state / STATE
    if not path.exists():
        return 0
    file = SafetensorsFile(path)
    if not {"settings", "step", "rates"} <= file.metadata.keys():
        raise FileError(path, "is no state of a healing run")
    for name, value in facts.items():
        if file.metadata.get(name, value) != value:
            raise FileError(path, f"belongs to a run with other {name}; remove it or name another folder")
    step = int(file.metadata["step"])
    rates = json.loads(file.metadata["rates"])
    for (name, parameter), group in zip(params.items(), optimiser.param_groups, strict=True):
        if name not in file.entries or file.entries[name].shape != tuple(parameter.shape):
            raise FileError(path, "belongs to a model of another shape", item=name)

        def read(key: str) -> Tensor:
            return torch.from_numpy(np.array(file.view(key), np.float32))

        with torch.no_grad():
            parameter.copy_(read(name))
        optimiser.state[parameter] = {
            "step": torch.tensor(float(step)), "exp_avg": read(f"{name}.first"), "exp_avg_sq": read(f"{name}.second"),
        }  # fmt: skip
        group["full_lr"] = rates[name]
    return step


def _facts(settings: HealSettings) -> str:
    """What must be the same for a run to go on."""
    return json.dumps({name: value for name, value in asdict(settings).items() if name != "save_every"}, sort_keys=True)
