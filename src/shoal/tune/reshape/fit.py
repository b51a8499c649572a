"""Fit every layer's latent attention to the attention that it replaces, one layer at a time, on a calibration text.

A layer sees the input it will meet, the stream that the layers before it already changed, and is asked for the stream
of the original model behind its attention: so it also makes good, as far as it can, what the layers before it lost.
Nothing is propagated back through more than one attention layer, which makes a step some thirty times cheaper than a
step of the whole model, and no logits are computed. The error of a token is measured beside the size of its stream,
which is what the next norm divides by.

Letters: B windows, T tokens, D model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shoal.formats.checkpoint import Checkpoint
from shoal.model import Model, load_model
from shoal.model.block import Block
from shoal.model.mla import MLA
from shoal.model.rope import RopeTable, rope_table
from shoal.tune.reshape.layer import block_of
from shoal.tune.reshape.tensors import with_tensors

BATCH = 4  # windows of a step


class LayerFit(NamedTuple):
    """Mean square error of a layer's stream beside its size, over all tokens, before and after fitting."""

    layer: int
    before: float
    after: float


def fit(
    source: Model,
    reshaped: Checkpoint,
    windows: Sequence[Sequence[int]],
    *,
    epochs: int = 4,
    lr: float = 0.02,
    report: Callable[[LayerFit], None] | None = None,
) -> Checkpoint:
    """The reshaped checkpoint with its attention fitted.

    Args:
        source: the model that was reshaped, in float32.
        windows: token ids, all of one length.
        epochs: passes over the windows for each layer.
        lr: the first step's size beside the weights', falling to nothing along a cosine.
        report: called after each layer.
    """
    student = load_model(reshaped)
    tokens_BT = torch.tensor([list(window) for window in windows])
    positions = torch.arange(tokens_BT.shape[1])
    old_rope = rope_table(source.config.rope, source.config.attention.rope_dim, positions)
    new_rope = rope_table(student.config.rope, student.config.attention.rope_dim, positions)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        old_BTD = source.model.embed_tokens(tokens_BT)
        new_BTD = old_BTD.clone()
    for index in range(source.config.num_hidden_layers):
        old, new = block_of(source, index), block_of(student, index)
        with torch.no_grad():
            for rows in _rows(len(old_BTD)):
                old_BTD[rows] += old.self_attn(old.input_layernorm(old_BTD[rows]), old_rope, None)
            input_BTD = new.input_layernorm(new_BTD)
        wanted_BTD = old_BTD - new_BTD
        size_BT1 = old_BTD.square().mean(-1, keepdim=True)

        attention, error = _error_of(new, new_rope, input_BTD, wanted_BTD, size_BT1)
        before = _mean_error(error, len(old_BTD))
        _train(attention, error, len(old_BTD), epochs, lr, generator)
        after = _mean_error(error, len(old_BTD))
        with torch.no_grad():
            for rows in _rows(len(old_BTD)):
                new_BTD[rows] += new.self_attn(input_BTD[rows], new_rope, None)
                new_BTD[rows] += new.mlp(new.post_attention_layernorm(new_BTD[rows]))
                old_BTD[rows] += old.mlp(old.post_attention_layernorm(old_BTD[rows]))
        if report is not None:
            report(LayerFit(index, before, after))
    made = {name: value.detach() for name, value in student.state_dict().items() if ".self_attn." in name}
    return with_tensors(reshaped, reshaped.config, made)


def _error_of(
    block: Block, rope: RopeTable, input_BTD: Tensor, wanted_BTD: Tensor, size_BT1: Tensor
) -> tuple[MLA, Callable[[Tensor], Tensor]]:
    attention = block.self_attn
    assert isinstance(attention, MLA)

    def error(rows: Tensor) -> Tensor:
        made_BTD: Tensor = attention(input_BTD[rows], rope, None)
        return ((made_BTD - wanted_BTD[rows]).square() / size_BT1[rows]).mean()

    return attention, error


def moving(attention: MLA) -> dict[str, nn.Parameter]:
    """What may move: all projections. The norms stay, for they undo the constant of the latent (`latent`)."""
    return {name: value for name, value in attention.named_parameters() if "layernorm" not in name}


def hold_constants(attention: MLA) -> None:
    """Take the gradient off the rows that make the constants."""
    for name in ("kv_a_proj_with_mqa", "q_a_proj"):
        projection = getattr(attention, name, None)
        if projection is not None:
            for parameter in (projection.weight, projection.bias):
                if parameter.grad is not None:
                    parameter.grad[0] = 0


def groups(parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Parameters for an optimiser, each with a step in proportion to its size; what is zero stays where it is."""
    out: list[dict[str, Any]] = []
    for parameter in parameters:
        step = lr * float(parameter.detach()[1:].square().mean().sqrt())  # the first may be the constant
        out.append({"params": [parameter], "lr": step, "full_lr": step})
    return out


def _train(
    attention: MLA, error: Callable[[Tensor], Tensor], count: int, epochs: int, lr: float, generator: torch.Generator
) -> None:
    steps = epochs * math.ceil(count / BATCH)
    if not steps:
        return
    optimiser = torch.optim.Adam(groups(moving(attention).values(), lr), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(count, generator=generator), BATCH):
            optimiser.zero_grad(set_to_none=True)
            error(rows).backward()  # type: ignore[no-untyped-call]
            hold_constants(attention)
            optimiser.step()
            schedule.step()


def _rows(count: int) -> list[Tensor]:
    return list(torch.split(torch.arange(count), BATCH))


@torch.no_grad()
def _mean_error(error: Callable[[Tensor], Tensor], count: int) -> float:
    return sum(float(error(rows)) * len(rows) for rows in _rows(count)) / count
