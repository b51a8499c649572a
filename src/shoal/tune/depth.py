"""Fewer layers: which ones a model needs least on given text, and the model without them.

`influence` judges every layer by itself, in one pass: by how far it turns the states that go through it (block
influence, ShortGPT, arXiv 2403.03853, eq. 1). `least_loss` leaves out one layer after another, each time the one that
the loss misses least among those that are left: layers that can do each other's work are not both let go. By loss
judges Shortened LLaMA (arXiv 2402.02834) too, but each layer once, with all others in place.

Shapes: B rows, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint
from shoal.formats.layout import expected_tensors
from shoal.model import Model
from shoal.model.attend import attention_mask
from shoal.model.rope import RopeTable, rope_table
from shoal.train.batches import IGNORE
from shoal.train.losses import TextBatch, linear_cross_entropy

Progress = Callable[[int, float], None]  # the layer left out, nats without it


class _Pass(NamedTuple):
    """What all layers share of one batch, and the states before the first of them."""

    batch: TextBatch
    rope: RopeTable
    mask: Tensor | None
    start_BTD: Tensor


@torch.no_grad()
def influence(model: Model, batches: Sequence[TextBatch]) -> list[float]:
    """1 - the cosine of a token's states before and after each layer, in the mean over the tokens of the batches."""
    total = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    tokens = 0
    for one in _passes(model, batches):
        real_BT = torch.ones_like(one.batch.tokens_BT, dtype=torch.bool)
        if one.batch.documents_BT is not None:
            real_BT = one.batch.documents_BT >= 0
        tokens += int(real_BT.sum())
        x_BTD = one.start_BTD
        for layer in range(len(total)):
            y_BTD = _run(model, layer, x_BTD, one)
            turned_BT = 1 - F.cosine_similarity(x_BTD.float(), y_BTD.float(), dim=-1)
            total[layer] += turned_BT[real_BT].sum().cpu()
            x_BTD = y_BTD
    return (total / tokens).tolist()


def most_influential(values: Sequence[float], keep: int) -> list[int]:
    """The `keep` layers of most influence, in their order."""
    return sorted(sorted(range(len(values)), key=lambda layer: -values[layer])[:keep])


@torch.no_grad()
def least_loss(
    model: Model, batches: Sequence[TextBatch], keep: int, progress: Progress = lambda *_: None
) -> list[int]:
    """Leave out layers one by one until `keep` are left, each time the one without which the loss is least.

    From N layers to M this takes about as long as (N³ - M³) / 6N passes of the whole model over the batches.

    Returns:
        The layers that stay, in order.

    Raises:
        ConfigError: there are not so many layers.
    """
    kept = list(range(model.config.num_hidden_layers))
    if not 1 <= keep <= len(kept):
        raise ConfigError("layers", f"must lie between 1 and the model's {len(kept)}, got {keep}")
    passes = list(_passes(model, batches))
    targets = _targets(passes)
    while len(kept) > keep:
        nats = [0.0] * len(kept)
        for one in passes:
            before_BTD = one.start_BTD
            for at, layer in enumerate(kept):
                nats[at] += _nats(model, before_BTD, kept[at + 1 :], one) / targets
                before_BTD = _run(model, layer, before_BTD, one)
        least = min(range(len(kept)), key=nats.__getitem__)
        progress(kept.pop(least), nats[least])
    return kept


@torch.no_grad()
def loss_of(model: Model, batches: Sequence[TextBatch], kept: Sequence[int]) -> float:
    """Nats a target of the batches, with these layers alone."""
    passes = list(_passes(model, batches))
    targets = _targets(passes)
    return sum(_nats(model, one.start_BTD, kept, one) for one in passes) / targets


def keep_layers(checkpoint: Checkpoint, kept: Sequence[int]) -> Checkpoint:
    """The model of these layers alone, with their weights, embedding and head; MTP layers stay.

    Raises:
        ConfigError: no such layers, or the configuration has no words for which of them have experts.
    """
    config = checkpoint.config
    if not kept or sorted({*kept}) != list(kept) or not 0 <= kept[0] <= kept[-1] < config.num_hidden_layers:
        raise ConfigError("layers", f"must rise from 0 to below {config.num_hidden_layers}, got {list(kept)}")
    fewer = _shorter(config, kept)
    old = [*kept, *config.mtp_layers]
    tensors = {}
    for name in expected_tensors(fewer):
        source = name
        if name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            source = f"model.layers.{old[int(number)]}.{rest}"
        tensors[name] = replace(checkpoint.tensors[source], name=name)
    return replace(checkpoint, config=fewer, tensors=tensors)


def _shorter(config: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """Experts begin after the dense layers at the start, of which fewer may be left."""
    moe = config.moe
    experts = [config.is_moe_layer(layer) for layer in kept]
    if moe is not None:
        dense = experts.index(True) if True in experts else len(kept)
        moe = replace(moe, first_k_dense_replace=dense)
    fewer = replace(config, num_hidden_layers=len(kept), moe=moe)
    if [fewer.is_moe_layer(layer) for layer in range(len(kept))] != experts:
        raise ConfigError("layers", "leave experts in layers that moe_layer_freq does not name")
    return fewer


def _passes(model: Model, batches: Sequence[TextBatch]) -> Iterator[_Pass]:
    config = model.config
    for batch in batches:
        device, length = batch.tokens_BT.device, batch.tokens_BT.shape[1]
        rope = rope_table(config.rope, config.attention.rope_dim, torch.arange(length, device=device))
        mask = attention_mask(length, length, batch.documents_BT, device)
        yield _Pass(batch, rope, mask, model.model.embed_tokens(batch.tokens_BT))


def _targets(passes: Sequence[_Pass]) -> int:
    return sum(int((one.batch.targets_BT != IGNORE).sum()) for one in passes)


def _run(model: Model, layer: int, x_BTD: Tensor, one: _Pass) -> Tensor:
    out_BTD: Tensor = model.model.layers[layer](x_BTD, one.rope, one.mask)[0]
    return out_BTD


def _nats(model: Model, x_BTD: Tensor, layers: Sequence[int], one: _Pass) -> float:
    """Σ cross-entropy of a batch's targets, of states that go through some layers and the head."""
    for layer in layers:
        x_BTD = _run(model, layer, x_BTD, one)
    head_VD = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    targets_X = one.batch.targets_BT.flatten()
    ones_X = torch.ones(len(targets_X), device=targets_X.device)
    return float(linear_cross_entropy(model.model.norm(x_BTD).flatten(0, 1), head_VD, targets_X, ones_X)[0])
