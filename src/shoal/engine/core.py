"""The engine's heart: packed weights, cache, scheduler, one native call a step.

There is no background thread. Whoever waits for a token takes the lock and runs a step, which advances every running
sequence; the others find their tokens ready when the lock comes free.
"""

from __future__ import annotations

import os
import threading

import numpy as np
from numpy.typing import NDArray

from shoal.config import ModelConfig
from shoal.engine.pages import PagePool
from shoal.engine.plan import PAGE_TOKENS, Moments, write_plan
from shoal.engine.sampler import likeliest, log_softmax
from shoal.engine.scheduler import Scheduler, Slice
from shoal.engine.sequence import Produced, Sequence
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint

STEP_TOKENS = 512
SCORE_ROWS = 128  # rows of logits held at once when every position is scored


class Core:
    """Runs sequences.

    Args:
        threads: team size; all processors that this process may use if None.
        weights: `auto` or a packing (`engine.packing`).
        activations: `int8`, `int16` or `auto`: what rows become where they meet quantised weights.
        cache: `bf16` or `f32`.
        cache_tokens: how many tokens the cache holds over all sequences.
        known_ids: ids from here on are padding of the embedding table and are never chosen.
        moments: to be filled with what every matrix meets (`plan.write_plan`), for calibration.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int | None = None,
        weights: str = "auto",
        cache: str = "bf16",
        activations: str = "auto",
        cache_tokens: int,
        max_running: int = 64,
        known_ids: int | None = None,
        moments: Moments | None = None,
    ) -> None:
        if cache not in ("bf16", "f32"):
            raise ConfigError("cache", f"{cache!r} is not one of bf16, f32")
        config = checkpoint.config
        self.threads = threads or len(os.sched_getaffinity(0))
        wide = _wide(activations, config)
        plan = write_plan(checkpoint, threads=self.threads, scheme=weights, wide=wide, moments=moments)
        pages = -(-cache_tokens // PAGE_TOKENS)
        plan.engine.cache(config.num_hidden_layers, plan.page_values, cache == "bf16", pages)
        self.weight_bytes = plan.weight_bytes
        self.cache_bytes = plan.engine.cache_bytes
        self.vocab_size = config.vocab_size
        self._engine = plan.engine
        self._known_ids = min(known_ids or config.vocab_size, config.vocab_size)
        self._pool = PagePool(pages)
        self._scheduler = Scheduler(self._pool, step_tokens=STEP_TOKENS, max_running=max_running)
        self._lock = threading.Lock()

    @property
    def cache_tokens(self) -> int:
        return self._pool.count * PAGE_TOKENS

    def submit(self, sequence: Sequence) -> None:
        with self._lock:
            self._scheduler.submit(sequence)

    def release(self, sequence: Sequence) -> None:
        """The caller is done with it, finished or not."""
        with self._lock:
            self._scheduler.remove(sequence)

    def advance(self, sequence: Sequence) -> None:
        """Return once the sequence has a new output or is finished."""
        while not sequence.outputs and sequence.finish is None:
            with self._lock:
                if not sequence.outputs and sequence.finish is None:
                    self._step()

    def score(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits after every token, float32 [T, V]."""
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        with self._lock:
            pages = [self._pool.take() for _ in range(-(-len(tokens) // PAGE_TOKENS))]
            held = [page for page in pages if page is not None]
            try:
                if len(held) < len(pages):
                    raise MemoryError("the cache is full of running requests")
                for start in range(0, len(tokens), SCORE_ROWS):
                    rows = tokens[start : start + SCORE_ROWS]
                    positions = list(range(start, start + len(rows)))
                    wanted = list(range(len(rows)))
                    self._run(rows, positions, [0, len(rows)], [held], wanted, out[start : start + len(rows)])
            finally:
                for page in held:
                    self._pool.release(page)
        return out

    def _step(self) -> None:
        slices = self._scheduler.next_step()
        assert slices, "a sequence waits but nothing can run"
        tokens: list[int] = []
        positions: list[int] = []
        first_row = [0]
        wanted: list[int] = []
        for piece in slices:
            rows = piece.tokens + piece.draft
            if piece.wants_logits:
                wanted.extend(range(len(tokens) + len(piece.tokens) - 1, len(tokens) + len(rows)))
            positions.extend(range(piece.sequence.computed, piece.sequence.computed + len(rows)))
            tokens.extend(rows)
            first_row.append(len(tokens))
        logits = np.empty((len(wanted), self.vocab_size), np.float32)
        self._run(tokens, positions, first_row, [piece.sequence.pages for piece in slices], wanted, logits)
        logits[:, self._known_ids :] = -np.inf
        row = 0
        for piece in slices:
            kept = 0
            if piece.wants_logits:
                kept = self._choose(piece, logits[row : row + len(piece.draft) + 1])
                row += len(piece.draft) + 1
            self._scheduler.settle(piece, kept)
            if piece.sequence.finish is not None:
                self._scheduler.remove(piece.sequence)

    def _choose(self, piece: Slice, logits: NDArray[np.float32]) -> int:
        """Draw from each row in turn while the draft agrees with what is drawn; returns how many draft tokens stay.

        Every token is drawn from the model's own distribution with the request's own random stream, so speculation
        changes neither greedy nor sampled output."""
        sequence = piece.sequence
        kept = 0
        for index, logits_V in enumerate(logits):
            token = sequence.sampler.choose(logits_V)
            if not sequence.accept(_produced(sequence, logits_V, token)):
                break
            if index < len(piece.draft) and token == piece.draft[index]:
                kept += 1
                continue
            break
        sequence.drafted += len(piece.draft)
        sequence.accepted += kept
        return kept

    def _run(
        self,
        tokens: list[int],
        positions: list[int],
        first_row: list[int],
        pages: list[list[int]],
        wanted: list[int],
        logits: NDArray[np.float32],
    ) -> None:
        table = np.zeros((len(pages), max(len(row) for row in pages)), np.int32)
        for index, row in enumerate(pages):
            table[index, : len(row)] = row
        self._engine.run(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(first_row, np.int32),
            table,
            np.array(wanted, np.int32),
            logits,
        )


def _wide(activations: str, config: ModelConfig) -> bool:
    """Whether activations get 16 bits. `auto`: in dense models, whose few outlying channels make 8 bits cost more than
    the weights' own rounding did; among experts 8 bits stay, where most of a prompt's time goes."""
    if activations not in ("auto", "int8", "int16"):
        raise ConfigError("activations", f"{activations!r} is not one of auto, int8, int16")
    return activations == "int16" or (activations == "auto" and config.moe is None)


def _produced(sequence: Sequence, logits_V: NDArray[np.float32], token: int) -> Produced:
    if sequence.params.logprobs is None:
        return Produced(token=token)
    logprobs_V = log_softmax(logits_V)
    top = tuple((i, float(logprobs_V[i])) for i in likeliest(logprobs_V, sequence.params.logprobs))
    return Produced(token=token, logprob=float(logprobs_V[token]), top=top)
