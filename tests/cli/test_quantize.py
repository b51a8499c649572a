"""`shoal quantize` from end to end: a tiny random model with a real vocabulary, and what can be asked wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.conftest import Result

from shoal import hub
from shoal.config import GQAConfig, ModelConfig
from shoal.errors import UnknownModelError
from shoal.formats.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from shoal.formats.hf_folder import save_folder
from shoal.formats.layout import expected_tensors

Shoal = Callable[..., Result]
CONFIG = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    attention=GQAConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=16), tie_word_embeddings=True,
    max_position_embeddings=64, eos_token_id=(2,),
)  # fmt: skip
QUICK = ("--calibration-tokens", "128", "--report-tokens", "128")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    try:
        vocabulary = open_checkpoint(hub.resolve("smollm2-135m"))
    except UnknownModelError:
        pytest.skip("SmolLM2 is not on this machine")
    rng = np.random.default_rng(0)

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        values = (rng.normal(size=shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        return LazyTensor(
            name=name, shape=shape, dtype="F32", source=Path("tiny"), make_chunks=lambda: iter([values])
        )  # fmt: skip

    tiny = Checkpoint(
        path=vocabulary.path, config=CONFIG, load_tokenizer=vocabulary.load_tokenizer, load_chat=vocabulary.load_chat,
        tensors={name: lazy(name, shape) for name, shape in expected_tensors(CONFIG).items()},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    save_folder(tiny, folder)
    return str(folder)


def test_a_model_is_shrunk_and_measured(shoal: Shoal, model: str, tmp_path: Path) -> None:
    dst = tmp_path / "small"
    result = shoal("quantize", model, str(dst), "--scheme", "int4", "--tables", "int8", *QUICK, "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert (facts["path"], facts["scheme"], facts["source"]) == (str(dst), "int4", model)
    assert facts["bytes_after"] == (dst / "model.safetensors").stat().st_size < 0.3 * facts["bytes_before"]
    roles = {one["role"]: (one["dtypes"], round(one["bits"], 1)) for one in facts["roles"]}
    assert roles == {"experts and MLPs": (["I4_G32"], 4.6), "attention": (["I8_G32"], 8.7),
                     "embedding": (["I8_G32"], 8.5), "kept": (["F32"], 32.0)}  # fmt: skip
    quality = facts["quality"]
    assert quality["tokens"] == 128
    assert 0 < quality["kl"] < quality["kl_99"] < 0.2
    assert 0.4 < quality["top1"] < 1
    assert quality["perplexity_before"] != quality["perplexity_after"]
    assert "calibrating" in result.err and "measuring" in result.err
    answer = shoal("chat", "--model", str(dst), "hello", "--max-tokens", "3")
    assert answer.code == 0 and answer.out


def test_words_for_people(shoal: Shoal, model: str, tmp_path: Path) -> None:
    result = shoal("quantize", model, str(tmp_path / "small"), *QUICK)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split() == ["WEIGHTS", "OF", "STORED", "AS", "BITS", "SIZE"]
    assert [line.split("  ")[0] for line in lines[1:5]] == ["experts and MLPs", "attention", "embedding", "kept"]
    for said in ("bits per weight", "perplexity", "KL divergence", "same likeliest token", "128 tokens of held-out"):
        assert said in result.out
    assert "--tables int8 would save" in result.err


def test_neither_calibration_nor_report_runs_the_model(
    shoal: Shoal, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr("shoal.engine.core.Core.__init__", never)
    result = shoal("quantize", model, str(tmp_path / "q"), "--calibrate", "none", "--no-report", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["quality"] is None


def test_a_file_of_ones_own(shoal: Shoal, model: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One two three. " * 60)
    result = shoal("quantize", model, str(tmp_path / "q"), "--calibrate", str(text), "--json")
    assert result.code == 0, result.err
    assert 20 < json.loads(result.out)["quality"]["tokens"] <= 60  # the last fifth


def test_calibration_changes_the_codes(shoal: Shoal, model: str, tmp_path: Path) -> None:
    for name, text in (("with", "builtin"), ("without", "none")):
        options = ("--calibrate", text, "--no-report", "--calibration-tokens", "64")
        assert shoal("quantize", model, str(tmp_path / name), "--scheme", "int4", *options).code == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert len(one) == len(other) and one != other


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--scheme", "int5"), "scheme: 'int5' is not one of int8, int4, int4-asym"),
        (("--group", "48"), "group: 48 is not one of 32, 64, 128"),
        (("--tables", "int4"), "tables: 'int4' is not one of auto, int8, bfloat16"),
        (("--calibrate", "no-such.txt"), "no-such.txt: cannot be read"),
        (("--report-tokens", "0"), "greater than or equal to 1"),
    ],
)
def test_wrong_requests(shoal: Shoal, model: str, tmp_path: Path, options: tuple[str, ...], problem: str) -> None:
    result = shoal("quantize", model, str(tmp_path / "q"), *options)
    assert result.code == 2
    assert problem in result.error
    assert list(tmp_path.iterdir()) == []


def test_a_destination_in_use(shoal: Shoal, model: str, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "precious").touch()
    result = shoal("quantize", model, str(tmp_path / "q"))
    assert (result.code, result.error) == (2, f"{tmp_path / 'q'}: already exists and is not empty")
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["precious"]


def test_a_source_that_is_not_there(shoal: Shoal, tmp_path: Path) -> None:
    result = shoal("quantize", str(tmp_path / "nowhere"), str(tmp_path / "q"))
    assert result.code == 2 and "nowhere" in result.error
