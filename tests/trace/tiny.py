"""A tiny random V3 model in a folder, with a real vocabulary and chat template, made without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal import hub
from shoal.config import MLAConfig, ModelConfig, MoEConfig
from shoal.errors import UnknownModelError
from shoal.formats.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from shoal.formats.hf_folder import save_folder
from shoal.formats.layout import expected_tensors

CONFIG = ModelConfig(
    model_type="deepseek_v3", vocab_size=49152, hidden_size=48, intermediate_size=96, num_hidden_layers=5,
    attention=MLAConfig(
        num_attention_heads=4, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, q_lora_rank=24
    ),
    moe=MoEConfig(
        n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=16, n_shared_experts=1,
        first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    ),
    max_position_embeddings=2048, eos_token_id=(2,),
)  # fmt: skip


def tiny_folder(folder: Path, config: ModelConfig = CONFIG) -> str:
    """Skips where the vocabulary, SmolLM2's, is not on this machine."""
    try:
        vocabulary = open_checkpoint(hub.resolve("smollm2-135m"))
    except UnknownModelError:
        pytest.skip("SmolLM2 is not on this machine")
    rng = np.random.default_rng(0)

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        spread = 1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1
        values = (rng.normal(size=shape) * spread + (name.endswith("norm.weight"))).astype(np.float32)
        return LazyTensor(
            name=name, shape=shape, dtype="F32", source=Path("tiny"),
            make_chunks=lambda: iter(np.split(values, len(values)) if values.ndim == 3 else [values]),
        )  # fmt: skip

    tiny = Checkpoint(
        path=vocabulary.path, config=config, load_tokenizer=vocabulary.load_tokenizer, load_chat=vocabulary.load_chat,
        tensors={name: lazy(name, shape) for name, shape in expected_tensors(config).items()},
    )  # fmt: skip
    save_folder(tiny, folder)
    return str(folder)
