"""The same summary from a training run's log.jsonl, whose steps say how many picks each expert got."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from shoal.errors import FileError
from shoal.trace.summary import LayerSummary, layer_summary
from shoal.trace.table import MAX_EXPERTS

LAST_STEPS = 100


def summarise_log(path: Path, *, last: int = LAST_STEPS) -> list[LayerSummary]:
    """Layer by layer over the last `last` steps that the log holds; routers' entropy and pairs are not in it.

    Raises:
        FileError: the file cannot be read, or holds no router statistics.
    """
    steps: deque[dict[int, Any]] = deque(maxlen=last)
    tokens: deque[int] = deque(maxlen=last)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # a run that is still writing
                record = _record(path, number, line)
                if "router" in record:
                    steps.append(_loads(path, number, record["router"]))
                    tokens.append(_tokens(record))
    except OSError as error:
        raise FileError(path, error.strerror or "cannot be read") from error
    if not steps:
        raise FileError(path, "holds no router statistics: no step was logged, or the model has no experts")
    out = []
    for layer in sorted({layer for step in steps for layer in step}):
        # An MTP layer may rest at first (`losses.mtp_from`).
        found = [(step[layer], count) for step, count in zip(steps, tokens, strict=True) if layer in step]
        if len({len(load) for load, _ in found}) > 1:
            raise FileError(path, "mixes models with other experts", item=f"router: layer {layer}")
        out.append(layer_summary(layer, np.sum([load for load, _ in found], axis=0), tokens=sum(n for _, n in found)))
    return out


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise FileError(path, f"is no JSON: {error}", item=f"line {number}") from error
    if not isinstance(record, dict):
        raise FileError(path, "is no log of a training run", item=f"line {number}")
    return record


def _tokens(record: dict[str, Any]) -> int:
    """Of one step; the log counts them from the beginning of the run."""
    step, tokens = record.get("step"), record.get("tokens")
    return tokens // step if isinstance(step, int) and isinstance(tokens, int) and step > 0 else 0


def _loads(path: Path, number: int, router: Any) -> dict[int, Any]:
    try:
        out = {int(layer): np.array(entry["load"], np.int64) for layer, entry in router.items()}
        if not out or any(
            load.ndim != 1 or not 1 <= len(load) <= MAX_EXPERTS or load.min() < 0 for load in out.values()
        ):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise FileError(path, "must map layers to the load of each expert", item=f"line {number}: router") from error
    return out
