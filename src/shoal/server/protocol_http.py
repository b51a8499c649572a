"""Bounds on connections that uvicorn leaves open: heads that never end, and clients that never ask; and requests that
offer to go on in another protocol, which are answered in this one."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

IDLE_SECONDS = 30.0
MAX_HEAD_BYTES = 64 << 10
FRAMING = (b"content-length", b"transfer-encoding")


class PatientProtocol(HttpToolsProtocol):
    """Closes a connection on which no request was under way at two looks in a row, 30 s apart: a head that trickles in
    counts as none, so that it cannot hold a connection for ever. Silence after an answer is uvicorn's to time."""

    _look: asyncio.TimerHandle | None = None
    _last_idle: Any = None
    _outside = 0  # bytes of the request so far that are not its content: head, frames of chunks, trailers
    _content = 0
    _resuming = False  # while a second parser reads the head that `_read_on` made up

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

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.transport.is_closing():  # refused below, and still talking
            return
        self._outside += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        # The smallest chunks have five bytes of frame for one of content.
        if self._outside > MAX_HEAD_BYTES + 8 * self._content:
            self.send_400_response("The request's head is too large.")

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._read_on(data[offer.args[0] :])

    def _read_on(self, data: bytes) -> None:
        """After a head that offers another protocol (Java's client does so with every first request) the parser takes
        all that follows for that protocol. A second one reads it as this request's content, after a head that says no
        more than how it is framed."""
        framing = b"".join(b"%b: %b\r\n" % field for field in self.headers if field[0] in FRAMING)
        self.parser = httptools.HttpRequestParser(self)
        self._resuming = True
        self._feed(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
        self._resuming = False
        if data:
            self._feed(data)

    def on_message_begin(self) -> None:
        if not self._resuming:
            self._outside = self._content = 0
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._resuming:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._resuming:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._outside -= len(body)
        self._content += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
