"""`shoal reshape` from end to end: a tiny random model with a real vocabulary, and what can be asked wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.conftest import Result

torch = pytest.importorskip("torch")

from shoal import LLM, hub  # noqa: E402
from shoal.config import GQAConfig, ModelConfig  # noqa: E402
from shoal.errors import UnknownModelError  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.formats.hf_save import save_folder  # noqa: E402
from shoal.model import as_checkpoint, random_model  # noqa: E402

Shoal = Callable[..., Result]
CONFIG = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16), tie_word_embeddings=True,
    max_position_embeddings=64, eos_token_id=(2,), initializer_range=0.3,
)  # fmt: skip
QUICK = ("--calibration-tokens", "256", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    try:
        vocabulary = open_checkpoint(hub.resolve("smollm2-135m"))
    except UnknownModelError:
        pytest.skip("SmolLM2 is not on this machine")
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    save_folder(as_checkpoint(random_model(CONFIG, 0), like=vocabulary), folder)
    return str(folder)


def logits(path: Any) -> Any:
    return LLM(str(path), weights="f32", cache="f32", threads=1, cache_tokens=64).logits(list(range(300, 340)))


def test_all_of_a_model_in_another_shape(shoal: Shoal, model: str, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    result = shoal("reshape", model, str(dst), *QUICK, "--moe", "split", "--experts", "3", "--active", "3", "--shared",
                   "1", "--json")  # fmt: skip
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert (facts["latent"], facts["rope"], facts["cache_bytes_per_token"]) == (34, 32, 2 * 66 * 2)
    assert (facts["cache_bytes_before"], facts["cache_bytes_full_heads"]) == (2 * 64 * 2, 2 * 128 * 2)
    before = logits(model)
    assert np.abs(logits(dst) - before).max() < 1e-3 * np.abs(before).max()
    assert open_checkpoint(dst).config.moe is not None


def test_less_cache_shared_out_and_fitted(shoal: Shoal, model: str, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    result = shoal("reshape", model, str(dst), *QUICK, "--cache", "40", "--fit-epochs", "2", "--heal-steps", "3",
                   "--heal-state", str(tmp_path / "state"))  # fmt: skip
    assert result.code == 0, result.err
    assert "256 → 160 bytes in bfloat16, 37.5% less" in result.out
    assert "512 → 160 bytes, 68.8% less" in result.out
    assert "layer 1: error of the stream" in result.err
    assert "step 3 of 3" in result.err
    assert (tmp_path / "state" / "heal.safetensors").exists()
    mla = open_checkpoint(dst).config.attention
    assert mla.cache_width == 40
    assert f"{40 - mla.rope_dim} are the latent and {mla.rope_dim} rotary" in result.err
    paths = dst, blind(shoal, model, tmp_path, mla.rope_dim)
    lost = [np.square(logits(path) - logits(model)).mean() for path in paths]
    assert lost[0] < 0.7 * lost[1]


def blind(shoal: Shoal, model: str, tmp_path: Path, rope: int) -> Path:
    """The same shape without a look at any text."""
    dst = tmp_path / "blind"
    result = shoal("reshape", model, str(dst), "--latent", str(40 - rope), "--rope", str(rope), "--calibrate", "none",
                   "--dtype", "float32")  # fmt: skip
    assert result.code == 0, result.err
    return dst


@pytest.mark.parametrize(("args", "problem"), [
    (("--latent", "200"), "latent: must be even and lie between"), (("--rope", "33"), "rope: must be even"),
    (("--cache", "40", "--rope", "16"), "cache: is latent and rope together"),
    (("--cache", "67"), "cache: must be at most"),
    (("--moe", "melt"), "moe: 'melt' is not one of"), (("--moe", "split", "--experts", "7"), "experts: 7 parts"),
    (("--calibrate", "none", "--cache", "40"), "calibrate: none does not go with"),
    (("--calibrate", "missing.txt", "--cache", "40"), "missing.txt: cannot be read"),
    (("--dtype", "int3"), "dtype: 'int3'"),
])  # fmt: skip
def test_wrong_wishes_end_with_one_line_and_nothing_written(
    shoal: Shoal, model: str, tmp_path: Path, args: tuple[str, ...], problem: str
) -> None:
    result = shoal("reshape", model, str(tmp_path / "out"), *args)
    assert result.code == 2
    assert problem in result.err
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []
