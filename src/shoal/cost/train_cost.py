"""What a training run takes: operations, hours of a named machine, dollars; and after a run, what it really took.

Time is operations / (peak · utilisation). The utilisation is stated, never fitted here: each machine of the list has
one with its source, a flag changes it, and a finished run tells its own. It is a share of the *bf16* peak also where
products run in FP8, because that is how published runs state it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

import orjson

from shoal.config import ModelConfig
from shoal.cost.machines import Machine
from shoal.cost.train_flops import TrainFlops, train_flops
from shoal.errors import ConfigError, FileError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_PHASE = re.compile(r"([0-9_]+(?:\.[0-9]+)?(?:e[0-9]+)?)([kmbt]?)(?:@([0-9_]+))?", re.I)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training: `tokens` in all, in sequences of `sequence_length`; `mtp`: the MTP depths learn too."""

    tokens: float
    sequence_length: int
    mtp: bool = True


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What a phase takes. `hours` are those of one device, all devices together."""

    phase: Phase
    per_token: TrainFlops
    flops: float
    hours: float
    dollars: float


@dataclass(frozen=True, kw_only=True)
class Actual:
    """What a run's log says: steps and tokens so far, seconds of training, median rates and the newest losses.

    `flop_s` counts the operations of each step as it was, with resting MTP depths or without; None in older logs.
    """

    steps: int
    tokens: float
    seconds: float
    tok_s: float
    flop_s: float | None
    loss: float
    val_loss: float | None


def parse_phase(text: str, sequence_length: int) -> Phase:
    """`14.8T`, `62.9B@32768`, `3e7`: tokens, and after the @ how long the sequences are.

    Raises:
        ConfigError: it is not of that form, or not positive.
    """
    found = _PHASE.fullmatch(text.strip())
    if not found:
        raise ConfigError("tokens", f"{text!r} is no number of tokens such as 14.8T, 30M or 62.9B@32768")
    tokens = float(found[1].replace("_", "")) * UNITS[found[2].lower()]
    length = int(found[3].replace("_", "")) if found[3] else sequence_length
    if not 1 <= tokens <= 1e18 or not 1 <= length <= 1 << 30:
        raise ConfigError("tokens", f"{text!r} is out of range")
    return Phase(tokens=tokens, sequence_length=length)


def phase_cost(
    config: ModelConfig,
    phase: Phase,
    machine: Machine,
    *,
    utilisation: float | None = None,
    dollars_per_hour: float | None = None,
    checkpointing: bool = False,
) -> PhaseCost:
    """The cost of a phase on `machine`, whose utilisation and price count unless others are given.

    The utilisation is of the operations that the mathematics asks for; recomputing takes time of its own.

    Raises:
        ConfigError: a utilisation outside 0 … 1 or a negative price.
    """
    share = machine.utilisation if utilisation is None else utilisation
    price = machine.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    if not 0 < share <= 1:
        raise ConfigError("utilisation", f"must lie between 0 and 1, got {share!r}")
    if not 0 <= price < math.inf:
        raise ConfigError("dollars_per_hour", f"must be at least 0, got {price!r}")
    per_token = train_flops(config, phase.sequence_length, checkpointing=checkpointing, mtp=phase.mtp)
    flops = per_token.hardware * phase.tokens
    hours = flops / (machine.bf16_tflops * 1e12 * share) / 3600
    return PhaseCost(phase=phase, per_token=per_token, flops=flops, hours=hours, dollars=hours * price)


def hours_for(costs: Sequence[PhaseCost], tokens: float) -> float:
    """Device hours of the first `tokens` of a run of these phases; past its end the last phase goes on."""
    hours = 0.0
    for number, cost in enumerate(costs, 1):
        share = tokens / cost.phase.tokens if number == len(costs) else min(1.0, tokens / cost.phase.tokens)
        hours += share * cost.hours
        tokens -= share * cost.phase.tokens
    return hours


def read_actual(folder: Path, tokens_per_step: int) -> Actual:
    """What `log.jsonl` of a run's folder says.

    Raises:
        FileError: there is no log, or it holds no step.
    """
    path = folder / "log.jsonl"
    records = _read_log(path)
    if not records:
        raise FileError(path, "holds no step yet")
    seconds = [float(record.get("seconds") or tokens_per_step / record["tok_s"]) for record in records]
    counted = all("flops" in record for record in records)
    losses = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    return Actual(
        steps=len(records),
        tokens=float(len(records) * tokens_per_step),
        seconds=sum(seconds),
        tok_s=median_high(float(record["tok_s"]) for record in records),
        flop_s=median_high(r["flops"] / s for r, s in zip(records, seconds, strict=True)) if counted else None,
        loss=float(records[-1]["loss"]),
        val_loss=float(losses[-1]) if losses else None,
    )


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may be half written while the run goes on."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise FileError(path, "is not JSON", item=f"line {number}") from None
        if not isinstance(record, dict) or not {"step", "loss", "tok_s"} <= record.keys() or not record["tok_s"] > 0:
            raise FileError(path, "is no record of a step", item=f"line {number}")
        records.append(record)
    return records
