"""Files we write, read back by us and by the `gguf` package."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from shoal.config import MLAConfig, RopeConfig, RopeScaling
from shoal.errors import ConfigError, FileError
from shoal.formats.checkpoint import Checkpoint, LazyTensor
from shoal.formats.gguf import open_gguf, read_gguf, write_gguf
from shoal.formats.gguf_quants import FORMATS
from shoal.formats.gguf_writer import write_model

gguf = pytest.importorskip("gguf")

YARN = RopeScaling(
    rope_type="yarn", factor=40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707
)
MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama linear": ("llama", {"rope": RopeConfig(scaling=RopeScaling(rope_type="linear", factor=2.0))}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"rope": RopeConfig(scaling=replace(YARN, mscale=None, mscale_all_dim=None))}),
    "v2": ("deepseek_v2", {}),
    "v3": ("deepseek_v3", {}),
    "v3 yarn": ("deepseek_v3", {"rope": RopeConfig(scaling=YARN, interleave=True)}),
    "v3 MTP": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
    "dense MLA": ("deepseek_v2", {"moe": None}),
}  # fmt: skip


@pytest.fixture
def write(tmp_path, as_tensors, vocabulary):
    def run(config, weights, dtype="F32", *, tensors=None, fields=vocabulary, name="out.gguf", progress=None):
        path = tmp_path / name
        write_model(config, tensors or as_tensors(weights), fields, path, dtype=dtype, progress=progress)
        return path

    return run


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_reads_back(write, same_weights, make_config, make_weights, name):
    model_type, changes = MODELS[name]
    config = make_config(model_type, **changes)
    weights = make_weights(config)
    checkpoint = open_gguf(write(config, weights))
    assert checkpoint.config == config
    same_weights(checkpoint, weights)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_the_gguf_package_reads_it(write, make_config, make_weights, vocabulary, dtype):
    config = make_config("llama")
    weights = make_weights(config)
    reader = gguf.GGUFReader(write(config, weights, dtype))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = gguf.GGMLQuantizationType[dtype]
    for name, array in (("blk.1.ffn_up.weight", weights["model.layers.1.mlp.up_proj.weight"]),
                        ("blk.0.attn_v.weight", weights["model.layers.0.self_attn.v_proj.weight"])):  # fmt: skip
        assert tensors[name].tensor_type == kind
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        assert np.array_equal(gguf.quants.dequantize(tensors[name].data, kind), expected)
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    pairwise = query.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    expected = gguf.quants.dequantize(gguf.quants.quantize(pairwise, kind), kind)
    assert np.array_equal(gguf.quants.dequantize(tensors["blk.0.attn_q.weight"].data, kind), expected)
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert reader.get_field("tokenizer.ggml.tokens").contents() == vocabulary["tokenizer.ggml.tokens"] + [
        f"[PAD{index}]" for index in range(len(vocabulary["tokenizer.ggml.tokens"]), 288)
    ]
    assert (
        reader.get_field("general.file_type").contents()
        == gguf.LlamaFileType[{"F32": "ALL_F32"}.get(dtype, f"MOSTLY_{dtype}")]
    )


def test_the_sensitive_tensors_stay_precise(write, make_config, make_weights):
    config = make_config("deepseek_v3")
    with pytest.warns(UserWarning, match="3 tensors whose rows are no whole blocks are stored as F16") as caught:
        path = write(config, make_weights(config), "Q4_0")
    assert len(caught) == 1
    kinds = {name: info.dtype for name, info in read_gguf(path).tensors.items()}
    assert kinds["blk.1.ffn_gate_exps.weight"] == kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == kinds["output_norm.weight"] == "F32"
    assert {kinds[f"blk.2.attn_{part}.weight"] for part in ("k_b", "v_b", "kv_a_mqa", "q_a")} == {"Q8_0"}
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q_b.weight"] == "F16", "rows of 48 are no whole blocks"
    tied = make_config("llama", tie_word_embeddings=True)
    assert read_gguf(write(tied, make_weights(tied), "Q4_1")).tensors["token_embd.weight"].dtype == "Q8_0"


def test_keep_copies_stored_blocks(write, make_config, make_weights):
    """Blocks of a GGUF source go through unchanged, whatever order our own rows have."""
    config = make_config("llama")
    source = write(config, make_weights(config), "Q4_1", name="source.gguf")
    copy = write(config, None, "keep", tensors=open_gguf(source).tensors, name="copy.gguf")
    before, after = read_gguf(source), read_gguf(copy)
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert before.tensors[name].dtype == after.tensors[name].dtype
        assert np.array_equal(before.stored(name), after.stored(name)), name
    assert before.fields["general.file_type"] == after.fields["general.file_type"] == 3


def test_keep_leaves_plain_types_and_widens_fp8(write, make_config, make_weights, as_tensors):
    config = make_config("deepseek_v3")
    weights = make_weights(config)
    tensors = as_tensors(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    half = weights[name].astype(ml_dtypes.bfloat16)
    tensors[name] = replace(tensors[name], dtype="F8_E4M3", make_chunks=lambda: iter([half]))
    info = read_gguf(write(config, None, "keep", tensors=tensors))
    assert info.tensors["blk.0.ffn_up.weight"].dtype == "BF16"
    assert np.array_equal(info.stored("blk.0.ffn_up.weight").view(ml_dtypes.bfloat16), half)
    assert info.tensors["blk.0.ffn_down.weight"].dtype == "F32"


def test_half_split_deepseek_becomes_an_interleaved_one(write, make_config, make_weights):
    """Row j and row j + R/2 of the rotary part become neighbours, in the queries of every head and the shared key."""
    config = make_config("deepseek_v3", rope=RopeConfig())
    weights = make_weights(config)
    checkpoint = open_gguf(write(config, weights))
    assert checkpoint.config.rope.interleave
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert np.array_equal(checkpoint.tensors[name].read()[:32], weights[name][:32])
    assert np.array_equal(checkpoint.tensors[name].read()[32:36], weights[name][[32, 40, 33, 41]])
    name = "model.layers.1.self_attn.q_b_proj.weight"
    queries, before = checkpoint.tensors[name].read().reshape(4, 48, 48), weights[name].reshape(4, 48, 48)
    assert np.array_equal(queries[:, :32], before[:, :32])
    assert np.array_equal(queries[:, 32:36], before[:, [32, 40, 33, 41]])


def test_chunks_need_not_fall_on_heads(write, same_weights, make_config, make_weights, as_tensors):
    """A source may hand out rows in any portions; llama's q and MLA's kv_b are regrouped into whole heads."""
    for model_type in ("llama", "deepseek_v3"):
        config = make_config(model_type)
        weights = make_weights(config)

        def portions(array):
            return lambda: (array[start : start + 7] for start in range(0, len(array), 7))

        tensors = {name: replace(tensor, make_chunks=portions(weights[name]))
                   for name, tensor in as_tensors(weights).items()}  # fmt: skip
        same_weights(open_gguf(write(config, None, tensors=tensors)), weights)


def test_progress_ends_at_all_bytes(write, make_config, make_weights):
    seen = []
    config = make_config("qwen2")
    path = write(config, make_weights(config), progress=lambda done, total: seen.append((done, total)))
    (total,) = {total for _, total in seen}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert path.stat().st_size - total < seen[-1][0] + 4096
    assert 0 <= total - seen[-1][0] < 32


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "Q8_0"), (1e6, "F16"), (np.inf, "Q4_1"), (-1e5, "Q4_0")])
def test_values_that_do_not_fit_leave_nothing_behind(write, tmp_path, make_config, make_weights, value, dtype):
    config = make_config("llama")
    weights = make_weights(config)
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    (tmp_path / "out.gguf").write_bytes(b"precious")
    with pytest.raises(
        FileError, match=rf"layers\.1\.mlp\.up_proj\.weight: holds {value}.*, which {dtype} cannot store"
    ):
        write(config, weights, dtype)
    assert (tmp_path / "out.gguf").read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_full_disk_is_noticed_before_writing(write, make_config, make_weights, monkeypatch, tmp_path):
    from shoal.formats import gguf_writer

    monkeypatch.setattr(gguf_writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    config = make_config("llama")
    with pytest.raises(FileError, match=r"needs \d+ bytes, the disk has 1000 left"):
        write(config, make_weights(config))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(write, make_config, make_weights):
    config = make_config("llama")
    with pytest.raises(FileError, match="cannot be written"):
        write(config, make_weights(config), name="none/out.gguf")


def impossible(make_config):
    v3, qwen = make_config("deepseek_v3"), make_config("qwen2")
    llama3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
    assert isinstance(v3.attention, MLAConfig)
    return {
        "moe_layer_freq": replace(v3, moe=replace(v3.moe, moe_layer_freq=2)),
        "topk_method": replace(v3, moe=replace(v3.moe, scoring_func="softmax")),
        "attention_bias": replace(v3, attention=replace(v3.attention, attention_bias=True)),
        "rope_scaling.mscale": replace(v3, rope=RopeConfig(scaling=replace(YARN, mscale=1.0), interleave=True)),
        "rope_scaling.rope_type": replace(qwen, rope=RopeConfig(scaling=llama3)),
        "rope_interleave": replace(qwen, rope=RopeConfig(interleave=True)),
    }


@pytest.mark.parametrize("field", ["moe_layer_freq", "topk_method", "attention_bias", "rope_scaling.mscale",
                                   "rope_scaling.rope_type", "rope_interleave"])  # fmt: skip
def test_what_gguf_cannot_say_is_refused(write, tmp_path, make_config, make_weights, field):
    config = impossible(make_config)[field]
    with pytest.raises(ConfigError) as error:
        write(config, make_weights(config))
    assert error.value.field == field
    assert not list(tmp_path.iterdir())


def differing(make_config):
    v2, v3 = make_config("deepseek_v2"), make_config("deepseek_v3")
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    return {
        "YaRN attention": replace(v2, rope=RopeConfig(scaling=replace(YARN, mscale_all_dim=None), interleave=True)),
        "two best": replace(v2, moe=replace(v2.moe, **groups)),
        "without shared experts": replace(v3, moe=replace(v3.moe, n_shared_experts=0)),
        "26 or 27 layers": replace(v3, num_hidden_layers=26),
    }


@pytest.mark.parametrize("what", ["YaRN attention", "two best", "without shared experts", "26 or 27 layers"])
def test_where_llama_cpp_differs_is_said_once(write, same_weights, make_config, make_weights, what):
    config = differing(make_config)[what]
    weights = make_weights(config)
    with pytest.warns(UserWarning, match="llama.cpp") as caught:
        checkpoint = open_gguf(write(config, weights))
    assert [what in str(warning.message) for warning in caught] == [True]
    same_weights(checkpoint, weights)


def test_more_tokens_than_rows(write, make_config, make_weights, vocabulary):
    config = make_config("llama")
    fields = {**vocabulary, "tokenizer.ggml.tokens": [f"t{index}" for index in range(289)]}
    with pytest.raises(ConfigError, match="288 rows for a tokenizer of 289 tokens"):
        write(config, make_weights(config), fields=fields)


def test_unknown_dtype(write, make_config, make_weights):
    config = make_config("llama")
    with pytest.raises(ConfigError, match="dtype: 'Q4_K' is not one of F16, F32"):
        write(config, make_weights(config), "Q4_K")


def test_tensors_larger_than_a_piece_stream_through(write, make_config):
    """No piece handed to the disk is larger than the bound, and rows of a constant come back right."""
    config = make_config("llama", vocab_size=200_000)
    sizes = []

    def tensor(name, shape):
        def chunks():
            yield np.broadcast_to(np.float32(0.5), shape)

        return LazyTensor(name=name, shape=shape, dtype="F32", source=None, make_chunks=chunks)

    from shoal.formats.layout import expected_tensors

    tensors = {name: tensor(name, shape) for name, shape in expected_tensors(config).items()}
    path = write(config, None, "Q8_0", tensors=tensors, fields={}, progress=lambda done, _: sizes.append(done))
    assert max(np.diff(sizes)) <= (1 << 22) // 32 * FORMATS["Q8_0"].size
    assert np.allclose(open_gguf(path).tensors["model.embed_tokens.weight"].read(), 0.5, rtol=1e-3)


def test_a_whole_checkpoint_with_tokenizer_and_chat(tmp_path, smollm2):
    """The real model through the public door: same weights, same ids, same conversation."""
    pytest.importorskip("shoal.formats.gguf_tokenizer")
    checkpoint = open_gguf(smollm2)
    write_gguf(checkpoint, tmp_path / "copy.gguf", dtype="keep")
    copy = open_gguf(tmp_path / "copy.gguf")
    before, after = read_gguf(smollm2), read_gguf(tmp_path / "copy.gguf")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(np.array_equal(before.stored(name), after.stored(name)) for name in before.tensors)
    assert copy.config == replace(checkpoint.config, eos_token_id=copy.config.eos_token_id)
    text = "Der Große Wagen, 1234 naïve cafés\n\n  of a hungry programmer"
    assert copy.load_tokenizer().encode(text) == checkpoint.load_tokenizer().encode(text)
    assert copy.load_chat().template_source == checkpoint.load_chat().template_source


def test_a_missing_tensor_is_named(tmp_path, smollm2):
    checkpoint = open_gguf(smollm2)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if "layers.7.mlp.up" not in name}
    broken = Checkpoint(
        path=checkpoint.path,
        config=checkpoint.config,
        tensors=tensors,
        load_tokenizer=checkpoint.load_tokenizer,
        load_chat=checkpoint.load_chat,
    )
    with pytest.raises(FileError, match=r"model\.layers\.7\.mlp\.up_proj\.weight: is missing"):
        write_gguf(broken, tmp_path / "copy.gguf")
    assert not list(tmp_path.iterdir())
