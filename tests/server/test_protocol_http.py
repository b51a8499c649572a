"""What a request may look like on the wire, where libraries differ."""

from __future__ import annotations

import socket

import pytest
from tests.server.conftest import Running

TEXT = "/v1/completions"
BODY = b'{"prompt": "Hi", "max_tokens": 5}'
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer(sock: socket.socket, *pieces: bytes) -> bytes:
    """What comes back for a request that is sent in pieces."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        sock.sendall(piece)
    got = b""
    while b"}\n" not in got and not got.endswith(b"}"):
        more = sock.recv(4000)
        if not more:
            break
        got += more
    return got


@pytest.mark.parametrize("cut", [1, 20, 60, 90, 150, 190, None])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_offers_another_protocol_keeps_its_body(server: Running, cut: int | None, chunked: bool) -> None:
    """Java's client offers HTTP/2 with its first request. The connection goes on after it, too."""
    framing, content = b"Content-Length: %d" % len(BODY), BODY
    if chunked:
        framing, content = b"Transfer-Encoding: chunked", b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (
            BODY[:5], len(BODY) - 5, BODY[5:]
        )  # fmt: skip
    head = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\n%b%b\r\n\r\n"
    sent = head % (TEXT.encode(), OFFER, framing) + content
    with connect(server) as sock:
        pieces = (sent,) if cut is None else (sent[:cut], sent[cut:])
        for request in (pieces, (head % (TEXT.encode(), b"", framing) + content,), pieces):
            got = answer(sock, *request)
            assert got.startswith(b"HTTP/1.1 200"), got
            assert b'"text":"Hello"' in got


def test_an_offer_without_a_body_is_answered_as_well(server: Running) -> None:
    with connect(server) as sock:
        for _ in range(2):
            got = answer(sock, b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n" + OFFER + b"\r\n")
            assert got.startswith(b"HTTP/1.1 200"), got


def test_many_small_chunks_are_a_body_and_endless_trailers_are_not(server: Running) -> None:
    head = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n" % TEXT.encode()
    body = b" " * 40_000 + BODY
    small = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with connect(server) as sock:
        assert answer(sock, head, small, b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
    with connect(server) as sock:
        try:
            got = answer(sock, head, b"2\r\n{}\r\n0\r\nX: ", *[b"a" * 10_000] * 20)
        except ConnectionError:
            got = b""
        assert got == b"" or got.startswith(b"HTTP/1.1 400")


def test_two_lengths_or_none_that_can_be_trusted_are_refused(server: Running) -> None:
    for framing in (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: +5",
        b"Transfer-Encoding: gzip",
    ):
        with connect(server) as sock:
            got = answer(sock, b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\n%b\r\n\r\nabcde" % (TEXT.encode(), framing))
            assert got.startswith(b"HTTP/1.1 4"), (framing, got)
