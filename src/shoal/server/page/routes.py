"""Serving the page's files, and the numbers that it shows.

The files are read once. Nothing in a path ever reaches the file system: each file has a route of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.server.errors import json_response
from shoal.server.routing import facts
from shoal.server.service import service_of

FOLDER = "/page/"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Own scripts and styles only, no inline ones, no connection but to this server; and with trusted types the browser
# refuses to turn any string into markup, so that no text of a model can become part of the page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, kw_only=True)
class _File:
    content: bytes
    media_type: str
    tag: str


def _read() -> dict[str, _File]:
    """By path of the URL."""
    out = {}
    for entry in resources.files("shoal.server.page").iterdir():
        kind = entry.name.rpartition(".")[2]
        if kind in TYPES:
            content = entry.read_bytes()
            path = "/" if entry.name == "index.html" else FOLDER + entry.name
            tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
            out[path] = _File(content=content, media_type=TYPES[kind], tag=tag)
    return out


FILES = _read()
OPEN_PATHS = frozenset(FILES)  # need no key: they hold nothing but the program


def page_routes() -> list[Route]:
    files = [Route(path, show_file, methods=["GET"]) for path in sorted(FILES)]
    return [*files, Route("/v1/shoal", show_facts, methods=["GET"])]


async def show_file(request: Request) -> Response:
    file = FILES[request.url.path]
    headers = {**HEADERS, "etag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


async def show_facts(request: Request) -> Response:
    """GET /v1/shoal: the model's experts and cache, in numbers."""
    service = service_of(request)
    llm = service.worker.engine()
    filler = service.gap_filler(None)
    code = None if filler is None else facts(llm.beside[filler], filler)
    return json_response({**facts(llm, service.name), "code": code})
