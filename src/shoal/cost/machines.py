"""Machines that a run may use: peak rates and prices, each with its source, in `machines.json` beside this file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ConfigError

FILE = Path(__file__).with_name("machines.json")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One accelerator, or the cores of one rented machine.

    Attributes:
        bf16_tflops, fp8_tflops: peak of dense matrix products; None where the machine has no such unit.
        utilisation: share of the bf16 peak that training reaches, if nothing better is known.
        sources: where each number comes from.
    """

    name: str
    title: str
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gb: float
    dollars_per_hour: float
    utilisation: float
    sources: Mapping[str, str]


def machines() -> dict[str, Machine]:
    """Every machine of the list, by name."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: Machine(name=name, **facts) for name, facts in data.items()}


def find_machine(name: str) -> Machine:
    """Raises ConfigError, with the closest names, for one that is not in the list."""
    known = machines()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        raise ConfigError("machine", f"{name!r} is not in the list; {hint}")
    return known[name]
