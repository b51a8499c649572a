"""MLA's expanded form over prompts: the same logits as the absorbed one, and bits that no batch and no cut changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.engine.core import Core
from shoal.engine.params import SamplingParams
from shoal.engine.prefill import expand_from, expands_from
from shoal.engine.sampler import Sampler
from shoal.engine.sequence import Sequence
from shoal.errors import ConfigError

torch = pytest.importorskip("torch")

from shoal.model.load import as_checkpoint, random_model  # noqa: E402

VOCAB = 199
CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    rope=RopeConfig(interleave=True),
    attention=MLAConfig(
        num_attention_heads=3, kv_lora_rank=72, qk_nope_head_dim=20, qk_rope_head_dim=12, v_head_dim=18
    ),
    moe=MoEConfig(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1
    ),
    max_position_embeddings=2048,
)
MODEL = random_model(CONFIG, 3)
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def core(prefill: str, **options) -> Core:
    options = {"weights": "f32", "cache": "f32", "threads": 2, "cache_tokens": 2048} | options
    return Core(as_checkpoint(MODEL), prefill=prefill, **options)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def read(engine: Core, texts: list[list[int]], produce: int = 1) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of every prompt token, and the tokens produced, of texts that run side by side."""
    logits = [np.full((len(text), VOCAB), np.nan, np.float32) for text in texts]
    sequences = []
    for text, seen in zip(texts, logits, strict=True):

        def watch(first: int, rows: np.ndarray, seen: np.ndarray = seen) -> None:
            seen[first : first + len(rows)] = rows

        sequence = Sequence(
            tokens=list(text), prompt_tokens=len(text), params=GREEDY, sampler=Sampler(GREEDY, text, VOCAB),
            max_tokens=produce, watch=watch,
        )  # fmt: skip
        engine.submit(sequence)
        sequences.append(sequence)
    for sequence in sequences:
        while sequence.finish is None:
            engine.advance(sequence)
            sequence.outputs.clear()
        assert sequence.finish == "length", sequence.error
        engine.release(sequence)
    return logits, [sequence.tokens[sequence.prompt_tokens :] for sequence in sequences]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 300])
def test_expanded_equals_the_network_in_pytorch(length):
    text = prompt(length)
    with torch.no_grad():
        expected = MODEL(torch.tensor([text]))[0].numpy()
    (found,), _ = read(core("expanded"), [text])
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("weights", "cache", "limit"), [("q8", "bf16", 0.05), ("bf16", "int8", 0.05), ("q4", "bf16", 0.4)]
)
def test_both_forms_agree_within_what_rounding_costs(weights, cache, limit):
    text = prompt(200)
    (expanded,), _ = read(core("expanded", weights=weights, cache=cache), [text])
    (absorbed,), _ = read(core("absorbed", weights=weights, cache=cache), [text])
    assert 0 < difference(expanded, absorbed) < limit


def test_16_bit_activations_reach_the_expansion():
    text = prompt(200)
    (exact,), _ = read(core("expanded", weights="q8", activations="int16", cache="f32"), [text])
    (absorbed,), _ = read(core("absorbed", weights="q8", activations="int16", cache="f32"), [text])
    assert difference(exact, absorbed) < 0.02


@pytest.mark.parametrize("weights", ["f32", "q8"])
def test_neither_cuts_nor_neighbours_nor_threads_change_a_bit(weights):
    texts = [prompt(290, 1), prompt(130, 2), prompt(70, 3)]
    alone = [read(core("expanded", weights=weights), [text], 8) for text in texts]
    for options in ({"step_tokens": 96, "mixed_tokens": 40}, {"step_tokens": 17}, {"step_tokens": 3}, {"threads": 1}):
        logits, produced = read(core("expanded", weights=weights, **options), texts, 8)
        for index, ((one,), (tokens,)) in enumerate(alone):
            assert np.array_equal(logits[index], one)
            assert produced[index] == tokens


def test_long_and_short_prompts_share_a_step():
    """The long one is expanded, the short one and what is generated are not: each as if it were alone."""
    long, short = prompt(expands_from(CONFIG) + 40, 4), prompt(30, 5)
    (mixed, other), produced = read(core("auto", weights="q8"), [long, short], 6)
    (expanded,), (tokens,) = read(core("expanded", weights="q8"), [long], 6)
    assert np.array_equal(mixed, expanded) and produced[0] == tokens
    (absorbed,), (tokens,) = read(core("absorbed", weights="q8"), [short], 6)
    assert np.array_equal(other, absorbed) and produced[1] == tokens
    assert not np.array_equal(mixed, read(core("absorbed", weights="q8"), [long])[0][0])


def test_a_sequence_that_gave_its_pages_back_goes_on_unchanged():
    texts = [prompt(150, 6), prompt(150, 7)]
    expected = [read(core("expanded", weights="q8"), [text], 200)[1][0] for text in texts]
    crowded = core("expanded", weights="q8", cache_tokens=448)
    assert read(crowded, texts, 200)[1] == expected


def test_when_it_pays():
    v3 = MLAConfig(
        num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128,
    )  # fmt: skip
    assert expands_from(replace(CONFIG, attention=v3)) == 512
    narrow = replace(CONFIG.attention, kv_lora_rank=16)  # a latent narrower than a head's keys and values
    assert expands_from(replace(CONFIG, attention=narrow)) is None
    dense = replace(
        CONFIG,
        model_type="llama",
        moe=None,
        attention=GQAConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=16),
    )
    assert expands_from(dense) is None and expand_from("absorbed", CONFIG) is None
    odd = replace(CONFIG, attention=replace(CONFIG.attention, qk_nope_head_dim=21))
    assert expand_from("auto", odd) is None
    for config, form in ((CONFIG, "both"), (dense, "expanded"), (odd, "expanded")):
        with pytest.raises(ConfigError, match="prefill"):
            expand_from(form, config)
