"""One thread that owns the engine: it loads the model, then works through a bounded queue of generations.

The event loop never computes and the engine never waits for a socket: results cross from the thread to the loop through
a `Results`, and giving up (a client that left, a shutdown) crosses back as a flag, checked at every token.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, Generic, TypeVar

from shoal.engine import LLM
from shoal.server.errors import ApiError

T = TypeVar("T")
_END = object()


class Results(AsyncIterator[T], Generic[T]):
    """What one job yields, read on the event loop. Ends as the job ends; raises what the job raised."""

    def __init__(self, worker: EngineWorker, source: Generator[T, None, None]) -> None:
        self.source = source
        self.cancelled = threading.Event()
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._items: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._finished = False

    def put(self, item: Any) -> None:
        """From the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._append, item)
        except RuntimeError:  # the loop is gone, and with it the reader
            self.cancelled.set()

    def cancel(self) -> None:
        """Give up: a waiting job leaves the queue at once, a running one ends after its current step."""
        self.cancelled.set()
        self._worker.forget(self)

    async def next(self, timeout: float | None = None) -> T | None:
        """The next item, or None if none arrives within `timeout` seconds. Raises StopAsyncIteration at the end."""
        while not self._items:
            if self._finished:
                raise StopAsyncIteration
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout)
            except asyncio.TimeoutError:
                return None
        item = self._items.popleft()
        if isinstance(item, Exception):
            self._finished = True
            raise item
        if item is _END:
            self._finished = True
            raise StopAsyncIteration
        return item  # type: ignore[no-any-return]

    async def __anext__(self) -> T:
        item = await self.next()
        assert item is not None
        return item

    def _append(self, item: Any) -> None:
        self._items.append(item)
        self._arrived.set()


class EngineWorker:
    """The engine and its thread.

    Args:
        load: makes the engine; called once, on the thread.
        max_queue: most jobs that wait while another runs; more are refused with 429.
        on_failure: called on the thread if loading fails; `error` then says why.
    """

    def __init__(
        self, load: Callable[[], LLM], *, max_queue: int = 64, on_failure: Callable[[], None] | None = None
    ) -> None:
        self.error: Exception | None = None
        self._load = load
        self._on_failure = on_failure
        self._max_queue = max_queue
        self._llm: LLM | None = None
        self._waiting: deque[Results[Any]] = deque()
        self._running: Results[Any] | None = None
        self._closing = False
        self._changed = threading.Condition()
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
        return int(self._running is not None)

    def engine(self) -> LLM:
        """The loaded engine; ApiError 503 while there is none."""
        if self._llm is None or self._closing:
            state = self.state
            raise ApiError(503, f"the model is {state}", code=f"model_{state}", headers={"retry-after": "2"})
        return self._llm

    def submit(self, source: Generator[T, None, None]) -> Results[T]:
        """Queue a job; its generator runs and is closed on the engine's thread. ApiError 429 if the queue is full."""
        results = Results(self, source)
        with self._changed:
            if self._closing:
                raise ApiError(503, "the server is stopping", code="model_stopping")
            if len(self._waiting) >= self._max_queue:
                wait = min(60, max(1, round(self._mean_seconds * len(self._waiting))))
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are waiting already; try again in {wait} s",
                    code="queue_full",
                    headers={"retry-after": str(wait)},
                )
            self._waiting.append(results)
            self._changed.notify()
        return results

    def forget(self, results: Results[Any]) -> None:
        """Take a job out of the queue if it still waits there."""
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(results)

    def stop(self, timeout: float = 5.0) -> None:
        """Cancel everything and end the thread. One that still loads, or is busy longer than `timeout` seconds, is left
        (`alive`): it is inside native code, which nothing can interrupt."""
        loading = self.state == "loading"
        with self._changed:
            self._closing = True
            for results in (*self._waiting, self._running):
                if results is not None:
                    results.cancelled.set()
            self._changed.notify()
        if self.alive and not loading:
            self._thread.join(timeout)

    def _main(self) -> None:
        try:
            self._llm = self._load()
        except Exception as error:
            self.error = error
            if self._on_failure is not None:
                self._on_failure()
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                self._running = self._waiting.popleft()
            self._run(self._running)
            self._running = None

    def _run(self, results: Results[Any]) -> None:
        started = time.perf_counter()
        last: Any = _END
        try:
            if not results.cancelled.is_set():
                for item in results.source:
                    if results.cancelled.is_set():
                        break
                    results.put(item)
        except Exception as error:  # the request fails, the thread lives
            last = error
        finally:
            results.source.close()
        results.put(last)
        self._mean_seconds += 0.2 * (time.perf_counter() - started - self._mean_seconds)
