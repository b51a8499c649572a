"""A line of log for each request, and the id by which client and log speak of it.

Prompts and answers are never logged unless asked for. A log that cannot be written stops nothing.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
import time
from datetime import datetime, timezone
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KINDS = ("text", "json", "none")
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
UNLOGGED = frozenset({"/health", "/metrics"})  # what machines ask every few seconds


def new_id() -> str:
    """128 random bits. They name, they guard nothing: so they need no system call."""
    return f"{random.getrandbits(128):032x}"


def log(kind: str, event: str, **fields: Any) -> None:
    """One line on stderr: JSON, or text whose control characters are gone."""
    if kind == "none":
        return
    if kind == "json":
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = orjson.dumps({"time": now, "event": event, **fields}, default=str).decode()
    else:
        shown = " ".join(f"{name}={value}" for name, value in fields.items())
        line = "".join(char if char.isprintable() else "?" for char in f"shoal: {event} {shown}".rstrip())
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class Journal:
    """ASGI middleware, the outermost. Routes add what they know to `scope["note"]`.

    Args:
        kind: `text`, `json` or `none`.
        prompts: also log the request's body.
    """

    def __init__(self, app: ASGIApp, kind: str = "none", prompts: bool = False) -> None:
        self._app = app
        self._kind = kind
        self._prompts = prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if _ID.fullmatch(given) else new_id().encode()
        note: dict[str, Any] = {"wants_body": self._prompts}
        scope["note"] = note
        status = 499  # until the answer starts: the client left

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._kind != "none" and (scope["path"] not in UNLOGGED or status not in (200, 503)):
                self._write(scope, request_id.decode(), status, time.perf_counter() - began, note)

    def _write(self, scope: Scope, request_id: str, status: int, seconds: float, note: dict[str, Any]) -> None:
        note.pop("wants_body")
        log(
            self._kind,
            "request",
            id=request_id,
            client=(scope.get("client") or ["?"])[0],
            method=scope["method"],
            path=scope["path"][:200],
            status=status,
            seconds=round(seconds, 4),
            **note,
        )
