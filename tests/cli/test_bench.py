"""`shoal bench`: its table, its JSON, its refusals. No speed is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Result

from shoal.config import GQAConfig, ModelConfig

Shoal = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--prompt", "5", "--gen", "3", "--repeats", "2", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = importlib.util.spec_from_file_location("random_gguf", ROOT / "benchmarks" / "random_gguf.py")
    assert spec is not None and spec.loader is not None
    random_gguf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(random_gguf)
    config = ModelConfig(
        model_type="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16), max_position_embeddings=512,
        bos_token_id=1, eos_token_id=(2,),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bench") / "small.gguf"
    random_gguf.write_random(config, "Q8_0", path)
    return str(path)


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that reads 20 GB/s, so that no test waits for the real measurement."""
    monkeypatch.setattr("shoal.engine.bench.read_bandwidth", lambda threads: 20e9)


def test_json_has_a_line_for_each_row(shoal: Shoal, model: str) -> None:
    result = shoal("bench", model, *SHORT, "--depth", "0,64", "--batch", "1,2")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0
    assert [(row["depth"], row["batch"]) for row in rows] == [(0, 1), (0, 2), (64, 1), (64, 2)]
    for row in rows:
        assert (row["model"], row["prompt"], row["gen"], row["repeats"], row["threads"]) == (model, 5, 3, 2, 1)
        for name in ("prompt_tok_s", "first_token_s", "decode_tok_s", "decode_gb_s"):
            low, high = row[f"{name}_range"]
            assert 0 < low <= row[name] <= high
        assert row["read_gb_s"] == 20
        assert row["bandwidth_share"] == pytest.approx(row["decode_gb_s"] / 20)
        read = sum(row["step_bytes"].values()) * row["decode_tok_s"] / row["batch"]
        assert row["decode_gb_s"] == pytest.approx(read / 1e9, rel=0.5)  # medians of the two repeats
        assert row["weight_bytes"] > row["step_bytes"]["weights"] > row["step_bytes"]["experts"] == 0
        assert row["peak_rss_bytes"] > row["weight_bytes"] + row["cache_bytes"]
        assert row["load_seconds"] > 0
    assert rows[2]["step_bytes"]["cache"] == rows[0]["step_bytes"]["cache"] + 64 * 2 * 64 * 2
    assert result.err.splitlines() == [f"batch {row['batch']}, depth {row['depth']}" for row in rows]


def test_a_terminal_gets_a_table(shoal: Shoal, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = shoal("bench", model, *SHORT, "--batch", "1,3").out.splitlines()
    assert lines[0].startswith(f"model   {model}, ")
    assert "prompt 5, gen 3, median (least–most) of 2" in lines[1]
    head, first, second = lines[-3:]
    assert head.split("  ")[0] == "BATCH"
    assert first.split()[:2] == ["1", "0"]
    assert second.split()[:2] == ["3", "0"]
    assert "20.0 (" in second and second.endswith("%)")


def test_json_on_a_terminal_by_request(shoal: Shoal, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    row = json.loads(shoal("bench", model, *SHORT, "--gen", "0", "--json").out)
    assert row["decode_tok_s"] is row["decode_gb_s_range"] is row["bandwidth_share"] is None
    table = shoal("bench", model, *SHORT, "--gen", "0").out.splitlines()
    assert table[-1].split()[-3:] == ["–", "–", "–"]


def test_options_reach_the_engine(shoal: Shoal, model: str) -> None:
    plain = json.loads(shoal("bench", model, *SHORT).out)
    options = ("--weights", "f32", "--cache", "f32", "--activations", "int8")
    other = json.loads(shoal("bench", model, *SHORT, *options).out)
    assert (other["weights"], other["cache"], other["activations"]) == ("f32", "f32", "int8")
    assert other["weight_bytes"] > 3 * plain["weight_bytes"]
    assert other["cache_bytes"] == 2 * plain["cache_bytes"]
    assert other["step_bytes"]["cache"] == 2 * plain["step_bytes"]["cache"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--depth", "0,x"), "'0,x' is not a list of whole numbers"),
        (("--batch", "1,"), "'1,' is not a list of whole numbers"),
        (("--batch", "0"), "batch: must lie between 1 and 256"),
        (("--depth", "600"), "depth: 600 + 512 + 64 tokens do not fit the model's context of 512"),
        (("--prompt", "500"), "prompt: 0 + 500 + 64 tokens do not fit the model's context of 512"),
        (("--prompt", "5", "--weights", "q9"), "weights: 'q9'"),
        (("--prompt", "5", "--cache", "f16"), "cache: 'f16'"),
        (("--prompt", "5", "--activations", "int4"), "activations: 'int4'"),
    ],
)
def test_refusals(shoal: Shoal, model: str, args: tuple[str, ...], said: str) -> None:
    result = shoal("bench", model, *args)
    assert said in result.error
    assert result.code == 2


def test_unknown_model(shoal: Shoal) -> None:
    assert "no such model" in shoal("bench", "nothing-of-that-name").error


def test_no_torch(model: str) -> None:
    code = f"""
import sys
from shoal.cli.main import main
from shoal.engine import bench
bench.read_bandwidth = lambda threads: 1e9
try:
    main(["bench", {model!r}, *{SHORT!r}])
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gen"] == 3
