"""Embeddings: the network's states after its final norm, pooled over a text.

The states come from a second engine over the same packed weights whose head is the identity. It has a small cache of
its own, so that answers under way keep theirs, and reads one text at a time, a piece a call: nobody is held up long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.engine.adapters import PackedAdapter
from shoal.engine.plan import PAGE_TOKENS, Plan, cache_widths, write_plan
from shoal.errors import RequestError
from shoal.formats.checkpoint import Checkpoint

Floats = NDArray[np.float32]
POOLINGS = ("mean", "last")
PIECE_TOKENS = 256
MAX_EMBEDDING_TOKENS = 8192  # of a text: its cache is not shared with anything


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A text's vector, float32 [D], of length 1."""

    vector: Floats
    tokens: int


class Embedder:
    """Used by one thread at a time.

    Args:
        plan: what the model answers with; its weights are shared.
        limit: most tokens of a text.
        adapters: what may run beside the weights, by the numbers that `embed` takes.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, *, wide: bool, cache_type: int, limit: int,
        adapters: Mapping[int, PackedAdapter] | None = None,
    ) -> None:  # fmt: skip
        self._plan = write_plan(checkpoint, threads=plan.engine.threads, wide=wide, states_of=plan)
        for number, adapter in (adapters or {}).items():
            adapter.attach(self._plan, number)
        self._width = checkpoint.config.hidden_size
        self._cache_type = cache_type
        self._pages = 0
        self._limit = limit

    def embed(self, tokens: Sequence[int], *, pooling: str = "mean", adapter: int = -1) -> Iterator[Embedding | None]:
        """Yields None after each piece of the text but the last, then the embedding. `mean` averages the states of all
        tokens, `last` takes the last one, which alone has seen the whole text."""
        if not 0 < len(tokens) <= self._limit:
            problem = f"holds {len(tokens)} tokens; it must be from 1 to {self._limit}"
            raise RequestError("input", problem, code="context_length_exceeded" if tokens else "invalid_value")
        self._reserve(len(tokens))
        total_D = np.zeros(self._width, np.float64)
        for start in range(0, len(tokens), PIECE_TOKENS):
            states_TD = self._states(tokens[start : start + PIECE_TOKENS], start, adapter)
            if pooling == "last":
                total_D = states_TD[-1].astype(np.float64)
            else:
                total_D += states_TD.sum(axis=0, dtype=np.float64)
            if start + PIECE_TOKENS < len(tokens):
                yield None
        length = math.sqrt(float(total_D @ total_D))
        yield Embedding(vector=(total_D / (length or 1.0)).astype(np.float32), tokens=len(tokens))

    def _reserve(self, tokens: int) -> None:
        """Room for a text of that many tokens; it grows by doubling."""
        pages = -(-tokens // PAGE_TOKENS)
        if pages > self._pages:
            self._pages = max(pages, min(2 * self._pages, -(-self._limit // PAGE_TOKENS)))
            config = self._plan.config
            self._plan.engine.cache(self._plan.cache_layers, cache_widths(config), self._cache_type, self._pages)

    def _states(self, tokens: Sequence[int], start: int, adapter: int) -> Floats:
        count = len(tokens)
        out_TD = np.empty((count, self._width), np.float32)
        self._plan.engine.run(
            np.asarray(tokens, np.int32),
            np.arange(start, start + count, dtype=np.int32),
            np.array([0, count], np.int32),
            np.arange(self._pages, dtype=np.int32)[None, :],
            np.arange(count, dtype=np.int32),
            out_TD,
            adapter=np.full(count, adapter, np.int32) if adapter >= 0 else None,
        )
        return out_TD
