"""Bounds on connections that uvicorn leaves open: heads that never end, and clients that never ask."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 30.0
MAX_HEAD_BYTES = 64 << 10


class PatientProtocol(H11Protocol):
    """Closes a connection on which no request was under way at two looks in a row, 30 s apart: a head that trickles in
    counts as none, so that it cannot hold a connection for ever. Silence after an answer is uvicorn's to time."""

    _look: asyncio.TimerHandle | None = None
    _last_idle: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._last_idle = object()
        self._look = self.loop.call_later(IDLE_SECONDS, self._look_around)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def _look_around(self) -> None:
        silent = self.timeout_keep_alive_task is not None
        idle = not silent and (self.cycle is None or self.cycle.response_complete)
        if idle and self._last_idle is self.cycle:
            self.transport.close()
            return
        self._last_idle = self.cycle if idle else object()
        self._look = self.loop.call_later(IDLE_SECONDS, self._look_around)
