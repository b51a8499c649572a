"""Tiny random models of transformers and their twins in Shoal, for the parity tests of this folder.

A case is the keyword arguments of a transformers configuration plus `model_type`. `our_config` reads it apart from
`formats.hf_config`, and weights move through files written by `save_pretrained`, so the published names are tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, RopeScaling  # noqa: E402
from shoal.model import Model  # noqa: E402

Case = dict[str, Any]

DEEPSEEK = {
    "vocab_size": 97,
    "hidden_size": 45,
    "intermediate_size": 70,
    "moe_intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 20,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


SHARED_NAMES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "max_position_embeddings",
)
MLA_NAMES = (
    "num_attention_heads",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
MOE_NAMES = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
)


def full_case(case: Case) -> Case:
    base = DEEPSEEK if case["model_type"].startswith("deepseek") else LLAMA
    full = {**base, **case}
    if full["model_type"] == "deepseek_v3":
        full = {"norm_topk_prob": True, **full}
    if full["model_type"] == "qwen2":  # has no head_dim of its own
        del full["head_dim"]
    full.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    return full


def our_config(case: Case) -> ModelConfig:
    hf = full_case(case)
    kind = hf["model_type"]
    rope = dict(hf["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else RopeScaling(**rope)
    shared = {name: hf[name] for name in SHARED_NAMES}
    shared["tie_word_embeddings"] = hf.get("tie_word_embeddings", False)
    shared["mlp_bias"] = hf.get("mlp_bias", False)
    if not kind.startswith("deepseek"):
        heads = hf["num_attention_heads"]
        attention = GQAConfig(
            num_attention_heads=heads,
            num_key_value_heads=hf["num_key_value_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            qkv_bias=kind == "qwen2" or hf.get("attention_bias", False),
            o_bias=kind != "qwen2" and hf.get("attention_bias", False),
            qk_norm=kind == "qwen3",
        )
        return ModelConfig(**shared, attention=attention, rope=RopeConfig(rope_theta=theta, scaling=scaling))
    v3 = kind == "deepseek_v3"
    moe = MoEConfig(
        **{name: hf[name] for name in MOE_NAMES},
        norm_topk_prob=hf.get("norm_topk_prob", False),
        scoring_func="sigmoid" if v3 else "softmax",
        topk_method="noaux_tc" if v3 else hf.get("topk_method", "greedy"),
    )
    return ModelConfig(
        **shared,
        attention=MLAConfig(**{name: hf[name] for name in MLA_NAMES}, attention_bias=hf.get("attention_bias", False)),
        moe=moe,
        rope=RopeConfig(rope_theta=theta, scaling=scaling, interleave=hf.get("rope_interleave", True)),
        num_nextn_predict_layers=hf.get("num_nextn_predict_layers", 0),
    )


def randomise(module: Any, seed: int) -> None:
    """Fill parameters and selection biases widely enough that every term matters and routing is not a tie."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                value.copy_(0.2 * noise)
            elif name.endswith("norm.weight"):
                value.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                value.copy_(0.3 * noise)
            elif name.endswith("gate.weight"):
                value.copy_(3 * noise / value.shape[-1] ** 0.5)
            elif isinstance(value, torch.nn.Parameter):
                value.copy_(1.5 * noise / value.shape[-1] ** 0.5)


def stack_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """One tensor per expert, as published, to one stack per layer, as in Shoal."""
    out: dict[str, Any] = {}
    stacks: dict[str, dict[int, Any]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+\.weight)", name)
        if match:
            stacks.setdefault(match[1] + match[3], {})[int(match[2])] = value
        else:
            out[name] = value
    for name, parts in stacks.items():
        out[name] = torch.stack([parts[index] for index in range(len(parts))])
    return out


def make_hf(case: Case, seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    full = full_case(case)
    config = transformers.AutoConfig.for_model(**full, attn_implementation="eager")
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert model.config._experts_implementation == "eager"
    assert model.config._attn_implementation == "eager"
    randomise(model, seed)
    return model


def from_hf(hf: Any, case: Case, folder: Path) -> Model:
    safetensors = pytest.importorskip("safetensors.torch")
    hf.save_pretrained(folder)
    model = Model(our_config(case)).eval()
    model.load_state_dict(stack_experts(safetensors.load_file(folder / "model.safetensors")))
    return model


@pytest.fixture
def config_of() -> Callable[[Case], ModelConfig]:
    return our_config


@pytest.fixture
def randomised() -> Callable[..., Model]:
    """A Shoal model of a case with wide random weights."""

    def make(case: Case, seed: int = 0) -> Model:
        model = Model(our_config(case)).eval()
        randomise(model, seed)
        return model

    return make


@pytest.fixture
def twins(tmp_path: Path) -> Callable[[Case], tuple[Any, Model]]:
    """A transformers model and Shoal's model with the same weights, moved through a file."""

    def make(case: Case) -> tuple[Any, Model]:
        hf = make_hf(case)
        return hf, from_hf(hf, case, tmp_path)

    return make


@pytest.fixture
def fill() -> Callable[[Any, int], None]:
    return randomise
