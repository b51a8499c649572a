"""Who may ask: same-origin pages, callers of a loopback server by its own names, and holders of the key.

A page on another site can make a browser send requests here (cross-origin), or let its own name resolve to 127.0.0.1
(DNS rebinding). Both carry a header that gives them away. Programs that are not browsers send no Origin.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.server.errors import ApiError
from shoal.server.page.routes import OPEN_PATHS

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """ASGI middleware.

    Args:
        hosts: the names that a Host header may carry; None allows any (a server for a network).
        api_key: what every request but `/health` and the page's files must carry as `Authorization: Bearer …`; None
            asks for nothing.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = LOOPBACK, api_key: str | None = None) -> None:
        self._app = app
        self._hosts = hosts
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope["path"], Headers(scope=scope))
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            return ApiError(403, "this server answers to its loopback names only", code="foreign_host")
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            return ApiError(403, "requests from pages of another origin are refused", code="cross_origin")
        if self._api_key is not None and path != "/health" and path not in OPEN_PATHS:
            kind, _, key = headers.get("authorization", "").partition(" ")
            # In constant time, and over bytes: headers come decoded as Latin-1, whatever they hold.
            if kind.lower() != "bearer" or not hmac.compare_digest(key.encode("latin-1"), self._api_key.encode()):
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
