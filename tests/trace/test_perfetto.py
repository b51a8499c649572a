"""The timeline against the rules of the format, and its numbers against the recording."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.trace.conftest import SHAPE, routing

from shoal.errors import FileError
from shoal.trace.perfetto import CALLS, LAYERS, REQUESTS, export
from shoal.trace.table import TraceFile

Record = Callable[..., Path]
NUMBER = {"type": "number"}
WHOLE = {"type": "integer", "minimum": 0}
# The format's rules, as its document states them, for the four kinds of event that we write.
COMMON = {"name": {"type": "string", "minLength": 1}, "pid": WHOLE, "tid": WHOLE, "args": {"type": "object"}}
META = {"enum": ["process_name", "thread_name", "process_sort_index"]}
EVENT = {
    "type": "object",
    "required": ["name", "ph", "pid", "tid", "args"],
    "oneOf": [
        {"properties": {**COMMON, "ph": {"const": "M"}, "name": META}},
        {
            "properties": {**COMMON, "ph": {"const": "X"}, "ts": NUMBER, "dur": {"type": "number", "minimum": 0}},
            "required": ["ts", "dur", "cat"],
        },
        {
            "properties": {**COMMON, "ph": {"const": "C"}, "ts": NUMBER, "args": {"additionalProperties": NUMBER}},
            "required": ["ts"],
        },
    ],
}


@pytest.fixture
def drawn(record: Record, tmp_path: Path) -> tuple[list[dict[str, Any]], Any]:
    rng = np.random.default_rng(3)
    texts = [routing(rng, 0, 7, 1), routing(rng, 7, 1, 2)], [routing(rng, 0, 3, 2), routing(rng, 3, 1, 4)]
    for step, parts in enumerate(zip(*texts, strict=True)):
        assert parts, step
    path = record(texts[0], texts[1])
    assert export(TraceFile(path), tmp_path / "t.json") == (3, False)
    return json.loads((tmp_path / "t.json").read_text())["traceEvents"], pq.read_table(path)


def test_every_event_keeps_the_rules(drawn: tuple[list[dict[str, Any]], Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(EVENT)
    for event in drawn[0]:
        check.validate(event)
    named = {(event["pid"], event["tid"]) for event in drawn[0] if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in drawn[0] if event["ph"] == "X"} <= named


def test_slices_of_a_track_follow_each_other(drawn: tuple[list[dict[str, Any]], Any]) -> None:
    tracks = defaultdict(list)
    for event in drawn[0]:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event["ts"])
    assert len(tracks) > 10
    assert all(earlier < later for times in tracks.values() for earlier, later in itertools.pairwise(times))


def test_tokens_on_the_tracks_are_those_of_the_recording(drawn: tuple[list[dict[str, Any]], Any]) -> None:
    events, table = drawn
    expected: Counter[tuple[int, int]] = Counter()
    for row in table.to_pylist():
        expected.update((row["layer"], expert) for expert in row["experts"])
    found: Counter[tuple[int, int]] = Counter()
    for event in events:
        if event["ph"] == "X" and event["pid"] >= LAYERS:
            found[event["pid"] - LAYERS, event["tid"] - 1] += event["args"]["tokens"]
    assert found == expected
    calls = [event["args"] for event in events if event["ph"] == "X" and event["pid"] == CALLS]
    assert calls == [{"step": 1, "tokens": 8}, {"step": 2, "tokens": 2}, {"step": 4, "tokens": 2}]
    reads = [event for event in events if event["ph"] == "X" and event["pid"] == REQUESTS]
    assert [event["args"]["positions"] for event in reads] == ["0–6", "7–7", "0–2", "3–3"]


def test_a_step_cut_by_a_batch_stays_one(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    path = record([routing(rng, 0, 30, 1), routing(rng, 30, 30, 2)])
    export(TraceFile(path), tmp_path / "whole.json")
    monkeypatch.setattr("shoal.trace.table.BATCH_ROWS", 7)
    export(TraceFile(path), tmp_path / "pieces.json")
    assert (tmp_path / "pieces.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_the_first_calls_alone(record: Record, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    path = record([routing(rng, 4 * step, 4, step) for step in range(9)])
    assert export(TraceFile(path), tmp_path / "t.json", max_steps=4) == (4, True)
    with pytest.raises(FileError, match="cannot be written"):
        export(TraceFile(path), tmp_path / "none" / "t.json")


def test_an_empty_trace_is_a_valid_one(record: Record, tmp_path: Path) -> None:
    assert export(TraceFile(record([])), tmp_path / "t.json") == (0, False)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert len(events) == 3 + len(SHAPE.layers) * (2 + SHAPE.n_routed_experts)
