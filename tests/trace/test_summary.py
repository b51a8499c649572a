"""Summaries of routings whose answer is known, and against SciPy where it computes the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.trace.conftest import SHAPE, routing

from shoal.errors import FileError
from shoal.trace.summary import drift, layer_summary, summarise
from shoal.trace.table import TraceFile
from shoal.trace.training import summarise_log

Record = Callable[..., Path]


def test_a_layer_of_known_picks(record: Record) -> None:
    """Experts 0 and 1 always meet; 2 and 3 share the other tokens with 4; 5 is dead."""
    rng = np.random.default_rng(0)
    picks = np.array([[0, 1]] * 6 + [[2, 4]] * 2 + [[3, 4]] * 4)
    parts = [routing(rng, 0, 12, 1, np.tile(picks, (3, 1, 1)))]
    for layer, place in zip(summarise(TraceFile(record(parts))), range(3), strict=True):
        assert (layer.layer, layer.tokens, layer.load, layer.dead) == (
            SHAPE.layers[place],
            12,
            (6, 6, 2, 4, 6, 0),
            (5,),
        )
        assert layer.max_vio == pytest.approx(6 / 4 - 1)
        shares = np.array([6, 6, 2, 4, 6]) / 24
        assert layer.load_entropy == pytest.approx(-(shares * np.log(shares)).sum() / math.log(6))
        assert layer.router_entropy == pytest.approx(parts[0].entropy_LT[place].mean() / math.log(6), rel=1e-5)
        assert [(pair.experts, pair.tokens, round(pair.lift, 6)) for pair in layer.together] == [
            ((0, 1), 6, 2.0), ((3, 4), 4, 2.0), ((2, 4), 2, 2.0),
        ]  # fmt: skip


def test_pieces_add_up(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    path = record([routing(rng, 0, 50, 1), routing(rng, 50, 30, 2)])
    whole = summarise(TraceFile(path))
    monkeypatch.setattr("shoal.trace.table.BATCH_ROWS", 7)
    for one, other in zip(summarise(TraceFile(path)), whole, strict=True):
        assert one.load == other.load
        assert one.together == other.together
        assert one.router_entropy == pytest.approx(other.router_entropy)


def test_drift_is_scipy_s_divergence_and_chance_is_what_samples_show() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(16)), rng.dirichlet(np.ones(16))

    def sample(share: np.ndarray, count: int) -> list:
        return [layer_summary(3, rng.multinomial(count, share), tokens=count)]

    before, after = sample(p, 5000), sample(q, 3000)
    change = drift(before, after)[0]
    expected = distance.jensenshannon(before[0].load, after[0].load, base=2) ** 2
    assert change.divergence == pytest.approx(expected)
    assert change.divergence > 20 * change.chance
    worst = np.argmax(np.abs(np.array(before[0].load) / 5000 - np.array(after[0].load) / 3000))
    assert change.most[0] == (worst, before[0].load[worst] / 5000, after[0].load[worst] / 3000)
    even = np.full(16, 1 / 16)
    same = [drift(sample(even, 4000), sample(even, 2000))[0] for _ in range(300)]
    assert np.mean([one.divergence for one in same]) == pytest.approx(same[0].chance, rel=0.1)


def test_drift_of_equal_of_disjoint_and_of_other_models() -> None:
    one, other = layer_summary(0, np.array([4, 0]), tokens=4), layer_summary(0, np.array([0, 9]), tokens=9)
    assert drift([one], [one])[0].divergence == 0
    assert drift([one], [other])[0].divergence == 1
    with pytest.raises(ValueError, match="different layers"):
        drift([one], [layer_summary(1, np.array([1, 1]), tokens=1)])


def test_an_empty_trace_divides_by_nothing(record: Record) -> None:
    (layer, *_) = summarise(TraceFile(record([])))
    assert (layer.tokens, layer.max_vio, layer.router_entropy, layer.dead) == (0, 0.0, None, (0, 1, 2, 3, 4, 5))
    assert drift([layer], [layer])[0].divergence == 0


def write_log(path: Path, *records: object, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_the_log_of_a_training_run(tmp_path: Path) -> None:
    steps = [
        {"step": n, "tokens": 10 * n, "loss": 1.0, "router": {"10": {"load": [n, 20 - n]}, "2": {"load": [10, 10]}}}
        for n in range(1, 8)
    ]
    path = write_log(tmp_path / "log.jsonl", *steps, {"step": 8, "loss": 1.0}, tail='{"step": 9, "rou')
    first, second = summarise_log(path, last=2)
    assert (first.layer, first.load, first.tokens) == (2, (20, 20), 20)
    assert (second.layer, second.load, second.router_entropy, second.together) == (10, (13, 27), None, ())
    assert second.max_vio == pytest.approx(27 / 20 - 1)


def test_a_layer_that_rested_at_first(tmp_path: Path) -> None:
    early, late = {"1": {"load": [3, 5]}}, {"1": {"load": [4, 4]}, "2": {"load": [1, 7]}}
    steps = [{"step": n, "tokens": 4 * n, "router": early if n < 3 else late} for n in (1, 2, 3)]
    first, second = summarise_log(write_log(tmp_path / "log.jsonl", *steps))
    assert (first.load, first.tokens, second.load, second.tokens) == ((10, 14), 12, (1, 7), 4)
    steps[0]["router"] = {"1": {"load": [3, 5, 1]}}
    with pytest.raises(FileError, match=r"layer 1.*other experts"):
        summarise_log(write_log(tmp_path / "log.jsonl", *steps))


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"step": 1}, "no router statistics"),
        ([1], "line 1: is no log"),
        ({"router": {"1": {"load": [-1]}}}, "line 1: router"),
        ({"router": {"1": {"load": []}}}, "line 1: router"),
        ({"router": {"x": {"load": [1]}}}, "line 1: router"),
        ({"router": [1]}, "line 1: router"),
        ({"router": {"1": {"load": [1 << 70]}}}, "line 1: router"),
    ],
)
def test_logs_of_another_kind(tmp_path: Path, record: object, problem: str) -> None:
    with pytest.raises(FileError, match=problem):
        summarise_log(write_log(tmp_path / "log.jsonl", record))
    with pytest.raises(FileError, match="No such file"):
        summarise_log(tmp_path / "none.jsonl")
