"""Logits of the engine in float32 against transformers, family by family, over several cache pages."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.engine.conftest import open_tiny, set_steps, some_tokens, tiny  # noqa: E402
from tests.model.test_parity import CASES  # noqa: E402

from shoal.errors import ConfigError  # noqa: E402

T = 300  # five pages, and more than one chunk of attention


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].get("mlp_bias")])
def test_logits_match_transformers(name: str) -> None:
    hf, checkpoint = tiny(CASES[name])
    tokens = some_tokens(T)
    with torch.no_grad():
        theirs = hf(torch.tensor([tokens])).logits[0].numpy()
    ours = open_tiny(checkpoint).logits(tokens)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert theirs.std() > 0.1, "weights too small to tell anything apart"


def test_biases_in_feed_forward_layers_are_refused_rather_than_left_out() -> None:
    _, checkpoint = tiny(CASES["llama-bias"])
    with pytest.raises(ConfigError, match="mlp_bias"):
        open_tiny(checkpoint)


def test_a_latent_of_odd_width_needs_a_float_cache() -> None:
    """Cached bfloat16 keys are read in pairs."""
    hf, checkpoint = tiny({**CASES["v3-released"], "kv_lora_rank": 23})
    for cache in ("bf16", "int8"):
        with pytest.raises(ConfigError, match=r"kv_lora_rank: .*odd"):
            open_tiny(checkpoint, cache=cache)
    tokens = some_tokens(T)
    with torch.no_grad():
        theirs = hf(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(open_tiny(checkpoint).logits(tokens) - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_biases_of_attention_match_transformers() -> None:
    hf, checkpoint = tiny({"model_type": "llama", "attention_bias": True})
    tokens = some_tokens(T)
    with torch.no_grad():
        theirs = hf(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(open_tiny(checkpoint).logits(tokens) - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["v2-groups", "v3-released", "llama-3", "qwen2", "qwen3"])
def test_decoding_token_by_token_is_the_full_forward_pass(name: str) -> None:
    _, checkpoint = tiny(CASES[name])
    tokens = some_tokens(T)
    whole = open_tiny(checkpoint)
    one_by_one = open_tiny(checkpoint)
    set_steps(one_by_one, step=1)
    np.testing.assert_array_equal(one_by_one.logits(tokens), whole.logits(tokens))


@pytest.mark.parametrize("name", ["v2-groups", "v3-released", "llama", "qwen3"])
def test_greedy_text_is_that_of_transformers(name: str) -> None:
    from shoal.engine import SamplingParams

    hf, checkpoint = tiny(CASES[name])
    prompt = some_tokens(70)
    with torch.no_grad():
        theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    ours = open_tiny(checkpoint).generate(prompt, SamplingParams(temperature=0, max_tokens=40))
    assert list(ours.token_ids) == theirs[0, 70:].tolist()
