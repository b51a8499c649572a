"""What the routes share: the served model's name, its engine, and the work common to chat and plain completions."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import shoal
from shoal.engine import LLM, Stats
from shoal.server.errors import ApiError, json_response
from shoal.server.sse import unless_disconnected
from shoal.server.worker import EngineWorker, Piece, Results


@dataclass(frozen=True, kw_only=True)
class Service:
    """One served model. `name` is what `/v1/models` lists, and what `model` in a request must say, if anything."""

    name: str
    worker: EngineWorker
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Changes when the model or the version of Shoal does, so that a seed's promise can be checked."""
        return "fp_" + hashlib.sha256(f"{shoal.__version__} {self.name}".encode()).hexdigest()[:12]

    def engine_for(self, model: str | None) -> LLM:
        self.check_model(model)
        return self.worker.engine()

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            shown = model if len(model) <= 100 else model[:100] + "…"
            raise ApiError(
                404, f"model {shown!r} is not served here; {self.name!r} is", param="model", code="model_not_found"
            )

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """The fields that open every answer and every streamed event."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
            "system_fingerprint": self.fingerprint,
        }


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def whole_answer(
    request: Request, results: Results, add: Callable[[Piece], object], body: Callable[[], dict[str, Any]]
) -> Response:
    """Collect every piece, then answer; a client that leaves meanwhile cancels the work."""

    async def collect() -> bool:
        async for piece in results:
            add(piece)
        return True

    try:
        if await unless_disconnected(request.receive, collect()):
            return json_response(body())
        return Response(status_code=499)  # nobody is there to read it
    finally:
        results.cancel()


def usage(stats: Sequence[Stats], *, choices_per_prompt: int) -> dict[str, int]:
    """Token counts over all choices; a prompt counts once however many answers it got."""
    prompt = sum(stat.prompt_tokens for stat in stats[::choices_per_prompt])
    completion = sum(stat.completion_tokens for stat in stats)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def token_text(raw: bytes) -> str:
    """A token as JSON can carry it: its text, or OpenAI's `bytes:\\x..` where it is a piece of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def shown_logprob(logprob: float) -> float:
    """JSON has no minus infinity; the OpenAI API writes -9999 for an impossible token."""
    return max(logprob, -9999.0)
