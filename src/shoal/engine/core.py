"""The engine's heart: packed weights, cache, scheduler, one native call a step.

There is no background thread. Whoever waits for a token runs a step if nobody else does, which advances every running
sequence; the others wait for that step to end and find their tokens ready. Submitting and releasing never wait for a
step: while one computes, only its thread hands out pages or touches the sequences in it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.config import ModelConfig
from shoal.engine.adapters import PackedAdapter
from shoal.engine.expert_load import ExpertLoad
from shoal.engine.memory import check_memory
from shoal.engine.pages import PagePool
from shoal.engine.plan import PAGE_TOKENS, Moments, cache_widths, write_plan
from shoal.engine.prefill import expand_from
from shoal.engine.routing import Routing, Step, read_routing
from shoal.engine.sampler import likeliest, log_total
from shoal.engine.scheduler import Scheduler, Slice
from shoal.engine.sequence import Produced, Sequence
from shoal.errors import ConfigError, RequestError
from shoal.formats.checkpoint import Checkpoint
from shoal.machine import usable_cpus

Floats = NDArray[np.float32]
STEP_TOKENS = 512
CACHES = {"f32": 0, "bf16": 1, "int8": 2}
MIXED_TOKENS = 128
SAMPLED = 16  # of so many steps one is counted in `expert_load`: reading where the tokens went takes a while


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy the engine is now."""

    running: int
    waiting: int
    pages: int
    pages_in_use: int


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One step as arrays: tokens of all slices after each other, and the cache pages of each slice [S, pages]."""

    slices: list[Slice]
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    first_row: NDArray[np.int32]
    pages: NDArray[np.int32]
    wanted: NDArray[np.int32]
    expanded: NDArray[np.uint8]
    adapter: NDArray[np.int32] | None  # of each row, if any has one


class _Locked:
    """Holds `turn`; on the way out, free again, does what `release` could not do meanwhile."""

    __slots__ = ("_sweep", "_turn")

    def __init__(self, turn: threading.Condition, sweep: Callable[[], None]) -> None:
        self._turn = turn
        self._sweep = sweep

    def __enter__(self) -> None:
        self._turn.acquire()

    def __exit__(self, *_: object) -> None:
        self._turn.release()
        self._sweep()


class Core:
    """Runs sequences. Safe to use from several threads.

    Args:
        threads: team size; all processors that this process may use if None.
        weights: `auto` or a packing (`engine.packing`).
        activations: `int8`, `int16` or `auto`: what rows become where they meet quantised weights.
        cache: `bf16`, `int8` (64 values to a scale) or `f32`.
        cache_tokens: how many tokens the cache holds over all sequences.
        max_running: most sequences that run at once.
        known_ids: ids from here on are padding of the embedding table and are never chosen.
        look_ahead: guess one token ahead with the model's multi-token-prediction layer, if it has one.
        prefill: `auto`, `absorbed` or `expanded`: form of a latent model's attention over prompts (`engine.prefill`).
        step_tokens, mixed_tokens: see `Scheduler`; they change speed, never results.
        moments: to be filled with what every matrix meets (`plan.write_plan`), for calibration.
        helpers_on: processors for the team's threads beside the one that steps; any if none are named.
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
        look_ahead: bool = False,
        prefill: str = "auto",
        step_tokens: int = STEP_TOKENS,
        mixed_tokens: int = MIXED_TOKENS,
        moments: Moments | None = None,
        helpers_on: Collection[int] = (),
    ) -> None:
        if cache not in CACHES:
            raise ConfigError("cache", f"{cache!r} is not one of {', '.join(CACHES)}")
        config = checkpoint.config
        if cache != "f32" and any(width % 2 for width in cache_widths(config)):  # only a latent's width can be odd
            raise ConfigError("kv_lora_rank", f"is odd, which a {cache} cache cannot hold; choose cache f32")
        wide = _wide(activations, config)
        expand = expand_from(prefill, config)
        check_memory(
            checkpoint, weights=weights, cache=cache, cache_tokens=cache_tokens, look_ahead=look_ahead,
            expand=expand is not None,
        )  # fmt: skip
        self.threads = threads or usable_cpus()
        plan = write_plan(
            checkpoint, threads=self.threads, scheme=weights, wide=wide, look_ahead=look_ahead,
            expand=expand is not None, moments=moments, helpers_on=helpers_on,
        )  # fmt: skip
        pages = -(-cache_tokens // PAGE_TOKENS)
        plan.engine.cache(plan.cache_layers, plan.cache_widths, CACHES[cache], pages)
        self.weight_bytes = plan.weight_bytes
        self.step_bytes = plan.step_bytes
        self.cache_bytes = plan.engine.cache_bytes
        self.vocab_size = config.vocab_size
        self.known_ids = min(known_ids or config.vocab_size, config.vocab_size)
        self.looks_ahead = plan.looks_ahead
        self.plan = plan
        self.wide = wide
        self.cache_type = CACHES[cache]
        self._engine = plan.engine
        self._config = config
        self._steps = 0
        self.expert_load: ExpertLoad | None = None  # set it to have a sample of the steps counted
        self._adapters: dict[int, PackedAdapter] = {}
        self._pool = PagePool(pages)
        self._scheduler = Scheduler(
            self._pool, step_tokens=step_tokens, mixed_tokens=mixed_tokens, max_running=max_running, expand_from=expand
        )
        self._turn = threading.Condition(threading.Lock())  # guards the scheduler; notified after every step
        self._stepping = False
        self._leaving: deque[Sequence] = deque()  # released, but not yet taken out of the scheduler
        self._logits: Floats = np.empty((0, self.vocab_size), np.float32)

    @property
    def cache_tokens(self) -> int:
        return self._pool.count * PAGE_TOKENS

    @property
    def experts_read(self) -> tuple[int, int]:
        """How many routed experts all steps so far have read, over all layers, and their bytes. Every step also reads
        `step_bytes`."""
        count, size = self._engine.experts_read
        return int(count), int(size)

    def add_adapter(self, adapter: PackedAdapter) -> int:
        """Put an adapter beside the weights, between two steps; returns its number."""
        with self._locked():
            self._turn.wait_for(lambda: not self._stepping)
            number = next(i for i in range(len(self._adapters) + 1) if i not in self._adapters)
            adapter.attach(self.plan, number)
            self._adapters[number] = adapter
            self.weight_bytes += adapter.nbytes
        return number

    def drop_adapter(self, number: int) -> bool:
        """Let go of an adapter's memory; False, and nothing done, while a sequence runs with it or waits to."""
        with self._locked():
            self._turn.wait_for(lambda: not self._stepping)
            if any(s.adapter == number for s in (*self._scheduler.running, *self._scheduler.waiting)):
                return False
            self._engine.drop_adapter(number)
            self.weight_bytes -= self._adapters.pop(number).nbytes
        return True

    @property
    def load(self) -> Load:
        with self._locked():
            running, waiting = len(self._scheduler.running), len(self._scheduler.waiting)
            in_use = self._pool.count - self._pool.available
            return Load(running=running, waiting=waiting, pages=self._pool.count, pages_in_use=in_use)

    def submit(self, sequence: Sequence) -> None:
        """Let it run from the next step on. RequestError if the whole cache could not hold it."""
        if len(sequence.tokens) + sequence.max_tokens > self.cache_tokens:
            problem = f"{len(sequence.tokens)} tokens and {sequence.max_tokens} new ones exceed {self.cache_tokens}"
            raise RequestError("prompt", problem, code="context_length_exceeded")
        with self._locked():
            sequence.submitted_at = time.perf_counter()
            if not sequence.cancelled:
                self._scheduler.submit(sequence)

    def release(self, sequence: Sequence) -> None:
        """The caller is done with it, finished or not. Its pages are free at once, even in the middle of a step: the
        step may still write to them, but only its end lets others have them.

        Never waits: the collector of garbage may close a stream, and so call this, at any point of any thread, even
        where that thread holds the lock. Whoever holds it then does the work on its way out."""
        sequence.cancelled = True
        self._leaving.append(sequence)
        self._sweep()

    def _sweep(self) -> None:
        while self._leaving and self._turn.acquire(blocking=False):
            try:
                while self._leaving:
                    self._scheduler.remove(self._leaving.popleft())
                self._turn.notify_all()
            finally:
                self._turn.release()

    def _locked(self) -> _Locked:
        return _Locked(self._turn, self._sweep)

    def advance(self, sequence: Sequence) -> None:
        """Return once the sequence has a new output, is finished or was released."""
        while True:
            with self._locked():
                self._turn.wait_for(lambda: sequence.ready or not self._stepping)
                if sequence.ready:
                    return
                self._stepping = True
            worked = self._step()
            assert worked or sequence.ready, "a sequence waits that was never submitted"

    def step(self) -> bool:
        """Run one step, or wait for the one that another thread runs. False if there is nothing to do."""
        with self._locked():
            if self._stepping:
                self._turn.wait_for(lambda: not self._stepping)
                return True
            self._stepping = True
        return self._step()

    def _step(self) -> bool:
        """By the one thread that has set `_stepping`."""
        done: list[tuple[Slice, int]] = []
        try:
            with self._locked():
                batch = self._plan(self._scheduler.next_step())
            if batch is None:
                return False
            self._compute(batch, done)
            return True
        finally:
            with self._locked():
                for piece, kept in done:
                    self._settle(piece, kept)
                self._stepping = False
                self._turn.notify_all()

    def _plan(self, slices: list[Slice]) -> _Batch | None:
        if not slices:
            return None
        # Lists until the end: a step holds few rows of most slices, and every call into NumPy costs a microsecond.
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        first_row = [0]
        for piece in slices:
            wanted.extend(range(first_row[-1] + piece.logits_from, first_row[-1] + piece.rows))
            positions.extend(range(piece.start, piece.start + piece.rows))
            tokens += piece.tokens
            tokens += piece.draft
            first_row.append(len(tokens))
        most = max(len(piece.sequence.pages) for piece in slices)
        table = np.zeros((len(slices), most), np.int32)
        for index, piece in enumerate(slices):
            table[index, : len(piece.sequence.pages)] = piece.sequence.pages
        adapter = None
        if any(piece.sequence.adapter >= 0 for piece in slices):
            adapter = np.repeat(
                np.array([piece.sequence.adapter for piece in slices], np.int32), [piece.rows for piece in slices]
            )
        return _Batch(
            slices=slices,
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            first_row=np.array(first_row, np.int32),
            pages=table,
            wanted=np.array(wanted, np.int32),
            expanded=np.array([piece.expanded for piece in slices], np.uint8),
            adapter=adapter,
        )

    def _compute(self, batch: _Batch, done: list[tuple[Slice, int]]) -> None:
        """Run the network and choose tokens; `done` receives each slice and how many of its draft tokens stay. What
        goes wrong with one sequence fails that sequence only; what goes wrong with the step fails all of them."""
        if len(batch.wanted) > len(self._logits):
            self._logits = np.empty((len(batch.wanted), self.vocab_size), np.float32)
        logits = self._logits[: len(batch.wanted)]
        started = time.perf_counter()
        try:
            self._engine.run(
                batch.tokens, batch.positions, batch.first_row, batch.pages, batch.wanted, logits,
                adapter=batch.adapter, expanded=batch.expanded,
            )  # fmt: skip
        except Exception as error:
            for piece in batch.slices:
                piece.sequence.fail(error)
            done.extend((piece, 0) for piece in batch.slices)
            return
        ended = time.perf_counter()
        self._steps += 1
        each = (ended - started) / len(batch.tokens)
        best: list[int] = []  # of all rows in one call: each lets other threads in between
        if any(piece.last for piece in batch.slices):  # else prompts are read or scored, and nothing is chosen
            best = logits.argmax(axis=1).tolist()
        row = 0
        for piece in batch.slices:
            first, row = row, row + piece.rows - piece.logits_from
            piece.sequence.machine_seconds += piece.rows * each
            kept = 0
            try:
                if not piece.sequence.cancelled:
                    kept = self._deliver(piece, logits[first:row], best[first:row])
            except Exception as error:
                piece.sequence.fail(error)
            done.append((piece, kept))
        if self.expert_load is not None and self._steps % SAMPLED == 1:
            self.expert_load.add(read_routing(self._engine, self._config, len(batch.tokens))[0])
        if self._config.moe is not None and any(piece.sequence.on_routing for piece in batch.slices):
            step = Step(number=self._steps, rows=len(batch.tokens), started=started, seconds=ended - started)
            self._report_routing(batch, step, [kept for _, kept in done])
        if self.looks_ahead:
            try:
                self._look_ahead(batch, [kept for _, kept in done])
            except Exception as error:
                for piece in batch.slices:
                    piece.sequence.fail(error)

    def _report_routing(self, batch: _Batch, step: Step, kept: list[int]) -> None:
        """Tell who asked where the step's tokens went. Wrong drafts are none of the sequence's tokens, and what is read
        a second time, after its pages were given back, goes where it went before."""
        experts_LTK, weights_LTK, scores_LTE = read_routing(self._engine, self._config, step.rows)
        sigmoid = self._config.moe is not None and self._config.moe.scoring_func == "sigmoid"
        for piece, row, accepted in zip(batch.slices, batch.first_row.tolist(), kept, strict=False):
            sequence = piece.sequence
            skip = max(0, sequence.routed - piece.start)
            tokens = (piece.tokens + piece.draft[:accepted])[skip:]
            if not sequence.on_routing or not tokens:
                continue
            rows = slice(row + skip, row + skip + len(tokens))
            sequence.routed = piece.start + skip + len(tokens)
            routing = Routing(
                first=piece.start + skip, prompt_tokens=sequence.prompt_tokens, tokens=tuple(tokens),
                experts_LTK=experts_LTK[:, rows],
                weights_LTK=weights_LTK[:, rows], scores_LTE=scores_LTE[:, rows], sigmoid=sigmoid, step=step,
            )  # fmt: skip
            try:
                for listen in sequence.on_routing:
                    listen(routing)
            except Exception as error:
                sequence.fail(error)

    def _look_ahead(self, batch: _Batch, kept: list[int]) -> None:
        """Run the prediction layer over the step's rows that stay, each beside the token that really followed it, and
        note its guess of the token after the newest one. Its own cache grows with the main one's."""
        going: list[tuple[int, Slice, int]] = []  # (index in the batch, slice, rows)
        for index, (piece, accepted) in enumerate(zip(batch.slices, kept, strict=True)):
            if piece.sequence.finish is None and not piece.sequence.cancelled:
                rows = min(len(piece.tokens) + accepted, len(piece.sequence.tokens) - piece.start - 1)
                going.append((index, piece, rows))
        if not going:
            return
        first_row = np.zeros(len(going) + 1, np.int32)
        first_row[1:] = np.cumsum([rows for _, _, rows in going])
        guessing = [i for i, (_, piece, _) in enumerate(going) if piece.last]
        logits = np.empty((len(guessing), self.vocab_size), np.float32)
        self._engine.run(
            np.concatenate([np.array(p.sequence.tokens[p.start + 1 : p.start + 1 + n], np.int32) for _, p, n in going]),
            np.concatenate([np.arange(p.start, p.start + n, dtype=np.int32) for _, p, n in going]),
            first_row,
            np.ascontiguousarray(batch.pages[[index for index, _, _ in going]]),
            (first_row[1:][guessing] - 1).astype(np.int32),
            logits,
            1,
            np.concatenate([np.arange(n, dtype=np.int32) + batch.first_row[index] for index, _, n in going]),
            expanded=batch.expanded[[index for index, _, _ in going]],
        )
        for i, logits_V in zip(guessing, logits, strict=True):
            sequence = going[i][1].sequence
            sequence.ahead = (len(sequence.tokens), int(np.argmax(logits_V[: self.known_ids])))

    def _deliver(self, piece: Slice, rows: Floats, best: list[int]) -> int:
        """Show prompt rows to who watches them and choose the next tokens; returns how many draft tokens stay."""
        sequence = piece.sequence
        first = piece.start + piece.logits_from
        if sequence.watch is not None and sequence.watched < sequence.prompt_tokens:
            count = min(len(rows), sequence.prompt_tokens - first)
            if count > 0:
                sequence.watch(first, rows[:count])
                sequence.watched = first + count
        if not piece.last:
            return 0
        if sequence.max_tokens == 0:
            sequence.finish = "length"
            return 0
        chosen = slice(len(rows) - 1 - len(piece.draft), None)
        return self._choose(sequence, piece.draft, rows[chosen, : self.known_ids], best[chosen])

    def _choose(self, sequence: Sequence, draft: list[int], rows: Floats, best: list[int]) -> int:
        """Draw from each row in turn while the draft agrees with what is drawn; returns how many draft tokens stay.

        Every token is drawn from the model's own distribution with the request's own random stream, so speculation
        changes neither greedy nor sampled output."""
        sequence.drafted += len(draft)
        for index, logits_V in enumerate(rows):
            token = sequence.sampler.choose(logits_V, best[index] if best[index] < self.known_ids else None)
            if not sequence.accept(_produced(sequence, logits_V, token)):
                return index
            if index == len(draft) or token != draft[index]:
                return index
            sequence.accepted += 1
        raise AssertionError("unreachable: the row after the last draft token always returns")

    def _settle(self, piece: Slice, kept: int) -> None:
        if piece.sequence.cancelled:
            return
        if piece.sequence.finish != "error":
            self._scheduler.settle(piece, kept)
        if piece.sequence.finish is not None:
            self._scheduler.remove(piece.sequence)


def _wide(activations: str, config: ModelConfig) -> bool:
    """Whether activations get 16 bits. `auto`: in dense models, whose few outlying channels make 8 bits cost more than
    the weights' own rounding did; among experts 8 bits stay, where most of a prompt's time goes."""
    if activations not in ("auto", "int8", "int16"):
        raise ConfigError("activations", f"{activations!r} is not one of auto, int8, int16")
    return activations == "int16" or (activations == "auto" and config.moe is None)


def _produced(sequence: Sequence, logits_V: Floats, token: int) -> Produced:
    count = sequence.params.logprobs
    if count is None:
        return Produced(token=token)
    total = log_total(logits_V)
    top = tuple((i, float(logits_V[i]) - total) for i in likeliest(logits_V, count))
    return Produced(token=token, logprob=float(logits_V[token]) - total, top=top)
