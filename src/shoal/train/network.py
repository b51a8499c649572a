"""The network that a recipe trains: drawn from its seed, in this process's hands, its layers compiled or recomputed."""

from __future__ import annotations

import functools

import torch
from torch.utils.checkpoint import checkpoint as recompute

from shoal.model import Model
from shoal.model.block import Block
from shoal.model.moe import MoE
from shoal.train.process import Process
from shoal.train.recipe import Recipe


def make_model(recipe: Recipe, process: Process) -> Model:
    """The recipe's network, freshly drawn from its seed, on this process's device, ready to train."""
    model = process.make(recipe.model, recipe.seed)
    for layer in model.model.layers:
        assert isinstance(layer, Block)
        if recipe.compile:
            compile_layer(layer, by_hand=process.device.type == "cpu", alone=process.world == 1)
    if recipe.activation_checkpointing:
        recompute_layers(model)
    return model


def recompute_layers(model: Model) -> None:
    """Let layers forget their activations and make them again in the backward pass."""
    for layer in model.model.layers:
        # Nothing in a layer draws random numbers, so there is no random state to keep.
        layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)


def compile_layer(layer: Block, *, by_hand: bool, alone: bool) -> None:
    """`torch.compile` a layer, but for parts that no fixed graph describes, as their shapes follow from the data.

    Args:
        by_hand: experts and attention run as operators of our own (`model.grouped`, `model.blocked`).
        alone: experts get no rows from other processes.
    """
    loose = [layer.mlp.experts] if isinstance(layer.mlp, MoE) and (by_hand or not alone) else []
    for part in [*loose, layer.self_attn] if by_hand else loose:
        part.forward = torch.compiler.disable(part.forward)  # type: ignore[method-assign,no-untyped-call]
    layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
