#!/usr/bin/env python3
"""The load of `serve.py`, as a process of its own: HTTP/1.1 over kept connections, with as little else as possible,
since on few cores whatever the client computes is taken from the server.

Prints one line of JSON: what was answered, how fast, and what the server said meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

Reply = tuple[int, bytes, bytes]  # status, head in lower case, content
Then = Callable[["Reply | None"], None]
PATIENCE = 15.0  # seconds to wait for the last answers: what comes later counts as lost
PREPARED = 300  # requests made before a second of a load without a rate; more are made on the way
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)")
QUESTIONS = (
    "How do I reset my password?",
    "What are your opening hours?",
    "My parcel has not arrived. What can I do?",
    "Can I change the address of my order?",
    "How do I return a pair of shoes?",
    "Which payment methods do you accept?",
    "I was charged twice. Please help.",
    "How do I close my account?",
)


@dataclass(kw_only=True)
class Seen:
    """What came back: seconds and content of each complete answer, counts of each status, and what was lost."""

    seconds: list[float] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)  # read when all is over
    statuses: Counter[int] = field(default_factory=Counter)
    lost: int = 0
    health: list[float] = field(default_factory=list)
    retry_after: int = 0

    def report(self, wall: float, worked: float) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        tokens = sum(json.loads(content)["usage"]["completion_tokens"] for content in self.contents)

        def percentile(share: float) -> float | None:
            return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

        return {
            "wall_s": wall,
            "answers": len(ordered),
            "answers_per_s": len(ordered) / wall,
            "tokens_per_s": tokens / wall,
            "p50_ms": percentile(0.5),
            "p90_ms": percentile(0.9),
            "p99_ms": percentile(0.99),
            "mean_ms": 1000 * statistics.fmean(ordered) if ordered else None,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "with_retry_after": self.retry_after,
            "lost": self.lost,
            "client_cpu_s": worked,
            "health_checks": len(self.health),
            "health_worst_ms": 1000 * max(self.health) if self.health else None,
        }


class Connection(asyncio.Protocol):
    """One kept connection with at most one request under way; opened when it is first needed."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._transport: asyncio.Transport | None = None
        self._opening: asyncio.Task[Any] | None = None
        self._held = b""
        self._then: Then | None = None

    def ask(self, request: bytes, then: Then) -> None:
        """Send a request; `then` is called with status, head (lower case) and content, or with None if none came."""
        self._then = then
        if self._transport is not None:
            self._transport.write(request)
        else:
            self._opening = asyncio.ensure_future(self._open(request))

    async def _open(self, request: bytes) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, *self._address)
        except OSError:
            self._end(None)
            return
        assert self._transport is not None
        self._transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._held = cast(asyncio.Transport, transport), b""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:  # the other side's doing
            self._transport = None
            self._end(None)

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, blank, content = self._held.partition(b"\r\n\r\n")
        if not blank:
            return
        head = head.lower()
        if length := LENGTH.search(head):
            if len(content) < int(length[1]):
                return
        elif b"transfer-encoding: chunked" in head:
            if not content.endswith(b"0\r\n\r\n"):
                return
            content = b"".join(unchunked(content))
        self._held = b""
        if b"\r\nconnection: close" in head and self._transport is not None:
            self._transport.close()
            self._transport = None
        self._end((int(head[9:12]), head, content))

    def _end(self, reply: Reply | None) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(reply)

    def close(self) -> None:
        """Whatever is under way is forgotten."""
        self._then = None
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def unchunked(content: bytes) -> Iterator[bytes]:
    while size := int(content[: content.index(b"\r\n")], 16):
        first = content.index(b"\r\n") + 2
        yield content[first : first + size]
        content = content[first + size + 2 :]


class Load:
    """Callbacks on one event loop, and requests made beforehand: on a machine of few cores what the client computes
    while it measures is taken from the server."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        url = urlsplit(args.url)
        self.host, self.port = str(url.hostname), int(url.port or 80)
        self.seen = Seen()
        self.until = 0.0
        self.rng = random.Random(args.seed)
        self.requests: list[bytes] = []
        self.idle: list[Connection] = []
        self.under_way: set[Connection] = set()

    def request(self) -> bytes:
        """A request like the others, but with a beginning of its own, so that no cache has read it before."""
        args = self.args
        body = {"max_tokens": args.gen, "temperature": 0, "ignore_eos": True, "stream": False, "cache_prompt": False}
        if args.chat:
            question = f"[{self.rng.randrange(10**6)}] {self.rng.choice(QUESTIONS)}"
            body |= {"messages": [{"role": "user", "content": question}]}
            return self.message("POST", "/v1/chat/completions", json.dumps(body).encode())
        body |= {"prompt": [self.rng.randrange(300, args.vocabulary) for _ in range(args.prompt)]}
        return self.message("POST", "/v1/completions", json.dumps(body).encode())

    def message(self, method: str, path: str, body: bytes = b"") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"Content-Type: application/json\r\n\r\n" + body

    def send(self, connection: Connection, due: float, then: Callable[[int], None]) -> None:
        """One request and the books about it; `then` gets the status, 0 if the connection broke."""

        def arrived(reply: Reply | None) -> None:
            self.under_way.discard(connection)
            if reply is None:
                self.seen.lost += 1
                then(0)
                return
            status, head, content = reply
            self.seen.statuses[status] += 1
            if status == 200:
                self.seen.seconds.append(time.perf_counter() - due)
                self.seen.contents.append(content)
            else:
                self.seen.retry_after += b"\r\nretry-after: " in head
            then(status)

        self.under_way.add(connection)
        connection.ask(self.requests.pop() if self.requests else self.request(), arrived)

    def client(self) -> None:
        """Asks again as soon as it has its answer; a refused one waits a little, or refusals would be all there is."""
        connection = Connection(self.host, self.port)
        loop = asyncio.get_running_loop()

        def go_on(status: int) -> None:
            if time.perf_counter() >= self.until:
                connection.close()
            elif status == 200:
                self.send(connection, time.perf_counter(), go_on)
            else:
                loop.call_later(0.1, go_on, 200)

        go_on(200)

    async def open_loop(self) -> None:
        """Asks at a fixed rate, whether or not answers come. An answer's time counts from when its request was due."""
        began, number = time.perf_counter(), 0
        while (due := began + number / self.args.rate) < self.until:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            connection = self.idle.pop() if self.idle else Connection(self.host, self.port)
            self.send(connection, due, lambda status, connection=connection: self.idle.append(connection))
            number += 1

    async def watch(self) -> None:
        connection = Connection(self.host, self.port)
        message = self.message("GET", "/health")
        while (began := time.perf_counter()) < self.until:
            reply: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
            connection.ask(message, reply.set_result)
            answer = await reply
            assert answer is not None
            assert answer[0] == 200
            self.seen.health.append(time.perf_counter() - began)
            await asyncio.sleep(0.25)
        connection.close()

    async def phase(self, seconds: float) -> dict[str, Any]:
        args = self.args
        self.requests = [self.request() for _ in range(int(seconds * (args.rate or PREPARED)) + 1)]
        self.seen = Seen()
        gc.collect()
        gc.freeze()
        began, worked = time.perf_counter(), time.process_time()
        self.until = began + seconds
        if not args.rate:
            for _ in range(args.clients):
                self.client()
        await asyncio.gather(self.watch(), *([self.open_loop()] if args.rate else []))
        end = time.perf_counter() + PATIENCE
        while self.under_way and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        wall, worked = time.perf_counter() - began, time.process_time() - worked
        self.seen.lost += len(self.under_way)
        for connection in (*self.under_way, *self.idle):
            connection.close()
        self.under_way.clear()
        self.idle.clear()
        return self.seen.report(wall, worked)

    async def run(self) -> dict[str, Any]:
        await self.phase(self.args.warm_up)
        return await self.phase(self.args.seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: as fast as the clients can")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--gen", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(uvloop.run(Load(parser.parse_args()).run())))


if __name__ == "__main__":
    main()
