#!/usr/bin/env python3
"""The load of `serve.py`, as a process of its own: HTTP/1.1 over kept connections, with as little else as possible.

Prints one line of JSON: what was answered, how fast, and what the server said meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 15.0  # seconds that an open loop waits for its last answers: whoever falls behind further has lost them
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
    """What came back: seconds of each complete answer, counts of each status, and what was lost."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    lost: int = 0
    health: list[float] = field(default_factory=list)
    retry_after: int = 0

    def report(self, wall: float) -> dict[str, Any]:
        ordered = sorted(self.seconds)

        def percentile(share: float) -> float | None:
            return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

        return {
            "wall_s": wall,
            "answers": len(ordered),
            "answers_per_s": len(ordered) / wall,
            "tokens_per_s": self.tokens / wall,
            "p50_ms": percentile(0.5),
            "p90_ms": percentile(0.9),
            "p99_ms": percentile(0.99),
            "mean_ms": 1000 * statistics.fmean(ordered) if ordered else None,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "with_retry_after": self.retry_after,
            "lost": self.lost,
            "health_checks": len(self.health),
            "health_worst_ms": 1000 * max(self.health) if self.health else None,
        }


class Connection:
    """One kept connection."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[bytes, bytes], bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in lines[1:] if b": " in line)
        if fields.get(b"transfer-encoding") == b"chunked":
            content = b""
            while size := int(await reader.readline(), 16):
                content += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            content = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        if fields.get(b"connection") == b"close":
            self.close()
        return int(lines[0].split()[1]), fields, content

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Load:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        url = urlsplit(args.url)
        self.host, self.port = str(url.hostname), int(url.port or 80)
        self.seen = Seen()
        self.until = 0.0
        self.rng = random.Random(args.seed)

    def body(self) -> tuple[str, bytes]:
        """A request like the others, but with a beginning of its own, so that no cache has read it before."""
        args = self.args
        common = {"max_tokens": args.gen, "temperature": 0, "ignore_eos": True, "stream": False, "cache_prompt": False}
        if args.chat:
            question = f"[{self.rng.randrange(10**6)}] {self.rng.choice(QUESTIONS)}"
            body = {"messages": [{"role": "user", "content": question}], **common}
            return "/v1/chat/completions", json.dumps(body).encode()
        ids = [self.rng.randrange(300, args.vocabulary) for _ in range(args.prompt)]
        return "/v1/completions", json.dumps({"prompt": ids, **common}).encode()

    async def one(self, connection: Connection) -> int:
        path, body = self.body()
        began = time.perf_counter()
        try:
            status, fields, content = await connection.ask("POST", path, body)
        except asyncio.CancelledError:
            connection.close()
            raise
        except (OSError, EOFError, ValueError):
            connection.close()
            self.seen.lost += 1
            return 0
        took = time.perf_counter() - began
        self.seen.statuses[status] += 1
        self.seen.retry_after += b"retry-after" in fields
        if status == 200:
            self.seen.seconds.append(took)
            self.seen.tokens += json.loads(content)["usage"]["completion_tokens"]
        return status

    async def client(self) -> None:
        """Asks again as soon as it has its answer; a refused one waits a little, or refusals would be all there is."""
        connection = Connection(self.host, self.port)
        while time.perf_counter() < self.until:
            if await self.one(connection) != 200:
                await asyncio.sleep(0.1)
        connection.close()

    async def open_loop(self) -> None:
        """Asks at a fixed rate, whether or not answers come; what is not answered soon after the last is lost."""
        idle: list[Connection] = []
        tasks: set[asyncio.Task[None]] = set()

        async def ask() -> None:
            connection = idle.pop() if idle else Connection(self.host, self.port)
            await self.one(connection)
            idle.append(connection)

        began = time.perf_counter()
        number = 0
        while (due := began + number / self.args.rate) < self.until:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.ensure_future(ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        end = time.perf_counter() + PATIENCE
        while tasks and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        self.seen.lost += len(tasks)
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in idle:
            connection.close()

    async def watch(self) -> None:
        connection = Connection(self.host, self.port)
        while time.perf_counter() < self.until:
            began = time.perf_counter()
            status, _, _ = await connection.ask("GET", "/health")
            assert status == 200
            self.seen.health.append(time.perf_counter() - began)
            await asyncio.sleep(0.25)
        connection.close()

    async def run(self) -> dict[str, Any]:
        for seconds in (self.args.warm_up, self.args.seconds):
            self.seen = Seen()
            began = time.perf_counter()
            self.until = began + seconds
            jobs = [self.open_loop()] if self.args.rate else [self.client() for _ in range(self.args.clients)]
            await asyncio.gather(self.watch(), *jobs)
        return self.seen.report(time.perf_counter() - began)


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
    print(json.dumps(asyncio.run(Load(parser.parse_args()).run())))


if __name__ == "__main__":
    main()
