"""`benchmarks/train.py`: its arithmetic on made-up answers, and one side of it from end to end."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import importlib

    return importlib.import_module("train")


def answer(loss: float, seconds: float) -> dict[str, float]:
    return {"loss": loss, "seconds": seconds, "cpu_seconds": 2 * seconds, "peak_rss_bytes": 10**9}


def test_ratios_are_taken_inside_a_round_and_the_first_step_stands_apart(train):
    config, args = train.tiny(), argparse.Namespace(rows=2, length=50)
    measured = {
        "answers": {
            "shoal": [answer(9.0, 5.0), answer(8.0, 1.0), answer(7.0, 2.0), answer(6.0, 1.0)],
            "eager": [answer(9.0, 70.0), answer(8.004, 3.0), answer(6.998, 4.0), answer(6.0, 5.0)],
        },
        "limits": [{"flops": 1e12, "bytes": 1e10}] * 4,
    }
    result = train.summary(args, config, measured)
    ours, theirs = result["sides"]["shoal"], result["sides"]["eager"]
    assert ours["tok_s"] == 100.0 and theirs["tok_s"] == 25.0
    assert theirs["ratio"] == pytest.approx([3.0, 2.0, 5.0])
    assert theirs["first_step_seconds"] == 70.0
    assert theirs["worst_loss_difference"] == pytest.approx(0.004)
    # 32.7 million weights a token, six operations each, attention beside them; 87.6 million weights of 34 bytes.
    assert result["flops_per_step"] == pytest.approx(6 * 32.7e6 * 100, rel=0.05)
    assert result["floor_seconds"] == pytest.approx(result["flops_per_step"] / 1e12 + 87.6e6 * 34 / 1e10, rel=1e-3)
    assert result["above_floor"] == pytest.approx(1.0 / result["floor_seconds"])


@pytest.mark.slow
def test_a_quick_run_writes_table_and_numbers(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "train.py", "--quick", "--sides", "shoal", "--out", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("train_*_quick.md")
    facts = json.loads(table.with_suffix(".json").read_text())
    losses = [one["loss"] for one in facts["answers"]["shoal"]]
    assert losses[-1] < losses[0]
    assert "these numbers mean nothing" in table.read_text() and f"{losses[-1]:.4f}" in table.read_text()
    assert str(ROOT) not in table.read_text()


def test_an_unknown_side_is_named():
    command = [sys.executable, ROOT / "benchmarks" / "train.py", "--sides", "shoal,jax"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "jax" in done.stderr
