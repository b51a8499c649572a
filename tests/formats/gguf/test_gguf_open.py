"""Files made by the `gguf` package, and a real one, opened as checkpoints."""

from dataclasses import replace

import numpy as np
import pytest

from shoal.config import RopeConfig, RopeScaling
from shoal.errors import ConfigError, FileError
from shoal.formats.checkpoint import open_checkpoint
from shoal.formats.gguf import open_gguf

gguf = pytest.importorskip("gguf")
TYPE = gguf.GGMLQuantizationType


LLAMA_KEYS = {
    "block_count": 2,
    "context_length": 256,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 16,
}
SPECIAL = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def pairwise(rows, heads):
    """llama.cpp's own conversion of q and k (conversion/llama.py), on whatever stands in a row."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def llama_tensors(weights, *, order=pairwise, q_heads=4, kv_heads=2):
    names = {
        **PARTS, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "model.layers.": "blk.",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    out = {}
    for name, array in weights.items():
        if ".q_proj." in name:
            array = order(array, q_heads)
        elif ".k_proj." in name:
            array = order(array, kv_heads)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        out[name] = np.ascontiguousarray(array)
    return out


@pytest.mark.parametrize("biased", [False, True])
def test_llama(build, same_weights, make_config, make_weights, biased):
    config = make_config("llama")
    if biased:
        config = replace(config, attention=replace(config.attention, qkv_bias=True, o_bias=True), mlp_bias=True)
    weights = make_weights(config)
    checkpoint = open_checkpoint(build("llama", LLAMA_KEYS, llama_tensors(weights), SPECIAL))
    assert checkpoint.config == config
    same_weights(checkpoint, weights)
    checkpoint.check_complete()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_rows_are_not_permuted(build, same_weights, make_config, make_weights, model_type):
    config = make_config(model_type, tie_word_embeddings=True)
    weights = make_weights(config)
    tensors = llama_tensors(weights, order=lambda rows, heads: rows)
    checkpoint = open_gguf(build(model_type, LLAMA_KEYS, tensors, SPECIAL))
    assert checkpoint.config == config
    same_weights(checkpoint, weights)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_rows_come_out_in_our_order(build, make_config, make_weights, kind):
    """The stored blocks of q and k are reordered whole, so that dequantising them gives the same as reading."""
    weights = make_weights(make_config("llama"))
    stored = {
        name: (gguf.quants.quantize(array, TYPE[kind]), TYPE[kind]) if array.ndim == 2 else array
        for name, array in llama_tensors(weights).items()
    }
    checkpoint = open_gguf(build("llama", LLAMA_KEYS, stored))
    for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", None)):
        tensor = checkpoint.tensors[f"model.layers.1.self_attn.{name}.weight"]
        values = gguf.quants.dequantize(stored[f"blk.1.attn_{name[0]}.weight"][0], TYPE[kind])
        ours = values if heads is None else values.reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(values.shape)
        assert tensor.dtype == kind
        assert np.array_equal(tensor.read(), ours)
        assert np.abs(tensor.read() - weights[tensor.name]).max() < 0.1
        assert (tensor.raw_blocks is not None) == kind.startswith("Q")
        if tensor.raw_blocks is not None:
            assert np.array_equal(gguf.quants.dequantize(tensor.raw_blocks(), TYPE[kind]), ours)


def test_smollm2(smollm2):
    """The values of every tensor of a real file equal the gguf package's, whose order of q and k is the file's."""
    checkpoint = open_gguf(smollm2)
    reader = gguf.GGUFReader(smollm2)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert checkpoint.config.attention.num_key_value_heads == 3
    assert checkpoint.config.tie_word_embeddings
    assert checkpoint.config.rope == RopeConfig(rope_theta=100000.0)
    assert checkpoint.config.rms_norm_eps == 1e-5
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in (0, 17, 29):
        for part, other in PARTS.items():
            names[f"model.layers.{layer}.{part}.weight"] = f"blk.{layer}.{other}.weight"
    for ours, name in names.items():
        values = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        if "attn_q" in name or "attn_k" in name:
            values = values.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(values.shape)
        assert np.array_equal(checkpoint.tensors[ours].read(), values), name
    assert len(theirs) == len(checkpoint.tensors)


def test_generation_settings(build, make_config, make_weights):
    sampling = {"general.sampling.temp": 0.6, "general.sampling.top_p": 0.95, "general.sampling.top_k": 40}
    path = build("llama", LLAMA_KEYS, llama_tensors(make_weights(make_config("llama"))), sampling)
    generation = open_gguf(path).generation
    assert (generation.temperature, generation.top_p, generation.top_k, generation.min_p) == (0.6, 0.95, 40, None)


def llama3_by_hand(theta, dim, factor, low, high, original):
    """As llama.cpp's conversion computes it (conversion/llama.py), frequency by frequency."""
    out = []
    for index in range(0, dim, 2):
        wavelength = 2 * np.pi * theta ** (index / dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 8.0, 2048)]
)
def test_llama3_scaling_is_found_from_its_factors(build, make_config, make_weights, factor, low, high, original):
    config = make_config("llama", hidden_size=512)
    config = replace(config, attention=replace(config.attention, head_dim=128))
    tensors = llama_tensors(make_weights(config))
    tensors["rope_freqs.weight"] = llama3_by_hand(5e5, 128, factor, low, high, original)
    keys = {**LLAMA_KEYS, "embedding_length": 512, "rope.dimension_count": 128, "rope.freq_base": 5e5}
    scaling = open_gguf(build("llama", keys, tensors)).config.rope.scaling
    assert scaling == RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


def test_rope_factors_of_one_mean_no_scaling(build, make_config, make_weights):
    tensors = llama_tensors(make_weights(make_config("llama")))
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    assert open_gguf(build("llama", LLAMA_KEYS, tensors)).config.rope.scaling is None


@pytest.mark.parametrize(
    "factors", [[1, 1, 1, 2, 1, 8, 8, 8], [1, 1, 1, 1, 2, 3, np.nan, 8], [0, 1, 1, 1, 1, 1, 1, 1], [1, 2]]
)
def test_other_rope_factors_are_refused(build, make_config, make_weights, factors):
    tensors = llama_tensors(make_weights(make_config("llama")))
    tensors["rope_freqs.weight"] = np.array(factors, np.float32)
    with pytest.raises(FileError, match=r"rope_freqs\.weight"):
        open_gguf(build("llama", LLAMA_KEYS, tensors))


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling(rope_type="linear", factor=4.0)),
        ({"rope.scale_linear": 2.0}, RopeScaling(rope_type="linear", factor=2.0)),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        ),
    ],
)
def test_rope_scaling_keys(build, make_config, make_weights, keys, scaling):
    path = build("llama", {**LLAMA_KEYS, **keys}, llama_tensors(make_weights(make_config("llama"))))
    assert open_gguf(path).config.rope.scaling == scaling


WRONG = {
    "mixtral": ({"expert_count": 8}, "llama.expert_count: experts"),
    "partial rotation": ({"rope.dimension_count": 8}, "rope.dimension_count: must equal the head size 16"),
    "other value size": ({"attention.value_length": 8}, "attention.value_length: must equal"),
    "no heads": ({"attention.head_count": 0}, "attention.head_count: must be at least 1"),
    "text for a number": ({"embedding_length": "wide"}, "llama.embedding_length: should be of type int"),
    "flag for a number": ({"embedding_length": True}, "llama.embedding_length: should be of type int"),
    "heads differ by layer": ({"attention.head_count_kv": [2, 1]}, "differs between layers"),
    "longrope": ({"rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    "too many blocks": ({"block_count": 1 << 31}, "do not go with 21 tensors"),
    "no blocks": ({"block_count": 0}, "do not go with"),
    "one block too many": ({"block_count": 3}, "blk.2.attn_norm.weight: is missing"),
    "one block too few": ({"block_count": 1}, "blk.1.attn_norm.weight: is no part of this architecture"),
    "other width": ({"feed_forward_length": 100}, "blk.0.ffn_gate.weight: has shape [96, 64], the metadata"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_metadata_are_named(build, make_config, make_weights, name):
    keys, message = WRONG[name]
    path = build("llama", {**LLAMA_KEYS, **keys}, llama_tensors(make_weights(make_config("llama"))))
    with pytest.raises(FileError) as error:
        open_gguf(path)
    assert message in str(error.value)


def test_one_value_for_all_layers_may_be_a_list(build, make_config, make_weights):
    keys = {**LLAMA_KEYS, "attention.head_count_kv": [2, 2]}
    path = build("llama", keys, llama_tensors(make_weights(make_config("llama"))))
    assert open_gguf(path).config.attention.num_key_value_heads == 2


def test_impossible_sizes_are_config_errors(build, make_config, make_weights):
    keys = {**LLAMA_KEYS, "attention.head_count_kv": 3}
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        open_gguf(build("llama", keys, llama_tensors(make_weights(make_config("llama")))))


def test_missing_key_other_architecture_and_strange_tensors(build, make_config, make_weights):
    tensors = llama_tensors(make_weights(make_config("llama")))
    short = {key: value for key, value in LLAMA_KEYS.items() if key != "context_length"}
    with pytest.raises(FileError, match=r"llama\.context_length: is missing"):
        open_gguf(build("llama", short, tensors))
    with pytest.raises(FileError, match="architecture 'gemma3' is not supported"):
        open_gguf(build("gemma3", LLAMA_KEYS, tensors))
    with pytest.raises(FileError, match=r"blk\.0\.attn_sinks\.weight: is no part"):
        open_gguf(build("llama", LLAMA_KEYS, {**tensors, "blk.0.attn_sinks.weight": np.ones(4, np.float32)}))
    with pytest.raises(FileError, match="has 300 tokens, the embedding only 288 rows"):
        open_gguf(build("llama", LLAMA_KEYS, tensors, {"tokenizer.ggml.tokens": [f"t{i}" for i in range(300)]}))
    del tensors["token_embd.weight"]
    with pytest.raises(FileError, match=r"token_embd\.weight: is missing"):
        open_gguf(build("llama", LLAMA_KEYS, tensors))


def test_shards(build, same_weights, tmp_path, make_config, make_weights):
    config = make_config("llama")
    weights = make_weights(config)
    tensors = list(llama_tensors(weights).items())
    parts = ({}, dict(tensors[:9]), dict(tensors[9:]))  # llama.cpp's splitter can leave the first one empty
    for index, part in enumerate(parts):
        extra = {"split.no": index, "split.count": 3, **SPECIAL}
        build("llama", LLAMA_KEYS if index == 0 else {}, part, extra, f"m-{index + 1:05d}-of-00003.gguf")
    checkpoint = open_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert checkpoint.config == config
    same_weights(checkpoint, weights)
    with pytest.raises(FileError, match=r"is shard 2 of 3; open m-00001-of-00003\.gguf"):
        open_gguf(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(FileError, match=r"m-00003-of-00003\.gguf: cannot be read"):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(FileError, match="is one of 3 shards but is not named"):
        open_gguf(tmp_path / "elsewhere.gguf")
