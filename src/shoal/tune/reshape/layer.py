"""One layer of grouped-query attention, read as numbers that its latent form can be computed from.

Every map carries its bias as one more column, so that inputs are [h; 1]. A head's rotary pairs are complex numbers
z = x_a + i·x_b: to turn one by an angle is to multiply it by e^{iθ}, and complex-linear maps commute with that.

Letters: X = D + 1 inputs with their constant, N query heads, G key-value heads, H head width, P = H / 2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from shoal import positions
from shoal.config import GQAConfig, ModelConfig
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint
from shoal.model import Model
from shoal.model.block import Block
from shoal.model.mla import MLA


@dataclass(frozen=True, kw_only=True)
class GQALayer:
    """Float64. Query pairs carry the softmax scale, so a score is Re Σ_p conj(query) · key · e^{iθ_p(s − t)}."""

    query_NPX: Tensor  # complex
    key_GPX: Tensor  # complex
    value_GHX: Tensor
    out_NDH: Tensor
    out_bias_D: Tensor | None
    input_norm_D: Tensor

    @property
    def group(self) -> int:
        return int(self.query_NPX.shape[0] // self.key_GPX.shape[0])


def attention_of(config: ModelConfig) -> GQAConfig:
    """The attention to be reshaped. ConfigError names what latent attention cannot express."""
    attention = config.attention
    if not isinstance(attention, GQAConfig):
        raise ConfigError("model_type", f"{config.model_type!r} already has latent attention")
    if attention.qk_norm:
        problem = "keys are normalised head by head before their rotation, which no shared latent can express"
        raise ConfigError("qk_norm", problem)
    if config.mlp_bias:
        raise ConfigError("mlp_bias", "deepseek_v3 has no biases in its feed-forward layers")
    return attention


def block_of(model: Model, index: int) -> Block:
    """A layer of a model, as the type checker wants it said."""
    return cast(Block, model.model.layers[index])


def mla_of(model: Model, index: int) -> MLA:
    """The latent attention of a layer."""
    attention = block_of(model, index).self_attn
    assert isinstance(attention, MLA)
    return attention


def read_layer(checkpoint: Checkpoint, layer: int) -> GQALayer:
    """The attention of a layer from a llama or qwen2 checkpoint."""
    config = checkpoint.config
    gqa = attention_of(config)
    prefix = f"model.layers.{layer}."

    def read(name: str) -> Tensor:
        return torch.from_numpy(checkpoint.tensors[prefix + name].read().astype("float64"))

    def affine(name: str) -> Tensor:
        weight = read(f"self_attn.{name}.weight")
        bias = read(f"self_attn.{name}.bias") if gqa.qkv_bias else weight.new_zeros(len(weight))
        rows = torch.cat([weight, bias[:, None]], dim=1)
        return rows.view(-1, gqa.head_dim, weight.shape[1] + 1)

    scale = positions.softmax_scale(gqa, config.rope) * positions.attention_factor(config.rope.scaling) ** 2
    out = read("self_attn.o_proj.weight")
    return GQALayer(
        query_NPX=_pairs(affine("q_proj"), config.rope.interleave) * scale,
        key_GPX=_pairs(affine("k_proj"), config.rope.interleave),
        value_GHX=affine("v_proj"),
        out_NDH=out.view(len(out), -1, gqa.head_dim).transpose(0, 1),
        out_bias_D=read("self_attn.o_proj.bias") if gqa.o_bias else None,
        input_norm_D=read("input_layernorm.weight"),
    )


def _pairs(map_NHX: Tensor, interleave: bool) -> Tensor:
    """The rows of a head as complex numbers, one for each pair that turns together."""
    if interleave:
        return torch.complex(map_NHX[:, 0::2].contiguous(), map_NHX[:, 1::2].contiguous())
    a, b = map_NHX.chunk(2, dim=1)
    return torch.complex(a.contiguous(), b.contiguous())


def real_rows(map_PX: Tensor) -> Tensor:
    """Complex rows as real ones, interleaved: Re, Im, Re, Im … The layout of DeepSeek's rotary dimensions. [2P, X]."""
    return torch.stack([map_PX.real, map_PX.imag], dim=-2).flatten(-3, -2)
