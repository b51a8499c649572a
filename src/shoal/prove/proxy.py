"""Small models that answer for large ones: a Llama of a few layers, taught documents of the pool in minutes.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.config import GQAConfig, ModelConfig
from shoal.data.select.corpus import Corpus
from shoal.data.select.run import Ground
from shoal.data.select.task import Numbers
from shoal.errors import ConfigError
from shoal.model import Model, random_model
from shoal.train.evaluate import NEXT_ONLY
from shoal.train.losses import TextBatch, language_loss
from shoal.train.optim import OptimiserSettings, make_optimisers
from shoal.train.recipe import ScheduleSettings
from shoal.train.schedule import lr_factor

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Size:
    """The small model and how it is taught.

    Attributes:
        batch, context: rows of a step and tokens of a row.
        windows: rows of a held-out part that its loss is measured on, at most.
    """

    layers: int = 2
    width: int = 128
    context: int = 128
    batch: int = 8
    lr: float = 6e-3
    warmup: int = 20
    windows: int = 128

    def __post_init__(self) -> None:
        for name, low, high in (("layers", 1, 64), ("width", 32, 4096), ("context", 16, 8192), ("batch", 1, 4096)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(name, f"must lie between {low} and {high}, got {getattr(self, name)}")
        if self.width % 32:
            raise ConfigError("width", f"must be a multiple of 32, got {self.width}")

    @property
    def step_tokens(self) -> int:
        return self.batch * self.context

    def config(self, vocab_size: int, end: int) -> ModelConfig:
        heads = max(1, self.width // 64)
        return ModelConfig(
            model_type="llama",
            vocab_size=vocab_size,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            attention=GQAConfig(
                num_attention_heads=heads, num_key_value_heads=heads, head_dim=self.width // heads // 2 * 2
            ),
            max_position_embeddings=2 * self.context,
            tie_word_embeddings=True,
            eos_token_id=(end,),
        )


class Student:
    """A small model in training: a `Learner` whose documents are those of `pool`.

    The learning rate rises over `warmup` steps and stays, or, where the number of steps is told, falls to nothing over
    the last half.
    """

    def __init__(self, size: Size, pool: Corpus, judge: Corpus, vocab_size: int, end: int, seed: int, steps: int = 0):
        self.size, self.pool, self.judge, self.seed, self.steps = size, pool, judge, seed, steps
        self.model: Model = random_model(size.config(vocab_size, end), seed)
        self.optimisers = make_optimisers(self.model, OptimiserSettings(optimiser="muon", lr=size.lr))
        self.step = 0

    def read(self, documents: Numbers, tokens: int, watch: Callable[[int], None] = lambda _: None) -> None:
        """Train on so many tokens of the documents: shuffled anew for each time through them, end to end, cut in rows.

        Args:
            watch: told the number of the step after each.
        """
        for block in blocks(self.pool, documents, tokens, self.size, seed=self.seed * 7919 + self.step):
            self._step(torch.from_numpy(block))
            watch(self.step)

    def _step(self, block: torch.Tensor) -> None:
        kind = ScheduleSettings(kind="wsd" if self.steps else "constant", warmup=self.size.warmup, decay=0.5)
        rate = self.size.lr * lr_factor(self.step, self.steps, kind)
        with autocast():
            total = language_loss(self.model, rows(block), NEXT_ONLY).total
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1

    def loss(self) -> float:
        return self.loss_on(self.judge)

    @torch.no_grad()
    def loss_on(self, corpus: Corpus) -> float:
        """Nats a token over evenly spaced rows of a corpus, the same ones each time."""
        size = self.size
        stream = np.concatenate([corpus.ids(number) for number in range(len(corpus))])
        context = min(size.context, len(stream) - 1)
        count = (len(stream) - 1) // context
        chosen = [turn * count // min(size.windows, count) for turn in range(min(size.windows, count))]
        table = np.stack([stream[one * context : one * context + context + 1] for one in chosen])
        losses = []
        for start in range(0, len(table), size.batch):
            with autocast():
                batch = rows(torch.from_numpy(table[start : start + size.batch]))
                losses.append(float(language_loss(self.model, batch, NEXT_ONLY).parts["next"]) * len(batch.tokens_BT))
        return math.fsum(losses) / len(table)

    @torch.no_grad()
    def surprise(self, documents: Numbers) -> NDArray[np.float64]:
        """Bits a byte of the first row of each document; NaN for those of one token."""
        out = np.full(len(documents), np.nan)
        size, lengths = self.size, np.minimum(self.pool.lengths_N[documents], self.size.context + 1)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), 2 * size.batch):
            here = order[start : start + 2 * size.batch]
            table = np.full((len(here), int(lengths[here[-1]])), IGNORE, np.int64)
            for row, number in enumerate(here):
                table[row, : lengths[number]] = self.pool.ids(int(documents[number]))[: lengths[number]]
            if table.shape[1] < 2:
                continue
            block = torch.from_numpy(table)
            with autocast():
                logits = self.model(block[:, :-1].clamp(min=0)).float()
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), block[:, 1:].flatten(), ignore_index=IGNORE, reduction="none"
            )
            nats = each.view(len(here), -1).sum(1).double().numpy()
            # Bytes of what was predicted: the document's bytes, in proportion to its tokens.
            share = (lengths[here] - 1) / self.pool.lengths_N[documents[here]]
            out[here] = nats / math.log(2) / np.maximum(self.pool.sizes_N[documents[here]] * share, 1)
        return np.where(lengths < 2, np.nan, out)

    def fork(self) -> Student:
        """A copy with the optimiser's state, which goes on at a constant rate."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin.optimisers = make_optimisers(twin.model, OptimiserSettings(optimiser="muon", lr=self.size.lr))
        for mine, theirs in zip(self.optimisers, twin.optimisers, strict=True):
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
        return twin


@dataclass(frozen=True)
class Makers:
    """Proxies of one size over one ground, each to read `tokens`."""

    size: Size
    tokens: int
    ground: Ground

    def __repr__(self) -> str:  # of what decides a proxy; part of a journal's key
        return f"{self.size} {self.tokens}"

    def __call__(self, seed: int) -> Student:
        tokenizer = self.ground.tokenizer
        return Student(
            self.size, self.ground.pool, self.ground.judge, tokenizer.vocab_size, tokenizer.eos_token_ids[0], seed
        )


def blocks(corpus: Corpus, documents: Numbers, tokens: int, size: Size, seed: int) -> Iterator[NDArray[np.int64]]:
    """[B, T + 1] for each step: tokens // (B T) of them, at least one.

    Documents follow each other in an order of their own for each time through them; a row begins with the last token of
    the row before it, so that every token is a target once.
    """
    steps = max(1, tokens // size.step_tokens)
    need = steps * size.step_tokens + 1
    rng = np.random.default_rng([seed, 11])
    pieces: list[NDArray[np.int64]] = []
    have = 0
    while have < need:
        for number in rng.permutation(documents).tolist():
            pieces.append(corpus.ids(number).astype(np.uint32))
            have += len(pieces[-1])
            if have >= need:
                break
    stream = np.concatenate(pieces)[:need]
    table = np.lib.stride_tricks.sliding_window_view(stream, size.context + 1)[:: size.context]
    # Rows are shuffled among neighbours only, so that no text is read again long before others.
    near = 64 * size.batch
    order = np.concatenate([at + rng.permutation(min(near, len(table) - at)) for at in range(0, len(table), near)])
    for at in range(steps):
        yield table[order[at * size.batch : (at + 1) * size.batch]].astype(np.int64)


def rows(block: torch.Tensor) -> TextBatch:
    return TextBatch(block[:, :-1], block[:, 1:].contiguous())


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)
