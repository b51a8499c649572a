"""A trace as a timeline: Chrome's trace event format in JSON, which ui.perfetto.dev and chrome://tracing open.

Processes are the model's calls, its requests, and every layer with experts; in a layer an expert is a track, and a
slice on it says that it worked in that call, for how many tokens and with what weight. Two counters a layer show how
uneven the load of a call was and how undecided the router. Times are real; how a call's time was shared out inside is
not recorded, so all slices of a call are equally long.

Format: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shoal.formats.atomic import atomic_file
from shoal.trace.table import TraceFile

COLUMNS = (
    "request", "position", "generated", "text", "layer", "experts", "weights", "entropy", "step", "step_rows", "start",
    "seconds",
)  # fmt: skip
CALLS, REQUESTS, LAYERS = 1, 2, 10  # process ids; a layer's is LAYERS + its number
Event = dict[str, Any]
Rows = dict[str, Any]


def export(trace: TraceFile, out: Path, *, max_steps: int | None = None) -> tuple[int, bool]:
    """Write the timeline of the first `max_steps` calls; the number of calls written, and whether more were left out.

    Raises:
        FileError: the trace is damaged, or `out` cannot be written.
    """
    count, cut = 0, False
    with atomic_file(out) as file:
        file.write(b'{"displayTimeUnit":"ms","otherData":')
        file.write(json.dumps({"model": trace.shape.model, "started": trace.shape.started}).encode())
        file.write(b',"traceEvents":[\n')
        file.write(b",\n".join(_dump(event) for event in _names(trace)))
        requests: set[int] = set()
        for rows in _steps(trace):
            if max_steps is not None and count >= max_steps:
                cut = True
                break
            count += 1
            for event in _events(rows, requests):
                file.write(b",\n" + _dump(event))
        file.write(b"\n]}\n")
    return count, cut


def _dump(event: Event) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()


def _names(trace: TraceFile) -> Iterator[Event]:
    yield _name("process_name", CALLS, 0, f"{trace.shape.model}: calls")
    yield _name("thread_name", CALLS, 1, "calls of the network")
    yield _name("process_name", REQUESTS, 0, "requests")
    for layer in trace.shape.layers:
        yield _name("process_name", LAYERS + layer, 0, f"layer {layer}")
        order = {"sort_index": LAYERS + layer}
        yield {"name": "process_sort_index", "ph": "M", "pid": LAYERS + layer, "tid": 0, "args": order}
        for expert in range(trace.shape.n_routed_experts):
            yield _name("thread_name", LAYERS + layer, expert + 1, f"expert {expert}")


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _steps(trace: TraceFile) -> Iterator[Rows]:
    """The rows of each call. They are neighbours in the file."""
    held: Rows | None = None
    for batch in trace.batches(COLUMNS):
        batch["text"] = np.array(batch["text"], object)
        if held is not None:
            batch = {name: np.concatenate([held[name], batch[name]]) for name in COLUMNS}
        edges = [0, *(np.flatnonzero(np.diff(batch["step"])) + 1).tolist()]
        for first, last in itertools.pairwise(edges):
            yield {name: column[first:last] for name, column in batch.items()}
        held = {name: column[edges[-1] :] for name, column in batch.items()}
    if held is not None and len(held["step"]):
        yield held


def _events(rows: Rows, requests: set[int]) -> Iterator[Event]:
    start, long = round(float(rows["start"][0]) * 1e6, 3), round(float(rows["seconds"][0]) * 1e6, 3)
    span = {"ph": "X", "ts": start, "dur": long}
    count = int(rows["step_rows"][0])
    step = {"step": int(rows["step"][0]), "tokens": count}
    yield {**span, "name": f"{count} token{'s' * (count > 1)}", "cat": "call", "pid": CALLS, "tid": 1, "args": step}
    first_layer = rows["layer"] == rows["layer"][0]
    for request in np.unique(rows["request"]).tolist():
        mine = np.flatnonzero(first_layer & (rows["request"] == request))
        if request not in requests:
            requests.add(request)
            yield _name("thread_name", REQUESTS, request + 1, f"request {request}")
        yield {**span, "cat": "request", "pid": REQUESTS, "tid": request + 1, **_read(rows, mine)}
    for layer in np.unique(rows["layer"]).tolist():
        yield from _layer_events(rows, np.flatnonzero(rows["layer"] == layer), LAYERS + layer, span)


def _read(rows: Rows, mine: Any) -> Event:
    """Name and details of what a request read in a call."""
    first, last = int(rows["position"][mine[0]]), int(rows["position"][mine[-1]])
    text = "".join(str(piece) for piece in rows["text"][mine] if piece is not None)
    kind = "answer" if rows["generated"][mine[0]] else "prompt"
    name = repr(text)[1:-1][:40] if text and len(mine) == 1 else f"{kind}, {len(mine)} tokens"
    return {"name": name or kind, "args": {"positions": f"{first}–{last}", "part": kind, "text": text[:500]}}


def _layer_events(rows: Rows, here: Any, pid: int, span: Event) -> Iterator[Event]:
    picks, weights = rows["experts"][here].ravel(), rows["weights"][here].ravel()
    counts = np.bincount(picks)
    sums = np.bincount(picks, weights=weights)
    for expert in np.flatnonzero(counts).tolist():
        args = {"tokens": int(counts[expert]), "mean_weight": round(float(sums[expert] / counts[expert]), 5)}
        yield {**span, "name": f"×{counts[expert]}", "cat": "expert", "pid": pid, "tid": expert + 1, "args": args}
    busiest = int(counts.max()) / len(here)
    for name, value in (
        ("busiest expert's share of tokens", busiest),
        ("entropy", float(rows["entropy"][here].mean())),
    ):
        yield {"name": name, "ph": "C", "ts": span["ts"], "pid": pid, "tid": 0, "args": {"value": round(value, 5)}}
