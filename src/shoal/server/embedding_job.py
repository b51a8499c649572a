"""Embeddings beside generations: jobs that the engine's thread advances between its steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shoal.engine import LLM
from shoal.engine.embedding import Embedder, Embedding


class EmbeddingQueue:
    """The one embedder of each model, made when first wanted, and the jobs that take turns at it, the oldest first."""

    def __init__(self) -> None:
        self.jobs: list[EmbeddingJob] = []
        self._embedders: dict[LLM, Embedder] = {}

    def embedder(self, llm: LLM) -> Embedder:
        if llm not in self._embedders:
            self._embedders[llm] = llm.embedder()
        return self._embedders[llm]


class EmbeddingJob:
    """The texts of one request: `worker.Work`, of which the engine's thread reads a piece between its steps."""

    def __init__(
        self, queue: EmbeddingQueue, llm: LLM, texts: list[list[int]], pooling: str, adapter: str | None = None
    ) -> None:
        self.done = False
        self._queue = queue
        self._work = self._read(llm, texts, pooling, adapter)

    def _read(self, llm: LLM, texts: list[list[int]], pooling: str, adapter: str | None) -> Iterator[list[Embedding]]:
        """Empty after each piece, everything at the end."""
        embedder, number, found = self._queue.embedder(llm), llm.adapter_number(adapter), []
        for ids in texts:
            for embedding in embedder.embed(ids, pooling=pooling, adapter=number):
                if embedding is not None:
                    found.append(embedding)
                if len(found) < len(texts):
                    yield []
        yield found

    @property
    def settled(self) -> bool:
        return True  # it works where it is asked

    def start(self) -> None:
        self._queue.jobs.append(self)

    def ready(self) -> list[Any]:
        if self.done or self._queue.jobs[0] is not self:
            return []
        found = next(self._work)
        if not found:
            return []
        self.cancel()
        return [found]

    def cancel(self) -> None:
        self.done = True
        if self in self._queue.jobs:
            self._queue.jobs.remove(self)
