"""`benchmarks/peers.py` from end to end, beside programs that stand in for llama.cpp's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Answers as llama-bench and llama-batched-bench do, at 100 tokens/s, and notes that it was called.
STAND_IN = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__)
with open(here.with_name("calls"), "a") as calls:
    calls.write(here.name + " " + " ".join(sys.argv[1:]) + chr(10))
print("loading", file=sys.stderr)
print("not a row")
if here.name == "llama-bench":
    print(json.dumps({{"model_filename": sys.argv[2], "avg_ts": 1.0, "samples_ts": [90.0, 100.0, 170.0]}}))
else:
    print(json.dumps({{"speed_tg": 100.0, "speed_pp": 1.0}}))
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    folder = tmp_path / "build" / "bin"
    folder.mkdir(parents=True)
    for name in ("llama-bench", "llama-batched-bench"):
        (folder / name).write_text(STAND_IN.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from random_gguf import write_random
from shoal.config import GQAConfig, ModelConfig
attention = GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
config = ModelConfig(model_type="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                     attention=attention, max_position_embeddings=512, bos_token_id=1, eos_token_id=(2,))
write_random(config, "Q8_0", pathlib.Path({str(path)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    return path


def _peers(tmp_path: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "peers.py", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    env = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP"}
    return subprocess.run([*command, *args], capture_output=True, text=True, timeout=240, env=env)


def test_a_quick_run(tmp_path: Path, peer: Path, model: Path) -> None:
    done = _peers(tmp_path, "--quick", "--gguf", model, "--cells", "decode,batch", "--llama-cpp", tmp_path)
    assert done.returncode == 0, done.stderr
    calls = (peer / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls if "--version" not in call] == ["llama-bench", "llama-batched-bench"]
    assert "-fa on -p 0 -n 8 -d 0 -r 1" in calls[-2]
    assert "-npp 16 -ntg 8 -npl 4 -c 96" in calls[-1]
    report = Path(done.stdout.splitlines()[-1])
    facts = json.loads(report.with_suffix(".json").read_text())
    decode, batch = facts["results"]
    assert decode["pairs"][0]["theirs"] == batch["pairs"][0]["theirs"] == 100
    assert decode["pairs"][0]["ours"] == decode["pairs"][0]["row"]["decode_tok_s"] > 0
    assert batch["pairs"][0]["row"]["batch"] == 4
    text = report.read_text()
    ratio = decode["pairs"][0]["ours"] / 100
    assert f"| {ratio:.2f} ({ratio:.2f}–{ratio:.2f}) |" in text
    assert "these numbers mean nothing" in text
    assert str(tmp_path) not in text + report.with_suffix(".json").read_text()


def test_pairs_alternate_and_ratios_stay_inside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers_report

    def pair(ours: float, theirs: float) -> dict[str, object]:
        row = {"read_gb_s": 20.0, "step_bytes": {"weights": 10**9, "cache": 10**9}, "peak_rss_bytes": 3e9}
        return {"ours": ours, "theirs": theirs, "row": row, "their_peak_rss_bytes": 2e9}

    result = {
        "model": "m", "dtype": "Q8_0", "title": "decode", "metric": "decode_tok_s", "batch": 1, "commands": ["a", "b"],
        "pairs": [pair(2, 1), pair(4, 4), pair(9, 3)],
    }  # fmt: skip
    row = peers_report._row(result)
    # 2, 1 and 3 inside the pairs; the medians alone, 4 and 3, would have given 1.33.
    assert row[3:] == ["4", "3", "2.00 (1.00–3.00)", "20.0 GB/s", "40%", "30%", "3.00 and 2.00 GB"]
    assert peers_report._row(result | {"batch": 8})[7:9] == ["", ""]


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path: Path, peer: Path, model: Path) -> None:
    (peer / "llama-bench").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('cannot open the model')\n")
    done = _peers(tmp_path, "--quick", "--gguf", model, "--cells", "decode,batch", "--llama-cpp", peer)
    assert done.returncode == 0, done.stderr
    text = Path(done.stdout.splitlines()[-1]).read_text()
    assert "- small, decode: llama-bench ended with 1: cannot open the model" in text
    assert "| decode, 4 sequences |" in text


def test_refusals(tmp_path: Path, peer: Path) -> None:
    assert "holds no llama-bench" in _peers(tmp_path, "--llama-cpp", tmp_path / "nowhere").stderr
    assert "no cell depth" in _peers(tmp_path, "--cells", "depth").stderr
    assert "no model gpt" in _peers(tmp_path, "--models", "gpt").stderr
    inside = _peers(tmp_path, "--work", ROOT / "build" / "peers")
    assert "outside the repository" in inside.stderr
    assert not (ROOT / "build" / "peers").exists()
