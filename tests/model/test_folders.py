"""The network and the readers and writers of Hugging Face folders together, with transformers at the other end."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.formats.hf_folder import save_folder  # noqa: E402
from shoal.model import as_checkpoint, load_model  # noqa: E402

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
CASES = {
    "v2": {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "rope_parameters": YARN,
    },
    "v3": {
        "model_type": "deepseek_v3",
        "q_lora_rank": 24,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "rope_parameters": YARN,
    },
    "v3-half-split": {"model_type": "deepseek_v3", "rope_interleave": False, "norm_topk_prob": False},
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 3, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3"},
}
every_case = pytest.mark.parametrize("name", CASES)


def some_tokens():
    return torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))


def relative_error(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@every_case
@pytest.mark.filterwarnings("ignore:.*announces 1 MTP layer")
def test_a_folder_of_transformers_runs_here(name, twins, tmp_path):
    hf, _ = twins(CASES[name])  # leaves the folder behind
    model = load_model(open_checkpoint(tmp_path))
    with torch.no_grad():
        assert relative_error(model(some_tokens()), hf(some_tokens()).logits) < 1e-4


@every_case
@pytest.mark.filterwarnings("ignore:saved without a tokenizer")
def test_a_folder_of_ours_runs_in_transformers(name, randomised, tmp_path):
    model = randomised({**CASES[name], **({"num_nextn_predict_layers": 1} if name == "v3" else {})})
    save_folder(as_checkpoint(model), tmp_path / "saved")
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    hf.config._experts_implementation = "eager"  # the grouped one wants sizes in whole 16-byte units
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    with torch.no_grad():
        assert relative_error(model(some_tokens()), hf.eval()(some_tokens()).logits) < 1e-4


@pytest.mark.filterwarnings("ignore:saved without a tokenizer")
def test_a_bfloat16_model_with_mtp_comes_back_whole(randomised, tmp_path):
    model = randomised({**CASES["v3"], "num_nextn_predict_layers": 1})
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model = load_model(as_checkpoint(model), dtype=torch.bfloat16)
    save_folder(as_checkpoint(model), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    back = load_model(open_checkpoint(tmp_path / "saved"), dtype=torch.bfloat16)
    state = back.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(back.model.layers[1].mlp.gate.e_score_correction_bias, bias)
