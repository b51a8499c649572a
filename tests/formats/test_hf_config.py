"""config.json in and out, with transformers' own configuration classes as the judge."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, RopeScaling
from shoal.errors import ConfigError, FileError
from shoal.formats.checkpoint import GenerationDefaults
from shoal.formats.hf_config import parse_config, read_config, read_json
from shoal.formats.hf_config_write import generation_to_hf, to_hf

# As published, field by field.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
    "quant_method": "fp8", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32,
    "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 102400,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
    "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    **QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "rope_scaling": None, "sliding_window": None,
}  # fmt: skip
SMOLLM: dict[str, Any] = {
    **LLAMA, "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "head_dim": None,
    "transformers.js_config": {}, "pad_token_id": 2,
}  # fmt: skip
PUBLISHED = {"v3": V3, "v2-lite": V2_LITE, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "smollm": SMOLLM}


def parse(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_config({**raw, **changes}).model


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in names}


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_deepseek_v3_as_published() -> None:
    found = parse_config(V3)
    assert found.fp8_block == (128, 128)
    assert found.model == ModelConfig(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        attention=MLAConfig(
            num_attention_heads=128,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            q_lora_rank=1536,
        ),
        moe=MoEConfig(
            n_routed_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            n_shared_experts=1,
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
        ),
        rope=RopeConfig(
            interleave=True,
            scaling=RopeScaling(
                rope_type="yarn", factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
            ),
        ),
        max_position_embeddings=163840,
        num_nextn_predict_layers=1,
        bos_token_id=0,
        eos_token_id=(1,),
    )


def test_the_families_differ_where_they_should() -> None:
    llama, qwen2, qwen3 = parse(LLAMA), parse(QWEN2), parse(QWEN3)
    assert llama.eos_token_id == (128001, 128008, 128009)
    assert llama.rope.scaling == RopeScaling(rope_type="llama3", factor=32.0, original_max_position_embeddings=8192)
    assert [m.attention.qkv_bias for m in (llama, qwen2, qwen3)] == [False, True, False]  # type: ignore[union-attr]
    assert [m.attention.o_bias for m in (llama, qwen2, qwen3)] == [False, False, False]  # type: ignore[union-attr]
    assert [m.attention.qk_norm for m in (llama, qwen2, qwen3)] == [False, False, True]  # type: ignore[union-attr]
    assert [m.attention.head_dim for m in (llama, qwen2, qwen3)] == [64, 64, 128]  # type: ignore[union-attr]
    assert not any(m.rope.interleave for m in (llama, qwen2, qwen3))
    for raw in (LLAMA, QWEN3):
        biased = parse(raw, attention_bias=True).attention
        assert isinstance(biased, GQAConfig)
        assert biased.qkv_bias
        assert biased.o_bias
    assert parse(SMOLLM).attention.head_dim == 64  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_we_write_as_it_reads_the_original(tmp_path: Path, name: str) -> None:
    config = parse(PUBLISHED[name])
    written = to_hf(config)
    assert parse(written) == config
    not_ours = ("auto_map", "quantization_config", "transformers_version", "aux_loss_alpha", "seq_aux", "use_mrope",
                "pretraining_tp", "rope_interleaved", "is_llama_config", "transformers.js_config", "max_window_layers",
                "sliding_window", "ep_size", "_name_or_path")  # fmt: skip
    for folder, raw in (("ours", written), ("theirs", PUBLISHED[name])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(raw))
    ours, theirs = (
        transformers.AutoConfig.from_pretrained(tmp_path / folder, trust_remote_code=False).to_dict()
        for folder in ("ours", "theirs")
    )
    extra = {"moe_layer_freq", "scoring_func", "topk_method"}  # unknown to some of transformers' classes
    for key in (theirs.keys() | ours.keys()) - set(not_ours) - extra:
        assert ours.get(key) == theirs.get(key), key


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "llama", "qwen2", "qwen3"])
def test_what_transformers_saves_and_what_it_means_agree(family: str) -> None:
    """Its own defaults, saved in its own spelling (rope_parameters), and dropped again one by one where we have one."""
    changes = {"num_experts_per_tok": 6} if family.startswith("deepseek") else {}
    raw = transformers.AutoConfig.for_model(family, **changes).to_dict()
    full = parse(raw)
    assert full.hidden_size == raw["hidden_size"]
    assert full.rope == RopeConfig(interleave=family.startswith("deepseek"))
    optional = ["attention_bias", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "rope_parameters",
                "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "first_k_dense_replace",
                "n_group", "topk_group", "topk_method", "norm_topk_prob", "routed_scaling_factor", "rope_interleave",
                "num_nextn_predict_layers", "mlp_bias"]  # fmt: skip
    for name in optional:
        assert parse(without(raw, name)) == full, name
    if family in ("llama", "qwen3"):
        assert parse(without(raw, "head_dim")) == full
    if family == "llama":
        assert parse(without(raw, "num_key_value_heads")) == full


def test_absent_routing_fields_mean_the_family() -> None:
    v3 = parse(without(V3, "topk_method", "scoring_func", "moe_layer_freq", "norm_topk_prob")).moe
    v2 = parse(
        {**without(V2_LITE, "topk_method", "scoring_func", "norm_topk_prob"), "n_group": None, "topk_group": None}
    )
    assert v3 == parse(V3).moe
    assert v2.moe == parse(V2_LITE).moe


@pytest.mark.parametrize("alias", ["num_local_experts", "num_experts"])
def test_aliases_of_transformers(alias: str) -> None:
    raw = {**without(V3, "n_routed_experts", "num_nextn_predict_layers"), alias: 256, "num_mtp_layers": 1}
    assert parse(raw) == parse(V3)


def test_rope_spellings() -> None:
    yarn = V3["rope_scaling"]
    new = {**without(yarn, "type"), "rope_type": "yarn", "rope_theta": 5000.0}
    assert parse(without(V3, "rope_scaling", "rope_theta"), rope_parameters=new).rope == replace(
        parse(V3).rope, rope_theta=5000.0
    )
    assert parse(V3, rope_scaling={**yarn, "rope_type": "yarn"}) == parse(V3)
    assert parse(V3, rope_scaling={"rope_type": "default"}).rope.scaling is None
    assert parse(V3, rope_scaling=None, rope_theta=None).rope == RopeConfig(interleave=True)
    linear = parse(LLAMA, rope_scaling={"type": "linear", "factor": 2}).rope.scaling
    assert linear == RopeScaling(rope_type="linear", factor=2)
    # where transformers takes the trained length from if the object does not say
    short = without(yarn, "original_max_position_embeddings")
    assert parse(V3, rope_scaling=short).rope.scaling.original_max_position_embeddings == 163840  # type: ignore[union-attr]
    top = parse(V3, rope_scaling=yarn, original_max_position_embeddings=2048).rope.scaling
    assert top.original_max_position_embeddings == 2048  # type: ignore[union-attr]
    plain = parse(V3, rope_interleave=False)
    assert not plain.rope.interleave
    assert parse(to_hf(plain)) == plain


def test_a_model_without_experts_survives_the_way_out_and_in() -> None:
    for raw in (V3, V2_LITE):
        dense = replace(parse(raw), moe=None)
        assert parse(to_hf(dense)) == dense
    assert parse(V3, n_routed_experts=None).moe is None


LONGROPE = {"rope_type": "longrope", "factor": 1.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 31 + [2.5], "long_factor": [1.0] * 31 + [2.5]}  # fmt: skip


def test_a_divisor_for_each_frequency_survives_the_way_out_and_in() -> None:
    config = parse(V3, rope_scaling=LONGROPE)
    assert config.rope.scaling is not None
    assert config.rope.scaling.short_factor == (*[1.0] * 31, 2.5)
    assert parse(to_hf(config)) == config


NAN, INF = float("nan"), float("inf")
IMPOSSIBLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (V3, {"model_type": "deepseek_v32"}, "model_type"),
    (V3, {"model_type": None}, "model_type"),
    (V3, {"model_type": ["llama"]}, "model_type"),
    (V3, {"architectures": ["DeepseekV3ForSequenceClassification"]}, "architectures"),
    (V3, {"architectures": "DeepseekV3ForCausalLM"}, "architectures"),
    *[(V3, {name: None}, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
      "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
      "num_experts_per_tok", "moe_intermediate_size")],
    *[(V3, {name: bad}, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "kv_lora_rank",
      "qk_rope_head_dim", "n_routed_experts", "moe_intermediate_size") for bad in (0, -1, 1 << 62, 2.5, "8", True)],
    *[(LLAMA, {name: bad}, name) for name in ("head_dim", "num_key_value_heads", "num_attention_heads")
      for bad in (0, -1, 1 << 62, "8")],
    (LLAMA, {"head_dim": None, "num_attention_heads": 0}, "num_attention_heads"),
    (LLAMA, {"head_dim": None, "num_attention_heads": 7}, "num_attention_heads"),
    (LLAMA, {"num_key_value_heads": 7}, "num_key_value_heads"),
    (V3, {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}, "num_experts_per_tok"),
    (V3, {"n_group": 7}, "n_group"),
    (V3, {"topk_group": 9}, "topk_group"),
    (V3, {"moe_layer_freq": [0, 1, 1]}, "moe_layer_freq"),
    (V3, {"scoring_func": "sqrtsoftplus"}, "scoring_func"),
    (V3, {"topk_method": "aux"}, "topk_method"),
    (V3, {"rope_theta": NAN}, "rope_theta"),
    (V3, {"rope_theta": INF}, "rope_theta"),
    (V3, {"rope_theta": -1}, "rope_theta"),
    (V3, {"rms_norm_eps": NAN}, "rms_norm_eps"),
    (V3, {"rope_scaling": {**V3["rope_scaling"], "factor": NAN}}, "rope_scaling.factor"),
    (V3, {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 32}}, "rope_scaling.long_factor"),
    (V3, {"rope_scaling": {**LONGROPE, "short_factor": 1.0}}, "rope_scaling.short_factor"),
    (V3, {"rope_scaling": {**LONGROPE, "short_factor": [NAN], "long_factor": [NAN]}}, "rope_scaling.short_factor"),
    (V3, {"rope_scaling": {**LONGROPE, "short_factor": [1.0], "long_factor": [1.0]}}, "rope_scaling.short_factor"),
    (V3, {"rope_scaling": without(LONGROPE, "short_factor", "long_factor")}, "rope_scaling.short_factor"),
    (V3, {"rope_scaling": {**V3["rope_scaling"], "factor": 0}}, "rope_scaling.factor"),
    (V3, {"rope_scaling": {**V3["rope_scaling"], "truncate": False}}, "rope_scaling.truncate"),
    (V3, {"rope_scaling": {**V3["rope_scaling"], "mscal": 1}}, "rope_scaling.mscal"),
    (V3, {"rope_scaling": {**V3["rope_scaling"], "rope_type": "linear"}}, "rope_scaling.rope_type"),
    (V3, {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
    (V3, {"rope_scaling": {"factor": 4}}, "rope_scaling.rope_type"),
    (V3, {"rope_scaling": "yarn"}, "rope_scaling"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.rope_type"),
    (LLAMA, {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2}},
     "rope_parameters.rope_type"),
    (LLAMA, {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
     "rope_parameters.full_attention"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
    (LLAMA, {"attention_bias": "no"}, "attention_bias"),
    (QWEN2, {"use_sliding_window": True}, "use_sliding_window"),
    (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (QWEN2, {"mlp_bias": True}, "mlp_bias"),
    (V2_LITE, {"mlp_bias": True}, "mlp_bias"),
    (V2_LITE, {"rope_interleave": False}, "rope_interleave"),
    (V3, {"index_topk": 2048}, "index_topk"),
    (V3, {"eos_token_id": "stop"}, "eos_token_id"),
    (V3, {"eos_token_id": [1, None]}, "eos_token_id"),
    (V3, {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    (V3, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.quant_method"),
    (V3, {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "quantization_config.fmt"),
    (V3, {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
     "quantization_config.activation_scheme"),
    (V3, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
     "quantization_config.weight_block_size"),
    (V3, {"quantization_config": "fp8"}, "quantization_config"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "changes", "field"), IMPOSSIBLE, ids=lambda value: str(value)[:60])
def test_impossible_configurations_are_refused_by_field(
    tmp_path: Path, raw: dict[str, Any], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as direct:
        parse(raw, **changes)
    assert direct.value.field == field
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(FileError) as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.item == field
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {field}: ")
    assert str(caught.value).count(f"{field}: ") == 1


@pytest.mark.parametrize("name", ["q_lora_rank", "n_shared_experts"])
def test_fields_whose_absence_is_ambiguous_must_be_there(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: is missing"):
        parse(without(V3, name))
    with pytest.raises(ConfigError, match="num_key_value_heads: is missing"):
        parse(without(QWEN2, "num_key_value_heads"))


def test_code_in_the_folder_is_never_wanted() -> None:
    with pytest.raises(ConfigError, match="never imported"):
        parse({"model_type": "mystery", "auto_map": {"AutoModel": "evil.Model"}})


def test_unknown_fields_are_named_once_with_a_suggestion() -> None:
    with pytest.warns(UserWarning, match="no effect") as caught:
        parse(V3, rms_norm_epsilon=1e-5, banana=1)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "banana," in text
    assert "rms_norm_epsilon (did you mean rms_norm_eps?)" in text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":1,"a":2}', "\xff", "[" * 100_000, '"x"'])
def test_damaged_json_is_a_file_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match=r"config\.json"):
        read_json(path)


def test_json_has_a_size_limit(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(FileError, match="larger than 50 bytes"):
        read_json(tmp_path / "a.json", 50)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"attention": GQAConfig(num_attention_heads=32, num_key_value_heads=8, head_dim=64, qkv_bias=True)}, "o_bias"),
        ({"attention": GQAConfig(num_attention_heads=32, num_key_value_heads=8, head_dim=64, qk_norm=True)}, "qk_norm"),
        ({"rope": RopeConfig(interleave=True)}, "rope_interleave"),
        ({"model_type": "qwen2", "mlp_bias": True}, "qkv_bias"),
        ({"model_type": "qwen3", "mlp_bias": True}, "qk_norm"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_hf(replace(parse(LLAMA), **change))
    assert caught.value.field == field


def test_generation_config() -> None:
    config = parse(LLAMA)
    assert generation_to_hf(config, GenerationDefaults()) == {
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "pad_token_id": None,
    }
    out = generation_to_hf(parse(V3), GenerationDefaults(temperature=0.6, top_p=0.95))
    assert out == {
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "do_sample": True, "temperature": 0.6,
        "top_p": 0.95,
    }  # fmt: skip
    transformers.GenerationConfig(**out).validate(strict=True)
