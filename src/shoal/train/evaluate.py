"""What a model can do in between: its loss on held-out tokens, and how it continues a text."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch

from shoal.formats.tokenizer import Tokenizer
from shoal.model import Model, new_cache
from shoal.train.batches import IGNORE, Rows
from shoal.train.losses import LossSettings, language_loss
from shoal.train.process import Process
from shoal.train.recipe import Recipe, SampleSettings
from shoal.train.tensors import autocast, to_device

NEXT_ONLY = LossSettings(mtp_weight=0.0, balance_weight=0.0, z_weight=0.0)


@torch.no_grad()
def validation_loss(model: Model, windows: Rows, recipe: Recipe, process: Process) -> float:
    """Mean loss of the next token, in nats, over evenly spaced held-out sequences; the same ones each time."""
    count = min(recipe.validation.sequences, len(windows))
    numbers = [turn * len(windows) // count for turn in range(count)]
    mine = numbers[process.rank :: process.world]
    total = torch.zeros(2, dtype=torch.float64)
    # Processes run as many passes as the one with most rows: layers are put together for each by all of them.
    for start in range(0, math.ceil(count / process.world), recipe.micro_batch):
        batch = windows.read(mine[start : start + recipe.micro_batch] or numbers[:1])
        with autocast(recipe, process.device):
            parts = language_loss(model, to_device(batch, process.device), NEXT_ONLY).parts
        targets = int((batch.targets_BT != IGNORE).sum()) if start < len(mine) else 0
        total += torch.tensor([float(parts["next"]) * targets, targets], dtype=torch.float64)
    loss, targets_seen = process.sum(total.to(process.device)).tolist()
    return loss / targets_seen if targets_seen else math.nan


def continue_text(
    model: Model, tokenizer: Tokenizer, *, prompt: str, settings: SampleSettings, seed: int, process: Process
) -> str:
    """What the model writes after `prompt`, up to an end token or `max_tokens`."""
    ids = tokenizer.encode(prompt)
    room = model.config.max_position_embeddings - settings.max_tokens
    if not ids or room < 1:
        return ""
    ids = ids[-room:]
    generator = torch.Generator().manual_seed(seed)
    ends = {*model.config.eos_token_id, *tokenizer.eos_token_ids}
    wanted = write(
        model, ids, settings.max_tokens, temperature=settings.temperature, generator=generator, process=process
    )
    return tokenizer.decode([*itertools.takewhile(lambda token: token not in ends, wanted)], continuing=True)


@torch.no_grad()
def write(
    model: Model,
    ids: list[int],
    most: int,
    *,
    temperature: float,
    generator: torch.Generator,
    process: Process,
    among: int | None = None,
) -> Iterator[int]:
    """The tokens that the model writes after `ids`, end tokens included: `most` of them, or as many as are asked for.

    Args:
        temperature: 0 takes the likeliest token.
        among: only tokens below this id.
    """
    weight, new = model.model.norm.weight, ids
    cache = new_cache(model.config, batch=1, capacity=len(ids) + most, dtype=weight.dtype, device=weight.device)
    for _ in range(most):
        tokens_BT = torch.tensor([new], device=weight.device)
        logits_V = model(tokens_BT, cache=cache, last_only=True)[0, 0, :among].float().cpu()
        if temperature > 0:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        token = process.largest(token if process.leads else -1)  # rounding may differ; going on together may not
        yield token
        new = [token]


@contextlib.contextmanager
def evaluating(model: Model, recipe: Recipe) -> Iterator[None]:
    """Put the model into evaluation mode for a while. What is compiled runs as written: shapes are others here."""
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if recipe.compile else contextlib.nullcontext():
            yield
    finally:
        model.train()
