"""Answers that end when the client leaves: server-sent events, and whole answers that took a while to make."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.server.errors import as_api_error
from shoal.server.worker import Results

T = TypeVar("T")

PING_SECONDS = 15.0
SEND_SECONDS = 30.0  # how long a client may leave its socket full
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


class EventStream(Response):
    """Sends `make_events` of each result as it comes, a comment every 15 s of silence, and `[DONE]`.

    The headers have left by the time an engine fails, so a failure becomes an event with the usual error body. A client
    that goes away cancels the job.
    """

    def __init__(self, results: Results, make_events: Callable[[Any], list[dict[str, Any]]]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._results = results
        self._make_events = make_events
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> bool:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._pieces():
                self._sending_since = time.monotonic()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                self._sending_since = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return True

        work = asyncio.ensure_future(stream())
        watch = asyncio.ensure_future(self._watch(work))
        try:
            if await unless_disconnected(receive, work) is None:
                self._results.metrics.cancelled += 1
        finally:
            watch.cancel()
            self._results.cancel()

    async def _watch(self, work: asyncio.Future[bool]) -> None:
        """Give up a client that has not read for a while: its answer would go on to cost time for nobody."""
        while True:
            await asyncio.sleep(SEND_SECONDS / 4)
            if self._sending_since is not None and time.monotonic() - self._sending_since > SEND_SECONDS:
                work.cancel()
                return

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            while True:
                item = await self._results.next(PING_SECONDS)
                if item is None:
                    yield PING
                else:
                    for body in self._make_events(item):
                        yield event(body)
        except StopAsyncIteration:
            pass
        except Exception as error:
            answer = as_api_error(error)
            self._results.metrics.count_refused(answer)
            yield event(answer.body())
        yield DONE


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None if the client went away first, in which case `work` is cancelled."""
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        return job.result() if job.done() and not job.cancelled() else None
    finally:
        job.cancel()
        gone.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
