"""Tiny random models whose sizes the groups divide, and a folder's stored parts decoded without Shoal's reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig  # noqa: E402
from shoal.formats.checkpoint import Checkpoint  # noqa: E402
from shoal.model import as_checkpoint, random_model  # noqa: E402

MLA = MLAConfig(num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16,
                q_lora_rank=64)  # fmt: skip
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                         "max_position_embeddings": 256}  # fmt: skip
V3 = ModelConfig(
    model_type="deepseek_v3", attention=MLA, rope=RopeConfig(interleave=True), num_nextn_predict_layers=1,
    moe=MoEConfig(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1,
                  first_k_dense_replace=1, n_group=4, topk_group=2), **SIZES,
)  # fmt: skip
V2 = ModelConfig(
    model_type="deepseek_v2", rope=RopeConfig(interleave=True),
    attention=MLAConfig(num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16),
    moe=MoEConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=2,
                  first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False),
    **SIZES,
)  # fmt: skip
LLAMA = ModelConfig(
    model_type="llama", attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    tie_word_embeddings=True, **SIZES,
)  # fmt: skip


def tiny(config: ModelConfig, dtype: Any = torch.float32) -> Checkpoint:
    """Random weights of a size that lets every layer matter, in memory; no tokenizer."""
    model = random_model(config, 0, dtype=dtype)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dim() > 1:
                value.normal_(generator=torch.Generator().manual_seed(len(name)), std=value.shape[-1] ** -0.5)
    return as_checkpoint(model)


def stored_tensors(folder: Path) -> dict[str, Any]:
    """Everything in the folder's safetensors, by published name."""
    out: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        out.update(safetensors.numpy.load_file(path))
    return out


def decode(tensors: dict[str, Any], module: str, bits: int) -> Any:
    """A pack-quantized matrix in float64, nibble by nibble as vLLM unpacks it."""
    rows, cols = tensors[f"{module}.weight_shape"]

    def unpack(words: Any, count: int) -> Any:
        shifts = np.arange(32 // bits) * bits
        fields = (words.astype(np.int64)[..., None] >> shifts) & ((1 << bits) - 1)
        return fields.reshape(words.shape[0], -1)[:, :count] - (1 << (bits - 1))

    codes = unpack(tensors[f"{module}.weight_packed"], cols).astype(np.float64)
    scales = tensors[f"{module}.weight_scale"].astype(np.float64)
    group = cols // scales.shape[1]
    if f"{module}.weight_zero_point" in tensors:
        codes -= np.repeat(unpack(tensors[f"{module}.weight_zero_point"].T, rows).T, group, axis=1)
    return codes * np.repeat(scales, group, axis=1)
