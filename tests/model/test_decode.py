"""One text read in different ways must give the same logits: whole, cached, in chunks, in batches, packed, absorbed."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from shoal.model import KVCache, LatentCache, new_cache  # noqa: E402

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.6,
}
CASES = {
    "v2": {"model_type": "deepseek_v2", "rope_parameters": YARN},
    "v3": {"model_type": "deepseek_v3", "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    "v3-half-split": {"model_type": "deepseek_v3", "rope_interleave": False, "attention_bias": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 3, "num_key_value_heads": 3, "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
LATENT = ["v2", "v3", "v3-half-split"]
T = 23

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def some_tokens(batch: int = 2, length: int = T):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def read_in_chunks(model, tokens_BT, chunks, **how):
    assert sum(chunks) == tokens_BT.shape[1]
    cache = new_cache(model.config, batch=len(tokens_BT), capacity=tokens_BT.shape[1])
    return torch.cat([model(part, cache=cache, **how) for part in tokens_BT.split(chunks, dim=1)], dim=1)


@every_case
@pytest.mark.parametrize("chunks", [[1] * T, [T], [7, 1, 1, 9, 5]], ids=["single", "whole", "chunks"])
def test_cached_equals_whole(name, chunks, randomised):
    model = randomised(CASES[name])
    tokens_BT = some_tokens()
    assert_same(read_in_chunks(model, tokens_BT, chunks), model(tokens_BT))


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("chunks", [[1] * T, [T], [7, 1, 1, 9, 5]], ids=["single", "whole", "chunks"])
def test_absorbed_equals_expanded(name, chunks, randomised):
    model = randomised(CASES[name])
    tokens_BT = some_tokens()
    whole = model(tokens_BT)
    assert_same(model(tokens_BT, absorbed=True), whole)
    assert_same(read_in_chunks(model, tokens_BT, chunks, absorbed=True), whole)


@pytest.mark.parametrize("name", LATENT)
def test_forms_may_change_within_one_text(name, randomised):
    """Prefill expanded, decode absorbed: what serving does. Both read the same cache."""
    model = randomised(CASES[name])
    tokens_BT = some_tokens()
    cache = new_cache(model.config, batch=2, capacity=T)
    parts = [model(tokens_BT[:, :15], cache=cache)]
    parts += [model(tokens_BT[:, i : i + 1], cache=cache, absorbed=True) for i in range(15, T)]
    assert_same(torch.cat(parts, dim=1), model(tokens_BT))


@every_case
def test_batch_of_two_equals_singles(name, randomised):
    model = randomised(CASES[name])
    tokens_BT = some_tokens()
    singles = torch.cat([model(row[None]) for row in tokens_BT])
    assert_same(model(tokens_BT), singles)


@every_case
def test_later_tokens_do_not_change_earlier_logits(name, randomised):
    model = randomised(CASES[name])
    tokens_BT = some_tokens()
    changed = tokens_BT.clone()
    changed[:, 14:] = (changed[:, 14:] + 1) % 97
    before, after = model(tokens_BT), model(changed)
    assert_same(after[:, :14], before[:, :14])
    assert (after[:, 14:] - before[:, 14:]).abs().amax(-1).min() > 1e-2


@every_case
def test_last_only_is_the_last(name, randomised):
    model = randomised(CASES[name])
    tokens_BT = some_tokens()
    last = model(tokens_BT, last_only=True)
    assert last.shape == (2, 1, 97)
    assert_same(last, model(tokens_BT)[:, -1:])


@every_case
def test_packed_documents_do_not_see_each_other(name, randomised):
    model = randomised(CASES[name])
    tokens_BT = some_tokens()
    documents_BT = torch.tensor([[0] * 9 + [1] * (T - 9), [5] * 16 + [2] * (T - 16)])
    packed = model(tokens_BT, documents_BT=documents_BT)
    for row, cut in enumerate((9, 16)):
        assert_same(packed[row, :cut], model(tokens_BT[row : row + 1, :cut])[0])
        assert_same(packed[row, cut:], model(tokens_BT[row : row + 1, cut:])[0])


@pytest.mark.parametrize("name", LATENT)
def test_packed_documents_in_the_absorbed_form(name, randomised):
    model = randomised(CASES[name])
    tokens_BT, documents_BT = some_tokens(), torch.tensor([[0] * 9 + [1] * (T - 9)] * 2)
    ours = model(tokens_BT, documents_BT=documents_BT, absorbed=True)
    assert_same(ours, model(tokens_BT, documents_BT=documents_BT))


@every_case
def test_a_shorter_length_forgets(name, randomised):
    """A rejected draft is taken back by lowering the length."""
    model = randomised(CASES[name])
    tokens_BT = some_tokens()
    cache = new_cache(model.config, batch=2, capacity=T)
    model(tokens_BT[:, :10], cache=cache)
    model(tokens_BT[:, 17:21], cache=cache)
    assert cache.length == 14
    cache.length = 10
    assert_same(model(tokens_BT[:, 10:], cache=cache), model(tokens_BT)[:, 10:])


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_size_is_what_the_configuration_says(name, dtype, config_of):
    config = config_of(CASES[name])
    cache = new_cache(config, batch=3, capacity=11, dtype=dtype)
    assert isinstance(cache, LatentCache if config.is_mla else KVCache)
    assert cache.capacity == 11
    assert cache.bytes_per_token == config.num_hidden_layers * config.attention.cache_width * dtype.itemsize


@every_case
def test_a_full_cache_refuses_more(name, randomised):
    model = randomised(CASES[name])
    cache = new_cache(model.config, batch=1, capacity=4)
    model(some_tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens a row; 3 are taken and 2 more came"):
        model(some_tokens(1, 2), cache=cache)
    assert cache.length == 3


def test_documents_and_a_filled_cache_do_not_mix(randomised):
    model = randomised(CASES["v3"])
    cache = new_cache(model.config, batch=1, capacity=8)
    model(some_tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="documents_BT"):
        model(some_tokens(1, 2), cache=cache, documents_BT=torch.zeros(1, 2))


@every_case
def test_bfloat16_stays_near_float32(name, randomised):
    model = randomised(CASES[name])
    tokens_BT = some_tokens(1)
    exact = model(tokens_BT)
    model = model.bfloat16()
    cache = new_cache(model.config, batch=1, capacity=T, dtype=torch.bfloat16)
    ways = [model(tokens_BT), model(tokens_BT, cache=cache)]
    if name in LATENT:
        ways.append(model(tokens_BT, absorbed=True))
    for logits in ways:
        assert logits.dtype == torch.bfloat16
        # Rounding may flip a pick of the router, so the typical error is what is bounded.
        assert (logits.float() - exact).abs().median() < 0.05 * exact.std()
