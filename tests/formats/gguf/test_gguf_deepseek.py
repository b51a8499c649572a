"""deepseek2 files as llama.cpp's converters of different ages make them."""

from dataclasses import replace

import numpy as np
import pytest

from shoal.errors import FileError
from shoal.formats.gguf import open_gguf

gguf = pytest.importorskip("gguf")
N, H, R, V, C, E, F, D = 4, 32, 16, 16, 32, 8, 32, 64  # as in conftest
SPECIAL = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output", "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp", "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate.": "ffn_gate_inp.", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "shared_head.norm": "nextn.shared_head_norm", ".enorm": ".nextn.enorm",
    ".hnorm": ".nextn.hnorm", ".eh_proj": ".nextn.eh_proj", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
}  # fmt: skip


def deepseek_keys(config, **changes):
    moe, mla = config.moe, config.attention
    keys = {
        "block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
        "context_length": 256, "embedding_length": D, "feed_forward_length": 96, "attention.head_count": N,
        "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6, "attention.kv_lora_rank": C,
        "attention.key_length": C + R, "attention.value_length": C, "attention.key_length_mla": H + R,
        "attention.value_length_mla": V, "rope.dimension_count": R, "rope.freq_base": 10000.0,
        "leading_dense_block_count": moe.first_k_dense_replace, "expert_feed_forward_length": F, "expert_count": E,
        "expert_used_count": moe.num_experts_per_tok, "expert_shared_count": moe.n_shared_experts,
    }  # fmt: skip
    if mla.q_lora_rank:
        keys["attention.q_lora_rank"] = mla.q_lora_rank
    if moe.scoring_func == "sigmoid":
        keys |= {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5}
        keys |= {"expert_group_count": moe.n_group, "expert_group_used_count": moe.topk_group}
    keys |= changes
    return {key: value for key, value in keys.items() if value is not None}


def deepseek_tensors(weights, *, split=True):
    out = {}
    for name, array in weights.items():
        for ours, theirs in PARTS.items():
            name = name.replace(ours, theirs)
        if split and name.endswith("attn_kv_b.weight"):  # conversion/deepseek.py: per head k, then v; k transposed
            heads = array.reshape(N, H + V, C)
            out[name.replace("kv_b", "k_b")] = np.ascontiguousarray(heads[:, :H].transpose(0, 2, 1))
            out[name.replace("kv_b", "v_b")] = np.ascontiguousarray(heads[:, H:])
        else:
            out[name] = array
    return out


def test_v3(build, same_weights, make_config, make_weights):
    config = make_config("deepseek_v3")
    weights = make_weights(config)
    checkpoint = open_gguf(build("deepseek2", deepseek_keys(config), deepseek_tensors(weights), SPECIAL))
    assert checkpoint.config == config
    same_weights(checkpoint, weights)
    checkpoint.check_complete()


def test_experts_come_one_at_a_time(build, make_config, make_weights):
    config = make_config("deepseek_v3")
    weights = make_weights(config)
    tensors = deepseek_tensors(weights)
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.quantize(tensors["blk.1.ffn_up_exps.weight"], kind)
    tensors["blk.1.ffn_up_exps.weight"] = (stored, kind)
    tensor = open_gguf(build("deepseek2", deepseek_keys(config), tensors)).tensors[
        "model.layers.1.mlp.experts.up_proj.weight"
    ]
    chunks = list(tensor.chunks())
    assert [chunk.shape for chunk in chunks] == [(1, F, D)] * E
    assert np.array_equal(np.concatenate(chunks), gguf.quants.dequantize(stored, kind))
    assert np.array_equal(tensor.raw_blocks(), stored.reshape(E * F, -1))
    assert np.shares_memory(tensor.raw_blocks(), tensor.raw_blocks()), "the stored blocks are mapped, not copied"


def test_v2_lite_with_its_yarn(build, same_weights, make_config, make_weights):
    """As published: no gating function, no query compression, the multiplier a tenth of mscale_all_dim in float32."""
    config = make_config("deepseek_v2")
    weights = make_weights(config)
    keys = deepseek_keys(config, **{
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_log_multiplier": 0.0707, "expert_weights_scale": 1.0,
    })  # fmt: skip
    checkpoint = open_gguf(build("deepseek2", keys, deepseek_tensors(weights), SPECIAL))
    assert checkpoint.config == config
    assert checkpoint.config.rope.scaling.mscale_all_dim == 0.707
    same_weights(checkpoint, weights)


def test_old_files_hold_kv_b_whole(build, same_weights, make_config, make_weights):
    config = make_config("deepseek_v3")
    weights = make_weights(config)
    keys = deepseek_keys(config, **{
        "attention.head_count_kv": N, "attention.key_length": H + R, "attention.value_length": V,
        "attention.key_length_mla": None, "attention.value_length_mla": None,
    })  # fmt: skip
    checkpoint = open_gguf(build("deepseek2", keys, deepseek_tensors(weights, split=False), SPECIAL))
    assert checkpoint.config == config
    same_weights(checkpoint, weights)


def test_v2_groups(build, make_config, make_weights):
    config = make_config("deepseek_v2")
    config = replace(config, moe=replace(config.moe, topk_method="group_limited_greedy", n_group=4, topk_group=2))
    keys = deepseek_keys(config, expert_group_count=4, expert_group_used_count=2, expert_gating_func=1)
    checkpoint = open_gguf(build("deepseek2", keys, deepseek_tensors(make_weights(config))))
    assert checkpoint.config.moe == config.moe
    assert checkpoint.config.model_type == "deepseek_v2"


def test_sigmoid_without_selection_bias_selects_by_the_score(build, make_config, make_weights):
    config = make_config("deepseek_v3")
    weights = make_weights(config)
    biases = [name for name in weights if name.endswith("e_score_correction_bias")]
    tensors = {name: array for name, array in deepseek_tensors(weights).items() if "exp_probs_b" not in name}
    checkpoint = open_gguf(build("deepseek2", deepseek_keys(config), tensors))
    assert checkpoint.config.moe.topk_method == "noaux_tc"
    assert len(biases) == 2
    for name in biases:
        assert np.array_equal(checkpoint.tensors[name].read(), np.zeros(E, np.float32))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gate_and_up_may_be_one_tensor(build, same_weights, make_config, make_weights, kind):
    config = make_config("deepseek_v3")
    weights = make_weights(config)
    tensors = deepseek_tensors(weights)
    for layer in (1, 2):
        parts = [tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
        joint = gguf.quants.quantize(np.concatenate(parts, axis=1), gguf.GGMLQuantizationType[kind])
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = (joint, gguf.GGMLQuantizationType[kind])
        if kind == "Q8_0":  # what comes back is what the blocks hold
            values = gguf.quants.dequantize(joint, gguf.GGMLQuantizationType[kind])
            weights[f"model.layers.{layer}.mlp.experts.gate_proj.weight"] = values[:, :F]
            weights[f"model.layers.{layer}.mlp.experts.up_proj.weight"] = values[:, F:]
    checkpoint = open_gguf(build("deepseek2", deepseek_keys(config), tensors, SPECIAL))
    same_weights(checkpoint, weights)
    if kind == "Q8_0":
        up = checkpoint.tensors["model.layers.2.mlp.experts.up_proj.weight"]
        assert np.array_equal(up.raw_blocks(), joint[:, F:].reshape(E * F, -1))


def test_mtp_blocks(build, same_weights, make_config, make_weights):
    """The block after the main ones, with the copies of embedding and head that some converters add."""
    config = make_config("deepseek_v3", num_nextn_predict_layers=1)
    weights = make_weights(config)
    tensors = deepseek_tensors(weights)
    tensors["blk.3.nextn.embed_tokens.weight"] = tensors["token_embd.weight"]
    tensors["blk.3.nextn.shared_head_head.weight"] = tensors["output.weight"]
    checkpoint = open_gguf(build("deepseek2", deepseek_keys(config, nextn_predict_layers=1), tensors, SPECIAL))
    assert checkpoint.config == config
    same_weights(checkpoint, weights)


@pytest.mark.parametrize("blocks", [3, 4])
def test_mtp_blocks_that_were_left_out(build, same_weights, make_config, make_weights, blocks):
    """Converters keep the key but drop the tensors; the block count may or may not include them."""
    config = make_config("deepseek_v3")
    weights = make_weights(config)
    keys = deepseek_keys(config, nextn_predict_layers=1, block_count=blocks)
    checkpoint = open_gguf(build("deepseek2", keys, deepseek_tensors(weights), SPECIAL))
    assert checkpoint.config == config
    same_weights(checkpoint, weights)


def test_wrong_metadata_are_named(build, make_config, make_weights):
    config = make_config("deepseek_v3")
    tensors = deepseek_tensors(make_weights(config))
    wrong = {
        "gating function 3 is not supported": {"expert_gating_func": 3},
        "softmax gating with a selection bias": {"expert_gating_func": 1},
        "leaves nothing beside the 16 rotary": {"attention.key_length_mla": 16},
        "nextn_predict_layers: must lie between": {"nextn_predict_layers": 3},
        "attn_v_b.weight: has shape": {"attention.value_length_mla": 24},
        "deepseek2.expert_used_count: is missing": {"expert_used_count": None},
    }
    for message, change in wrong.items():
        with pytest.raises(FileError) as error:
            open_gguf(build("deepseek2", deepseek_keys(config, **change), tensors))
        assert message in str(error.value)
