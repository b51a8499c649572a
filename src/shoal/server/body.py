"""Reading a JSON body with bounds on its size and on the time it may take."""

from __future__ import annotations

from typing import Any

import anyio
import orjson
from starlette.requests import ClientDisconnect, Request

from shoal.server.errors import ApiError

MAX_BODY_BYTES = 32 << 20
BODY_SECONDS = 60.0


async def read_json(request: Request) -> Any:
    """The decoded body. ApiError 400 (not JSON), 408 (too slow), 413 (over 32 MiB) or 415 (compressed)."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not accepted", code="unsupported_encoding")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal():
        raise ApiError(400, "Content-Length is not a number", code="invalid_header")
    if int(length) > 2 * MAX_BODY_BYTES:
        raise _too_large()
    try:
        with anyio.fail_after(BODY_SECONDS):
            raw = await _read(request)
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {BODY_SECONDS:g} s to arrive") from None
    except ClientDisconnect:
        raise ApiError(400, "the body ended early", code="invalid_json") from None
    try:
        # orjson refuses NaN, lone surrogates and invalid UTF-8, and bounds the nesting.
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    note = request.scope["note"]
    if note["wants_body"]:
        note["body"] = body
    return body


async def _read(request: Request) -> bytes:
    # A body a little too large is read and dropped: a client that is cut off while it sends may miss the answer.
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > 2 * MAX_BODY_BYTES:
            break
        if size > MAX_BODY_BYTES:
            pieces.clear()
        else:
            pieces.append(piece)
    if size > MAX_BODY_BYTES:
        raise _too_large()
    return b"".join(pieces)


def _too_large() -> ApiError:
    return ApiError(413, f"the body may hold at most {MAX_BODY_BYTES >> 20} MiB", headers={"connection": "close"})
