"""llama.cpp loads what we write and computes the same: against our own network, and against transformers' weights."""

from dataclasses import replace

import numpy as np
import pytest

from shoal.config import RopeConfig, RopeScaling
from shoal.formats.checkpoint import Checkpoint, open_checkpoint
from shoal.formats.gguf_writer import write_model

pytest.importorskip("xllamacpp")
torch = pytest.importorskip("torch")

STEPS = 4
TOLERANCE = 2e-4  # of a log-probability; two float32 networks that sum in another order
LINEAR = RopeScaling(rope_type="linear", factor=4.0)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
DEEP_YARN = replace(YARN, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
CASES = {
    "llama": ("llama", {}),
    "llama 3, tied": ("llama", {"rope": RopeConfig(rope_theta=5e5, scaling=LLAMA3), "tie_word_embeddings": True}),
    "llama linear": ("llama", {"rope": RopeConfig(scaling=LINEAR)}),
    "llama trained on pairs": ("llama", {"rope": RopeConfig(interleave=True)}),
    "qwen2 yarn": ("qwen2", {"rope": RopeConfig(scaling=YARN)}),
    "qwen3": ("qwen3", {}),
    "v2-lite": ("deepseek_v2", {}),
    "v3": ("deepseek_v3", {}),
    "v3 yarn": ("deepseek_v3", {"rope": RopeConfig(scaling=DEEP_YARN, interleave=True)}),
    "v3 half-split": ("deepseek_v3", {"rope": RopeConfig()}),
    "v3 with MTP": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
    "dense MLA": ("deepseek_v2", {"moe": None}),
}


def some_prompt():
    """Longer than YARN's original length."""
    return [1, *np.random.default_rng(5).integers(3, 280, 90).tolist()]


def assert_agrees(answer, prompt, log_probs_of):
    """The continuation is greedy under `log_probs_of` (ids → log-probabilities [T, V]), and so are its numbers."""
    ids = prompt + [token for token, _ in answer]
    rows = log_probs_of(ids)[len(prompt) - 1 : -1]
    for row, (token, best) in zip(rows, answer, strict=True):
        allowed = row.clone()
        allowed[2] = -torch.inf  # the end of text, which the request forbids
        assert int(allowed.argmax()) == token
        assert len(best) == 8
        for candidate, log_prob in best.items():
            assert abs(float(row[candidate]) - log_prob) < TOLERANCE
    assert rows.std() > 0.5, "weights too small to tell anything apart"


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_agrees_with_our_network(
    tmp_path, make_config, make_weights, as_tensors, vocabulary, llama_cpp, name
):
    from shoal.model.load import load_model

    model_type, changes = CASES[name]
    config = make_config(model_type, **changes)
    tensors = as_tensors(make_weights(config, seed=3))
    write_model(config, tensors, vocabulary, tmp_path / "model.gguf", dtype="F32")
    memory = Checkpoint(path=tmp_path, config=config, tensors=tensors, load_tokenizer=None, load_chat=None)
    model = load_model(memory)

    def log_probs(ids):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids]))[0].double(), dim=-1)

    prompt = some_prompt()
    assert_agrees(llama_cpp(tmp_path / "model.gguf", prompt, STEPS), prompt, log_probs)


@pytest.mark.filterwarnings("ignore:.*stored as F16")
@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "BF16"])
def test_llama_cpp_loads_quantised_files(tmp_path, make_config, make_weights, as_tensors, vocabulary, llama_cpp, dtype):
    """Its answer comes from quantised activations, so it is held to a looser bound, that of the values we read back."""
    from shoal.model.load import load_model

    config = make_config("deepseek_v3", num_hidden_layers=2)
    write_model(config, as_tensors(make_weights(config)), vocabulary, tmp_path / "model.gguf", dtype=dtype)
    model = load_model(open_checkpoint(tmp_path / "model.gguf"))
    prompt = some_prompt()[:20]
    ((_, best),) = llama_cpp(tmp_path / "model.gguf", prompt, 1)
    with torch.no_grad():
        row = torch.log_softmax(model(torch.tensor([prompt]))[0, -1].double(), dim=-1)
    assert max(abs(float(row[token]) - log_prob) for token, log_prob in best.items()) < 0.15


def hf_model(kind):
    """A random transformers model of unit gain, and its rotary scaling as transformers wants it."""
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
    }  # fmt: skip
    moe = {
        "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 16,
        "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    groups["num_nextn_predict_layers"] = 0
    config, model = {
        "deepseek_v3": ("DeepseekV3", {**moe, **groups, "rope_parameters": yarn}),
        "deepseek_v2": ("DeepseekV2", {**moe, "q_lora_rank": None, "norm_topk_prob": False, "topk_method": "greedy"}),
        "llama": ("Llama", {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": llama3}),
        "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    }[kind], None  # fmt: skip
    name, own = config
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**common, **own)).eval()
    with torch.no_grad():
        for key, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
            elif "e_score_correction_bias" in key or (weight.ndim == 1 and key.endswith("bias")):
                weight.copy_(0.1 * torch.randn_like(weight))
            elif weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "llama", "qwen2"])
def test_llama_cpp_agrees_with_transformers(tmp_path, vocabulary, llama_cpp, kind):
    """The whole way of an export: save_pretrained, our folder reader, our GGUF writer, llama.cpp."""
    model = hf_model(kind)
    model.save_pretrained(tmp_path / "folder")
    checkpoint = open_checkpoint(tmp_path / "folder")
    write_model(checkpoint.config, checkpoint.tensors, vocabulary, tmp_path / "model.gguf", dtype="F32")

    def log_probs(ids):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)

    prompt = some_prompt()
    assert_agrees(llama_cpp(tmp_path / "model.gguf", prompt, STEPS), prompt, log_probs)
    assert open_checkpoint(tmp_path / "model.gguf").config.attention == checkpoint.config.attention
