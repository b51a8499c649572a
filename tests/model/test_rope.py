"""Rotary positions: frequencies against transformers, and the properties the rest relies on."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from shoal.config import MLAConfig, RopeConfig, RopeScaling  # noqa: E402
from shoal.errors import ConfigError  # noqa: E402
from shoal.model.rope import rope_table, rotate  # noqa: E402
from shoal.positions import attention_factor, frequencies, softmax_scale  # noqa: E402

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn-deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "yarn-plain": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-uneven": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 100,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn-step": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "beta_fast": 1.0},
    "yarn-given": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 100,
        "attention_factor": 1.25,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}


def ours(name: str, theta: float = 10000.0, interleave: bool = False) -> RopeConfig:
    scaling = SCALINGS[name]
    return RopeConfig(rope_theta=theta, scaling=RopeScaling(**scaling) if scaling else None, interleave=interleave)


@pytest.mark.parametrize("dim", [6, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name, theta, dim):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        head_dim=dim, rope_parameters={"rope_type": "default", **(SCALINGS[name] or {}), "rope_theta": theta}
    )
    theirs = LlamaRotaryEmbedding(config)
    rope = ours(name, theta)
    # NumPy's and PyTorch's powers may round a bit apart, so a unit or two in the last place is the closest there is.
    torch.testing.assert_close(torch.from_numpy(frequencies(rope, dim)), theirs.inv_freq, rtol=3e-7, atol=0)
    assert attention_factor(rope.scaling) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("given", [{"factor": 4.0}, {"factor": 1.0}, {"factor": 1.0, "attention_factor": 1.25}])
def test_a_divisor_for_each_frequency_equals_transformers(given):
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    divisors = [1.0, 0.3, 7.5, 41.0]
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 128, **given}
    parameters = {**scaling, "rope_theta": 500.0, "short_factor": divisors, "long_factor": divisors}
    theirs = DeepseekV3RotaryEmbedding(transformers.DeepseekV3Config(qk_rope_head_dim=8, rope_parameters=parameters))
    listed = RopeScaling(**scaling, short_factor=tuple(divisors), long_factor=tuple(divisors))
    rope = RopeConfig(rope_theta=500.0, scaling=listed)
    torch.testing.assert_close(torch.from_numpy(frequencies(rope, 8)), theirs.inv_freq, rtol=3e-7, atol=0)
    assert attention_factor(rope.scaling) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("interleave", [False, True])
def test_scores_depend_on_distance_only(interleave):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    rope = ours("yarn-plain", interleave=interleave)

    def score(at_q: int, at_k: int):
        turned_q = rotate(q, rope_table(rope, 8, torch.tensor([at_q])))
        turned_k = rotate(k, rope_table(rope, 8, torch.tensor([at_k])))
        return (turned_q * turned_k).sum(-1)

    torch.testing.assert_close(score(17, 5), score(112, 100), rtol=0, atol=1e-4)
    assert (score(17, 5) - score(17, 6)).abs().max() > 1e-2


def test_the_two_layouts_are_one_rotation_in_another_order():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)
    pairs_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # half-split order of interleaved pairs
    interleaved = rotate(x, rope_table(ours("default", interleave=True), 8, positions))
    half_split = rotate(x[..., pairs_first], rope_table(ours("default"), 8, positions))
    torch.testing.assert_close(interleaved[..., pairs_first], half_split, rtol=1e-6, atol=1e-6)
    assert not torch.equal(interleaved, rotate(x, rope_table(ours("default"), 8, positions)))


def test_first_pair_turns_one_radian_a_position():
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)
    turned = rotate(x, rope_table(ours("default", interleave=True), 4, torch.tensor([3])))
    expected = [math.cos(3), math.sin(3), math.cos(0.03), math.sin(0.03)]
    torch.testing.assert_close(turned.flatten(), torch.tensor(expected))


def test_rotation_keeps_the_dtype_and_computes_in_float32():
    x = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rope_table(ours("default"), 8, torch.arange(1000, 1004))
    assert rotate(x, table).dtype == torch.bfloat16
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


@pytest.mark.parametrize(
    ("mscale", "scale"),
    [(1.0, 0.1352338), (0.707, 0.114721), (0.0, 192**-0.5), (None, 192**-0.5)],  # V3, V2-Lite, off, absent
)
def test_softmax_scale_of_released_models(mscale, scale):
    mla = MLAConfig(num_attention_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    yarn = {**SCALINGS["yarn-deepseek"], "mscale": mscale, "mscale_all_dim": mscale}
    assert softmax_scale(mla, RopeConfig(scaling=RopeScaling(**yarn))) == pytest.approx(scale, rel=1e-5)


def test_yarn_needs_a_base_above_one():
    with pytest.raises(ConfigError, match="rope_theta"):
        frequencies(ours("yarn-plain", theta=1.0), 8)
