"""One thread that owns the engine: it loads the model, then steps through all running generations together.

Every step advances each of them by a token. What a step brought crosses to the event loop in one call, and the loop
never computes while the engine never waits for a socket. Giving up (a client that left, a shutdown) goes the other way:
it frees the cache pages at once and the generation is gone at the next step.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from shoal.engine import LLM, Chunk
from shoal.server.errors import ApiError, named
from shoal.server.metrics import Metrics

Piece = tuple[int, Any]  # number of the choice, and what it produced: a Chunk, if it is a generation
_END = object()


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Work(Protocol):
    """What the thread advances: a `Generation`, or something with its face."""

    done: bool

    @property
    def settled(self) -> bool:
        """Whether `ready` may bring the end; until then, whoever wants only the whole need not ask."""

    def start(self) -> None: ...

    def ready(self) -> Sequence[Any]:
        """What is new; never waits long. Raises what ended it."""

    def cancel(self) -> None: ...


class Results(AsyncIterator[Piece]):
    """What the generations of one request yield, read on the event loop. Ends as they end; raises what one raised.
    `whole`: it comes at once, when all of it is there, so that the steps before cost the event loop nothing."""

    def __init__(
        self, worker: EngineWorker, generations: Sequence[Work], *, whole: bool, fields: Mapping[str, str]
    ) -> None:
        self.generations = generations
        self.whole = whole
        self._fields = fields
        self.failed: Exception | None = None
        self.asked_at = time.perf_counter()
        self.started_at = 0.0
        self.deadline = float("inf")
        self.loop = asyncio.get_running_loop()
        self._worker = worker
        self._items: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._last_at: list[float] = [0.0] * len(generations)  # of each choice's newest token
        self._finished = False
        self._held: list[Any] = []

    @property
    def metrics(self) -> Metrics:
        return self._worker.metrics

    def cancel(self) -> None:
        """Give up, from any thread: a waiting request leaves the queue, a running one gives its pages back. One that
        has been read to its end has done both."""
        if self._finished:
            return
        for generation in self.generations:
            generation.cancel()
        self._worker.forget(self)

    def start(self) -> None:
        """On the engine's thread."""
        self.started_at = time.perf_counter()
        try:
            for generation in self.generations:
                generation.start()
        except Exception as error:  # this request fails, the thread lives
            self.failed = error

    def collect(self, now: float) -> list[Any]:
        """On the engine's thread: what is new, ending with what ended it: an exception or the mark of the end."""
        if self.failed is None and now > self.deadline:
            self.failed = late()
        if self.failed is not None:
            return [self.failed]
        items = self._held
        try:
            for index, generation in enumerate(self.generations):
                if self.whole and not generation.settled:
                    continue
                for chunk in generation.ready():
                    items.append((index, chunk))
                    if isinstance(chunk, Chunk):
                        self._measure(index, chunk, now)
        except Exception as error:
            return [*items, error]
        if all(generation.done for generation in self.generations):
            items.append(_END)
        elif self.whole:
            return []
        self._held = []
        return items

    def _measure(self, index: int, chunk: Chunk, now: float) -> None:
        metrics, last = self._worker.metrics, self._last_at[index]
        if chunk.token_ids and not self.whole:
            if last:
                metrics.inter_token_seconds.add((now - last) / len(chunk.token_ids), len(chunk.token_ids))
            else:
                metrics.first_token_seconds.add(now - self.asked_at)
            self._last_at[index] = now
        if chunk.stats is not None and chunk.finish_reason is not None:
            waited = self.started_at - self.asked_at
            if self.whole:  # nobody saw its tokens come: their mean distance stands for each
                metrics.add_whole(chunk.stats, waited=waited)
            metrics.add_answer(chunk.stats, chunk.finish_reason, waited=waited, seconds=now - self.asked_at)

    def put(self, items: list[Any]) -> None:
        """On the event loop."""
        self._items.extend(items)
        self._arrived.set()

    def leave(self) -> None:
        """On the event loop: end the reading by ClientGoneError."""
        self._items.appendleft(ClientGoneError())
        self._arrived.set()

    async def next(self, timeout: float | None = None) -> Piece | None:
        """The next item, or None if none arrives within `timeout` seconds. Raises StopAsyncIteration at the end."""
        while not self._items:
            if self._finished:
                raise StopAsyncIteration
            self._arrived.clear()
            if timeout is None:
                await self._arrived.wait()
                continue
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout)
            except asyncio.TimeoutError:
                return None
        item = self._items.popleft()
        if isinstance(item, ClientGoneError):
            raise item
        if isinstance(item, Exception):
            self._finished = True
            raise named(item, self._fields)
        if item is _END:
            self._finished = True
            raise StopAsyncIteration
        return item  # type: ignore[no-any-return]

    async def __anext__(self) -> Piece:
        item = await self.next()
        assert item is not None
        return item


class EngineWorker:
    """The engine and its thread.

    Args:
        load: makes the engine; called once, on the thread.
        parallel: most generations that run at once. A request with more of them than that runs alone.
        max_queue: most requests that wait for a place; more are refused with 429.
        seconds: most that a request may take, the wait included; it then ends with 408, or an error event.
        on_failure: called on the thread if loading fails; `error` then says why.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        *,
        parallel: int = 32,
        max_queue: int = 64,
        seconds: float = float("inf"),
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.error: Exception | None = None
        self._load = load
        self._on_failure = on_failure
        self._parallel = parallel
        self.max_queue = max_queue
        self._seconds = seconds
        self.metrics = Metrics()
        self._llm: LLM | None = None
        self._waiting: deque[Results] = deque()
        self._running: list[Results] = []
        self._closing = False
        self._changed = threading.Condition()  # guards the two lists
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._main, name="shoal-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> str:
        if self._closing:
            return "stopping"
        if self.error is not None:
            return "failed"
        return "loading" if self._llm is None else "ready"

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def engine(self) -> LLM:
        """The loaded engine; ApiError 503 while there is none."""
        if self._llm is None or self.state != "ready":
            raise _unavailable(self.state)
        return self._llm

    def submit(
        self,
        generations: Sequence[Work],
        *,
        seconds: float | None = None,
        whole: bool = False,
        fields: Mapping[str, str] | None = None,
    ) -> Results:
        """Queue a request; its generations run side by side. `seconds`: less than the server's own limit, if given;
        `whole`: see `Results`; `fields`: see `errors.named`. ApiError 429: the queue is full; 503: not serving."""
        results = Results(self, generations, whole=whole, fields=fields or {})
        results.deadline = results.asked_at + min(self._seconds, self._seconds if seconds is None else seconds)
        with self._changed:
            if self.state in ("stopping", "failed"):
                raise _unavailable(self.state)
            # The thread may not have taken the first ones out of the queue yet: those are as good as running.
            queued = len(self._waiting) - self._num_startable()
            if queued >= self.max_queue and not self._has_room(len(generations), (*self._running, *self._waiting)):
                raise self.busy()
            self._waiting.append(results)
            self._changed.notify()
        return results

    def forget(self, results: Results) -> None:
        """Take a request out of the queue if it still waits there, and wake the thread if it runs."""
        with self._changed:
            if results in self._waiting:
                self._waiting.remove(results)
            self._changed.notify()

    def stop(self, timeout: float = 5.0) -> None:
        """Cancel everything and end the thread. One that still loads, or is busy longer than `timeout` seconds, is left
        (`alive`): it is inside native code, which nothing can interrupt."""
        loading = self.state == "loading"
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.alive and not loading:
            self._thread.join(timeout)

    def busy(self) -> ApiError:
        """How a request is refused that would have to wait behind too many."""
        wait = min(60, max(1, round(self._mean_seconds * (self.max_queue / self._parallel + 1))))
        return ApiError(
            429,
            f"the engine is busy and {self.max_queue} requests wait already; try again in {wait} s",
            code="queue_full",
            headers={"retry-after": str(wait)},
        )

    def _has_room(self, count: int, others: Sequence[Results]) -> bool:
        return not others or count + sum(len(other.generations) for other in others) <= self._parallel

    def _num_startable(self) -> int:
        count, ahead = 0, list(self._running)
        for results in self._waiting:
            if not self._has_room(len(results.generations), ahead):
                break
            ahead.append(results)
            count += 1
        return count

    def _main(self) -> None:
        try:
            self._llm = self._load()
        except Exception as error:
            self.error = error
            if self._on_failure is not None:
                self._on_failure()
            return
        try:
            while not self._closing:
                self._serve()
        except Exception as error:  # a fault of ours: better to end the server than to leave its clients waiting
            self.error = error
            if self._on_failure is not None:
                self._on_failure()
        finally:
            self._end_all()

    def _serve(self) -> None:
        """Wait for work, then one step."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
            now = time.perf_counter()
            late_ones = [results for results in self._waiting if now > results.deadline]
            for results in late_ones:
                self._waiting.remove(results)
                results.failed = late()
            fresh = [self._waiting.popleft() for _ in range(self._num_startable())]
            self._running.extend((*fresh, *late_ones))
        for results in fresh:
            results.start()
        self._step()

    def _step(self) -> None:
        assert self._llm is not None
        try:
            self._llm.step()
        except Exception as error:  # a fault of ours: whoever runs is told
            for results in self._running:
                results.failed = error
        self._hand_over()

    def _hand_over(self) -> None:
        """Give each event loop, in one call, what the step brought to its requests."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[Results, list[Any]]]] = {}
        ended: list[Results] = []
        now = time.perf_counter()
        for results in self._running:
            items = results.collect(now)
            if items:
                news.setdefault(results.loop, []).append((results, items))
                if items[-1] is _END or isinstance(items[-1], Exception):
                    ended.append(results)
        self._finish(ended)
        for loop, parcels in news.items():
            try:
                loop.call_soon_threadsafe(_deliver, parcels)
            except RuntimeError:  # the loop is gone, and with it the readers
                for results, _ in parcels:
                    results.cancel()

    def _finish(self, ended: list[Results]) -> None:
        for results in ended:
            for generation in results.generations:
                generation.cancel()
            if results.started_at:  # else it was late before it ran
                self._mean_seconds += 0.2 * (time.perf_counter() - results.started_at - self._mean_seconds)
        with self._changed:
            self._running = [results for results in self._running if results not in ended]

    def _end_all(self) -> None:
        with self._changed:
            self._running.extend(self._waiting)
            self._waiting.clear()
        for results in self._running:
            results.failed = _unavailable(self.state)
        self._hand_over()


def late() -> ApiError:
    return ApiError(408, "the request took longer than it may", code="deadline_exceeded")


def _unavailable(state: str) -> ApiError:
    return ApiError(503, f"the model is {state}", code=f"model_{state}", headers={"retry-after": "2"})


def _deliver(parcels: list[tuple[Results, list[Any]]]) -> None:
    for results, items in parcels:
        results.put(items)
