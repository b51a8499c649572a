"""A llama or qwen2 checkpoint → one of the deepseek_v3 architecture that computes the same, or nearly so from less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shoal import positions
from shoal.config import MLAConfig, ModelConfig, RopeConfig, RopeScaling
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint
from shoal.tune.reshape.latent import Widths, cut_off, to_latent
from shoal.tune.reshape.layer import GQALayer, attention_of, read_layer
from shoal.tune.reshape.moments import Moments, assume
from shoal.tune.reshape.slots import choose_slots, components, contributions
from shoal.tune.reshape.tensors import with_tensors

ROPE_STEP = 8  # rotary widths that `choose_shape` tries
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the new attention caches per token and layer: `latent` + `rope` values, one of them a constant. Both are
    even, for a cache in bfloat16 is read in pairs.

    Attributes:
        latent: `kv_lora_rank`; at most `most_latent`, which loses nothing.
        rope: `qk_rope_head_dim`; at most `most_rope`, which loses nothing.
    """

    latent: int
    rope: int

    @classmethod
    def full(cls, config: ModelConfig) -> Shape:
        """The shape that computes exactly what the source does."""
        gqa = attention_of(config)
        width = gqa.num_key_value_heads * gqa.head_dim
        return cls(latent=width + 2, rope=width)

    def check(self, config: ModelConfig) -> None:
        gqa = attention_of(config)
        width = gqa.num_key_value_heads * gqa.head_dim
        most = 2 * width + 2
        if not 2 <= self.latent <= most or self.latent % 2:
            raise ConfigError("latent", f"must be even and lie between 2 and {most} for this model, got {self.latent}")
        if not 2 <= self.rope <= width or self.rope % 2:
            raise ConfigError("rope", f"must be even and lie between 2 and {width} for this model, got {self.rope}")


def reshape(
    checkpoint: Checkpoint, shape: Shape, moments: Sequence[Moments] | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Latent attention in place of grouped queries. Everything else is passed on as it is, read when asked for.

    Args:
        moments: of every layer (`moments.measure`); without them inputs are taken to be independent.

    Raises:
        ConfigError: the model has something that latent attention cannot express, or the shape does not fit it.
        FileError: a tensor is missing or of the wrong shape.
    """
    config = checkpoint.config
    shape.check(config)
    checkpoint.check_complete()
    length = min(config.max_position_embeddings, 2048)
    if moments is None:
        moments = [assume(read_layer(checkpoint, layer), config, length) for layer in range(config.num_hidden_layers)]
    widths = choose_widths(checkpoint, shape, moments)
    new_config = latent_config(config, shape, widths)
    made: dict[str, Tensor] = {}
    for index, one in enumerate(moments):
        layer = to_latent(read_layer(checkpoint, index), one, widths)
        made.update({f"model.layers.{index}.self_attn.{name}": value.float() for name, value in layer.items()})
        if progress is not None:
            progress(index + 1, len(moments))
    return with_tensors(checkpoint, new_config, made)


def choose_shape(checkpoint: Checkpoint, cache: int, moments: Sequence[Moments]) -> Shape:
    """Share `cache` values out between latent and rotary key where the sum of both losses is least.

    Both are mean square errors of the layers' outputs: rotations left out (`slots.contributions`) and the energy that
    the latent's rank cuts off (`latent.cut_off`).
    """
    config = checkpoint.config
    gqa = attention_of(config)
    width = gqa.num_key_value_heads * gqa.head_dim
    layers = [read_layer(checkpoint, index) for index in range(config.num_hidden_layers)]
    worth_LPG = _worth(layers, moments)
    best: tuple[float, Shape] | None = None
    for rope in range(min(ROPE_STEP, width), min(width, cache - 2) + 1, ROPE_STEP):
        slots_P = choose_slots(worth_LPG, rope // 2)
        shape = Shape(latent=(cache - rope) // 2 * 2, rope=rope)
        widths = Widths(slots_P=slots_P, latent=shape.latent, query_bias=gqa.qkv_bias)
        if shape.latent > widths.most_latent(gqa):
            continue
        kept = torch.arange(worth_LPG.shape[2]) < slots_P[:, None]
        lost = float(worth_LPG.sum(0)[~kept].sum())
        lost += sum(cut_off(layer, one, widths) for layer, one in zip(layers, moments, strict=True))
        if best is None or lost < best[0]:
            best = lost, shape
    if best is None:
        raise ConfigError("cache", f"{cache} is too small to share out")
    return best[1]


def _worth(layers: Sequence[GQALayer], moments: Sequence[Moments]) -> Tensor:
    pairs = zip(layers, moments, strict=True)
    return torch.stack([contributions(components(layer, one), one) for layer, one in pairs])


def choose_widths(checkpoint: Checkpoint, shape: Shape, moments: Sequence[Moments]) -> Widths:
    """The slots of all layers for a shape. ConfigError if its latent has no use for so much room."""
    layers = [read_layer(checkpoint, index) for index in range(len(moments))]
    slots_P = choose_slots(_worth(layers, moments), shape.rope // 2)
    gqa = attention_of(checkpoint.config)
    widths = Widths(slots_P=slots_P, latent=shape.latent, query_bias=gqa.qkv_bias)
    most = widths.most_latent(gqa)
    if shape.latent > most:
        problem = f"{shape.latent} holds more than there is: with {shape.rope} rotary dimensions {most} lose nothing"
        raise ConfigError("latent", problem)
    return widths


def latent_config(config: ModelConfig, shape: Shape, widths: Widths) -> ModelConfig:
    """The configuration of the reshaped model, dense."""
    gqa = attention_of(config)
    low = gqa.num_attention_heads * gqa.head_dim + 1 if widths.query_bias else None
    mla = MLAConfig(
        num_attention_heads=gqa.num_attention_heads, kv_lora_rank=shape.latent, qk_rope_head_dim=shape.rope,
        qk_nope_head_dim=widths.nope(gqa.num_key_value_heads), v_head_dim=gqa.head_dim, q_lora_rank=low,
        attention_bias=True,
    )  # fmt: skip
    return replace(
        config, model_type="deepseek_v3", attention=mla, rope=_rope(config, shape, widths), num_nextn_predict_layers=0
    )


def _rope(config: ModelConfig, shape: Shape, widths: Widths) -> RopeConfig:
    """The chosen frequencies, as divisors of the plain ones (the published `longrope` with one list)."""
    plain = RopeConfig(rope_theta=config.rope.rope_theta, interleave=True)
    source_P = positions.frequencies(config.rope, config.attention.rope_dim).astype(np.float64)
    wanted = np.repeat(source_P, widths.slots_P.numpy())
    theirs = positions.frequencies(plain, shape.rope).astype(np.float64)
    divisors = theirs / wanted
    if np.allclose(divisors, 1, rtol=1e-6):
        return plain
    listed = tuple(float(f"{value:.9g}") for value in divisors)
    scaling = RopeScaling(
        rope_type="longrope", factor=1.0, attention_factor=1.0, short_factor=listed, long_factor=listed,
        original_max_position_embeddings=config.max_position_embeddings,
    )  # fmt: skip
    return replace(plain, scaling=scaling)
