"""Speculation by the model's own multi-token-prediction layer: its guesses, and that they change no output."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.engine.core import Core
from shoal.engine.params import SamplingParams
from shoal.engine.sampler import Sampler
from shoal.engine.sequence import Sequence

torch = pytest.importorskip("torch")

from shoal.model.load import as_checkpoint, random_model  # noqa: E402

VOCAB = 211
CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=VOCAB,
    hidden_size=56,
    intermediate_size=72,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    rope=RopeConfig(interleave=True),
    attention=MLAConfig(
        num_attention_heads=3,
        kv_lora_rank=24,
        qk_nope_head_dim=12,
        qk_rope_head_dim=6,
        v_head_dim=10,
        q_lora_rank=20,
    ),
    moe=MoEConfig(
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
    ),
)


def make_model(seed: int):
    model = random_model(CONFIG, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture(scope="module")
def repeater():
    """Layers that add nothing, and a next token that is always the current one plus one: the guess is always right."""
    model = make_model(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1.0)
        table = model.model.embed_tokens.weight
        model.lm_head.weight.copy_(torch.roll(table, 1, 0))
        join = model.model.layers[2].eh_proj.weight
        join.zero_()
        join[:, : CONFIG.hidden_size].copy_(torch.eye(CONFIG.hidden_size))
    return model


def core(model, **options) -> Core:
    return Core(as_checkpoint(model), threads=2, weights="f32", cache="f32", cache_tokens=1024, **options)


def generate(engine: Core, prompt: list[int], count: int, **options) -> Sequence:
    params = SamplingParams(max_tokens=count, ignore_eos=True, **{"temperature": 0.0, **options})
    sequence = Sequence(
        tokens=list(prompt),
        prompt_tokens=len(prompt),
        params=params,
        sampler=Sampler(params, prompt, VOCAB),
        max_tokens=count,
    )
    engine.submit(sequence)
    while sequence.finish is None:
        engine.step()
    engine.release(sequence)
    assert sequence.error is None
    return sequence


def test_the_guess_is_the_prediction_layers(model):
    """After every step the noted guess equals the readable network's over the same text."""
    engine = core(model, look_ahead=True)
    assert engine.looks_ahead
    prompt = np.random.default_rng(0).integers(0, VOCAB, 70).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    sequence = Sequence(
        tokens=list(prompt), prompt_tokens=70, params=params, sampler=Sampler(params, prompt, VOCAB), max_tokens=12
    )
    engine.submit(sequence)
    seen = 0
    while sequence.finish is None:
        engine.step()
        if sequence.finish is None and sequence.ahead is not None:
            length, guess = sequence.ahead
            assert length == len(sequence.tokens)
            text = torch.tensor([sequence.tokens])
            with torch.no_grad():
                states = model.states(text[:, :-1])
                further = model.predict_further(states.hidden_BTD, text[:, 1:])
                assert guess == int(model.logits(further.hidden_BTD)[0, -1].argmax())
            seen += 1
    engine.release(sequence)
    assert seen >= 10


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}])
def test_output_does_not_change(model, options):
    prompt = np.random.default_rng(1).integers(0, VOCAB, 90).tolist()
    plain = generate(core(model), prompt, 40, **options)
    ahead = generate(core(model, look_ahead=True), prompt, 40, **options)
    assert ahead.tokens == plain.tokens
    assert plain.drafted == 0
    assert ahead.drafted > 30


def test_right_guesses_halve_the_steps(repeater):
    engine = core(repeater, look_ahead=True)
    sequence = generate(engine, [3], 41)
    assert sequence.tokens == list(range(3, 45))
    assert sequence.accepted == sequence.drafted == 20


def test_a_model_without_the_layer_runs_without_guesses(model):
    from dataclasses import replace

    bare = random_model(replace(CONFIG, num_nextn_predict_layers=0), 0)
    engine = core(bare, look_ahead=True)
    assert not engine.looks_ahead
    assert generate(engine, [1, 2, 3], 8).drafted == 0
