"""The application: routes, errors, life span."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import shoal
from shoal.errors import ShoalError
from shoal.server.errors import ApiError, handle_crash, handle_error, json_response
from shoal.server.guard import LOOPBACK, Guard
from shoal.server.journal import Journal
from shoal.server.keys import Keys
from shoal.server.metrics import CONTENT_TYPE
from shoal.server.openapi import document
from shoal.server.page.routes import page_routes
from shoal.server.routes_chat import chat_completions
from shoal.server.routes_completions import completions
from shoal.server.routes_embeddings import embeddings
from shoal.server.routes_tokens import detokenize, tokenize
from shoal.server.service import Service, service_of


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Who may ask, and what is written down.

    Attributes:
        hosts: names that the Host header may carry; None allows any.
        keys: what every route but /health and the page's files asks for; None asks for none.
        admin_keys: what /metrics asks for instead.
        origins: of pages elsewhere that may ask; `*` is any.
        log: `text`, `json` or `none`; `log_prompts` adds the bodies of requests.
    """

    hosts: frozenset[str] | None = LOOPBACK
    keys: Keys | None = None
    admin_keys: Keys | None = None
    origins: frozenset[str] = frozenset()
    log: str = "none"
    log_prompts: bool = False


def create_app(service: Service, policy: Policy | None = None) -> Starlette:
    """The ASGI application. The model loads on the worker's thread while the routes already answer."""
    policy = policy or Policy()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            service.worker.stop()
            service.grammars.close()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", show_model, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/version", version, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
            *page_routes(),
        ],
        middleware=_middleware(policy),
        exception_handlers={
            **dict.fromkeys((HTTPException, ApiError, ShoalError, RecursionError, MemoryError), handle_error),
            Exception: handle_crash,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _middleware(policy: Policy) -> list[Middleware]:
    """The outermost first: the log sees everything, and a browser's question whether it may ask carries no key."""
    out = [Middleware(Journal, kind=policy.log, prompts=policy.log_prompts)]
    if policy.origins:
        out.append(
            Middleware(
                CORSMiddleware, allow_origins=sorted(policy.origins), allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's client adds a dozen of its own
                expose_headers=["x-request-id", "retry-after"],
            )
        )  # fmt: skip
    guard = Middleware(
        Guard, hosts=policy.hosts, keys=policy.keys, admin_keys=policy.admin_keys, origins=policy.origins
    )
    return [*out, guard]


async def list_models(request: Request) -> Response:
    service = service_of(request)
    cards = [_model_card(service, name) for name in service.names]
    return json_response({"object": "list", "data": cards})


async def show_model(request: Request) -> Response:
    service = service_of(request)
    name = request.path_params["name"]
    service.check_model(name)
    return json_response(_model_card(service, name))


async def health(request: Request) -> Response:
    """200 once the model is loaded; 503 before that and while stopping."""
    worker = service_of(request).worker
    try:
        worker.engine()
    except ApiError as error:  # no request was refused: metrics need not count it
        return error.response()
    return json_response({"status": "ok", "running": worker.num_running, "waiting": worker.num_waiting})


async def version(request: Request) -> Response:
    return json_response({"version": shoal.__version__})


async def metrics(request: Request) -> Response:
    service = service_of(request)
    text = service.worker.metrics.text(service.worker, service.price_per_hour)
    return Response(text, media_type=CONTENT_TYPE)


async def openapi(request: Request) -> Response:
    return json_response(document())


def _model_card(service: Service, name: str) -> dict[str, object]:
    """As vLLM shows them, an adapter with its model as `parent`; but `root` is a name, not a path of this machine."""
    card: dict[str, object] = {"id": name, "object": "model", "created": service.created, "owned_by": "shoal"}
    card["root"] = name
    if name in service.adapters:
        card["parent"] = service.name
    if service.worker.state == "ready":
        card["max_model_len"] = service.engine_for(name).max_context
    return card
