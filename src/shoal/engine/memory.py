"""How much memory a model will need, before a byte of it is read."""

from __future__ import annotations

import math
from dataclasses import replace

from shoal.config import MLAConfig, ModelConfig
from shoal.engine.packing import PACKINGS, packing_for
from shoal.engine.plan import PAGE_TOKENS, cache_widths
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint, LazyTensor
from shoal.formats.layout import expected_tensors
from shoal.kernels import native
from shoal.machine import available_bytes

GB = 1e9


def check_memory(
    checkpoint: Checkpoint,
    *,
    weights: str,
    cache: str,
    cache_tokens: int,
    look_ahead: bool = False,
    expand: bool = False,
) -> None:
    """Raise ConfigError, with the numbers, if weights and cache cannot fit into the memory that is left.

    The cache counts in full although the system provides it page by page: a request must not end the process."""
    looks_ahead = look_ahead and checkpoint.config.num_nextn_predict_layers > 0
    config = replace(checkpoint.config, num_nextn_predict_layers=int(looks_ahead))
    matrices = weight_bytes(checkpoint, config, weights, expand=expand)
    pages = cache_bytes(config, cache, cache_tokens)
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


def weight_bytes(checkpoint: Checkpoint, config: ModelConfig, scheme: str, *, expand: bool = False) -> int:
    """Bytes of the weights that `config` asks for, once packed under a scheme (`engine.packing`).

    `expand`: with what MLA's expanded form needs."""
    total = 0
    for name, shape in expected_tensors(config).items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:  # reported when the plan is written
            continue
        if len(shape) == 1:
            total += 4 * shape[0]
        elif name.endswith(".mlp.gate.weight"):
            total += native.packed_bytes(PACKINGS["f32"], *shape)
        else:
            parts = _parts(config, tensor, shape, expand=expand)
            total += sum(_packed(part, part_shape, scheme) for part, part_shape in parts)
    return total


def _packed(tensor: LazyTensor, shape: tuple[int, ...], scheme: str) -> int:
    *stack, rows, cols = shape
    each: int = native.packed_bytes(PACKINGS[packing_for(tensor, scheme)], rows, cols)
    return math.prod(stack) * each


def _parts(
    config: ModelConfig, tensor: LazyTensor, shape: tuple[int, ...], *, expand: bool
) -> list[tuple[LazyTensor, tuple[int, ...]]]:
    """What a weight is packed as: itself, or the halves of absorbed attention and, turned round, the first again."""
    mla = config.attention
    if not isinstance(mla, MLAConfig) or not tensor.name.endswith(".kv_b_proj.weight"):
        return [(tensor, shape)]
    heads, latent = mla.num_attention_heads, mla.kv_lora_rank
    keys, values = tensor.split or (tensor, tensor)
    parts: list[tuple[LazyTensor, tuple[int, ...]]]
    parts = [(keys, (heads, latent, mla.qk_nope_head_dim)), (values, (heads, mla.v_head_dim, latent))]
    return [*parts, (keys, (heads, mla.qk_nope_head_dim, latent))] if expand else parts


def cache_bytes(config: ModelConfig, cache: str, cache_tokens: int) -> int:
    """Bytes of the cache; a prediction layer that `config` names caches too."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    page = PAGE_TOKENS * sum(_row_bytes(cache, width) for width in cache_widths(config))
    return -(-cache_tokens // PAGE_TOKENS) * layers * (-(-page // 64) * 64)


def _row_bytes(cache: str, width: int) -> int:
    if cache == "int8":  # and a float32 scale for every 64 values
        return -(-width // 4) * 4 + 4 * -(-width // 64)
    return width * (2 if cache == "bf16" else 4)
