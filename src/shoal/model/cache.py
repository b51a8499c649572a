"""What a model remembers of the tokens it has read, allocated once and filled in place. Plain data, no policy.

A `LatentCache` holds C + R values a token and layer (512 + 64 in DeepSeek-V3), a `KVCache` 2 · heads · width. The
number of tokens held is `length`, the same for every layer and row; setting it lower forgets the tokens past it, which
is all that speculative decoding needs to reject a draft. Caches are for inference: nothing flows back through them.

Shapes: L layers, B batch, S cached tokens, T new tokens, C latent, R rope, N key-value heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from shoal.config import MLAConfig, ModelConfig

LayerT = TypeVar("LayerT", "LatentLayer", "KVLayer")


class LatentLayer(NamedTuple):
    """One layer's slice of a `LatentCache`: normalised latents beside rotated rotary keys."""

    latent_BSC: Tensor
    k_rope_BSR: Tensor
    length: int

    def append(self, latent_BTC: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new tokens behind the old ones; returns latents and rotary keys of all tokens so far."""
        return _append(self.latent_BSC, latent_BTC, self.length), _append(self.k_rope_BSR, k_rope_BTR, self.length)


class KVLayer(NamedTuple):
    """One layer's slice of a `KVCache`: rotated keys, and values."""

    keys_BSNH: Tensor
    values_BSNH: Tensor
    length: int

    def append(self, keys_BTNH: Tensor, values_BTNH: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new tokens behind the old ones; returns keys and values of all tokens so far."""
        return _append(self.keys_BSNH, keys_BTNH, self.length), _append(self.values_BSNH, values_BTNH, self.length)


@dataclass(kw_only=True)
class LatentCache:
    """Multi-head latent attention's memory: `kv_lora_rank` latents, then `qk_rope_head_dim` rotary key values."""

    entries_LBSX: Tensor
    kv_lora_rank: int
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.entries_LBSX.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token of one row takes in all layers."""
        return self.entries_LBSX[:, 0, 0].numel() * self.entries_LBSX.element_size()

    def layer(self, index: int) -> LatentLayer:
        entries_BSX = self.entries_LBSX[index]
        return LatentLayer(entries_BSX[..., : self.kv_lora_rank], entries_BSX[..., self.kv_lora_rank :], self.length)


@dataclass(kw_only=True)
class KVCache:
    """Grouped-query attention's memory: keys after rotation, and values."""

    keys_LBSNH: Tensor
    values_LBSNH: Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys_LBSNH.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token of one row takes in all layers."""
        return 2 * self.keys_LBSNH[:, 0, 0].numel() * self.keys_LBSNH.element_size()

    def layer(self, index: int) -> KVLayer:
        return KVLayer(self.keys_LBSNH[index], self.values_LBSNH[index], self.length)


def new_cache(
    config: ModelConfig,
    *,
    batch: int,
    capacity: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    num_layers: int | None = None,
) -> LatentCache | KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens.

    Args:
        num_layers: layers to remember; by default the main ones. An MTP layer has a cache of its own with one layer.
    """
    num_layers = config.num_hidden_layers if num_layers is None else num_layers
    size = (num_layers, batch, capacity)
    attention = config.attention
    if isinstance(attention, MLAConfig):
        entries = torch.zeros(*size, attention.cache_width, dtype=dtype, device=device)
        return LatentCache(entries_LBSX=entries, kv_lora_rank=attention.kv_lora_rank)
    keys = torch.zeros(*size, attention.num_key_value_heads, attention.head_dim, dtype=dtype, device=device)
    return KVCache(keys_LBSNH=keys, values_LBSNH=torch.zeros_like(keys))


def _append(store: Tensor, new: Tensor, length: int) -> Tensor:
    end = length + new.shape[1]
    if end > store.shape[1]:
        raise ValueError(
            f"the cache holds {store.shape[1]} tokens a row; {length} are taken and {new.shape[1]} more came"
        )
    with torch.no_grad():
        store[:, length:end] = new
    return store[:, :end]
