"""Who may ask: same-origin pages, callers of a loopback server by its own names, and holders of the key.

A page on another site can make a browser send requests here (cross-origin), or let its own name resolve to 127.0.0.1
(DNS rebinding). Both carry a header that gives them away. Programs that are not browsers send no Origin.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.server.errors import ApiError, handle_error
from shoal.server.keys import Keys
from shoal.server.page.routes import OPEN_PATHS

MAX_FIELDS = 128
MAX_FIELD_BYTES = 64 << 10
ADMIN_PATHS = frozenset({"/metrics"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """ASGI middleware.

    Args:
        hosts: the names that a Host header may carry; None allows any (a server for a network).
        keys: one of them must come with every request but `/health` and the page's files, as `Authorization: Bearer …`;
            none ask for nothing.
        admin_keys: what `/metrics` asks for in their place, if there are any.
        origins: of pages elsewhere that may ask too (`CORSMiddleware` tells their browsers).
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: frozenset[str] | None = LOOPBACK,
        keys: Keys | None = None,
        admin_keys: Keys | None = None,
        origins: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._keys = keys
        self._admin_keys = admin_keys
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            fields = scope["headers"]
            if len(fields) > MAX_FIELDS or sum(len(name) + len(value) for name, value in fields) > MAX_FIELD_BYTES:
                refusal: ApiError | None = ApiError(431, "the request's head is too large", code="headers_too_large")
            else:
                refusal = self._refusal(scope["path"], Headers(scope=scope))
            if refusal is not None:
                response = await handle_error(Request(scope), refusal)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            return ApiError(403, "this server answers to its loopback names only", code="foreign_host")
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower() and not self._origins & {origin, "*"}:
            return ApiError(403, "requests from pages of another origin are refused", code="cross_origin")
        if path == "/health" or path in OPEN_PATHS:
            return None
        keys = self._admin_keys if path in ADMIN_PATHS and self._admin_keys else self._keys
        if keys:
            kind, _, key = headers.get("authorization", "").partition(" ")
            # Headers come decoded as Latin-1, whatever they hold.
            if kind.lower() != "bearer" or not keys.know(key.encode("latin-1")):
                return ApiError(
                    401, "a valid API key is needed", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
                )
        return None


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
