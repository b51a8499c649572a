"""A reshaped model against the one it was made from, in PyTorch, in the engine and in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.engine.conftest import TinyTokenizer, open_tiny, some_tokens, tiny  # noqa: E402

from shoal.errors import ConfigError  # noqa: E402
from shoal.formats.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from shoal.formats.hf_save import save_folder  # noqa: E402
from shoal.model import load_model  # noqa: E402
from shoal.tune.reshape import Shape, reshape  # noqa: E402

ROPE = {"rope_theta": 500.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "heads of their own": {"model_type": "llama", "num_key_value_heads": 6, "tie_word_embeddings": True},
    "biases": {"model_type": "llama", "attention_bias": True},
    "qwen2": {"model_type": "qwen2", "hidden_size": 48},
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 3.0, **ROPE}},
    "llama3": {"model_type": "llama", "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, **ROPE}},
    "yarn": {"model_type": "llama", "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **ROPE}},
}  # fmt: skip
T = 120


def logits(checkpoint: Checkpoint, tokens: list[int]) -> Any:
    with torch.no_grad():
        return load_model(checkpoint)(torch.tensor([tokens]))[0].numpy()


def apart(ours: Any, theirs: Any) -> float:
    """Root mean square of the difference, beside that of the logits."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


@pytest.mark.parametrize("name", CASES)
def test_nothing_left_out_changes_nothing(name: str, tmp_path: Path) -> None:
    import transformers

    hf, _ = tiny(CASES[name])
    hf.save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    tokens = some_tokens(T)
    with torch.no_grad():
        before = hf(torch.tensor([tokens])).logits[0].numpy()
    full = reshape(source, Shape.full(source.config))
    assert full.config.model_type == "deepseek_v3"
    assert apart(logits(full, tokens), before) < 2e-5
    save_folder(full, tmp_path / "out", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    with torch.no_grad():
        assert apart(theirs(torch.tensor([tokens])).logits[0].numpy(), before) < 2e-5
    opened = replace(open_checkpoint(tmp_path / "out"), load_tokenizer=TinyTokenizer)
    assert apart(open_tiny(opened).logits(tokens), before) < 2e-5


def test_slow_frequencies_do_without_rotation(tmp_path: Path) -> None:
    """Pairs that hardly turn within the text belong into the latent, where only the mixture of K and V is left."""
    _, source = tiny({"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 1e6, **ROPE}})
    tokens = some_tokens(T)
    gqa = source.config.attention
    most = 2 * gqa.num_key_value_heads * gqa.head_dim + 1
    before = logits(source, tokens)
    partial = reshape(source, Shape(latent=most, rope=2))
    assert apart(logits(partial, tokens), before) < 1e-3
    assert apart(logits(reshape(source, Shape(latent=most // 2, rope=2)), tokens), before) > 1e-2
