"""How much memory a model will need, before a byte of it is read."""

from __future__ import annotations

import math
from dataclasses import replace

from shoal.config import MLAConfig, ModelConfig
from shoal.engine.machine import available_bytes
from shoal.engine.packing import PACKINGS, packing_for
from shoal.engine.plan import PAGE_TOKENS
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint
from shoal.formats.layout import expected_tensors
from shoal.kernels import native

GB = 1e9
CACHE_BYTES = {"f32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 64}  # a value; int8 has a scale for every 64


def check_memory(checkpoint: Checkpoint, *, weights: str, cache: str, cache_tokens: int) -> None:
    """Raise ConfigError, with the numbers, if weights and cache cannot fit into the memory that is left.

    The cache counts in full although the system provides it page by page: a request must not end the process."""
    matrices = weight_bytes(checkpoint, weights)
    pages = cache_bytes(checkpoint.config, cache, cache_tokens)
    left = available_bytes()
    if matrices + pages <= left:
        return
    name = checkpoint.path.name
    if matrices > left:
        raise ConfigError(
            "weights",
            f"{name} needs {matrices / GB:.2f} GB of memory for its weights, {left / GB:.2f} GB are available",
        )
    raise ConfigError(
        "cache_tokens",
        f"{name} needs {(matrices + pages) / GB:.2f} GB of memory, {matrices / GB:.2f} for its weights and "
        f"{pages / GB:.2f} for a cache of {cache_tokens} tokens; {left / GB:.2f} GB are available",
    )


def weight_bytes(checkpoint: Checkpoint, scheme: str) -> int:
    """Bytes of the main model's weights once packed under a scheme (`engine.packing`)."""
    main = replace(checkpoint.config, num_nextn_predict_layers=0)
    total = 0
    for name, shape in expected_tensors(main).items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:  # reported when the plan is written
            continue
        packing = "f32" if name.endswith(".mlp.gate.weight") else packing_for(tensor, scheme)
        total += (
            4 * math.prod(shape)
            if len(shape) == 1
            else sum(
                count * native.packed_bytes(PACKINGS[packing], rows, cols)
                for count, rows, cols in _stack(main, name, shape)
            )
        )
    return total


def _stack(config: ModelConfig, name: str, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """What a weight is packed as: (count, rows, columns)."""
    mla = config.attention
    if isinstance(mla, MLAConfig) and name.endswith(".kv_b_proj.weight"):
        heads, latent = mla.num_attention_heads, mla.kv_lora_rank
        return [(heads, latent, mla.qk_nope_head_dim), (heads, mla.v_head_dim, latent)]
    *stack, rows, cols = shape
    return [(math.prod(stack), rows, cols)]


def cache_bytes(config: ModelConfig, cache: str, cache_tokens: int) -> int:
    pages = -(-cache_tokens // PAGE_TOKENS)
    values = config.num_hidden_layers * config.attention.cache_width * PAGE_TOKENS
    return int(pages * values * CACHE_BYTES[cache])
