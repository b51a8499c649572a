"""What the routes share: the served model's name, its engine, and the work common to chat and plain completions."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.requests import Request
from starlette.responses import Response

import shoal
from shoal.engine import LLM, Stats
from shoal.engine.grammar import in_short
from shoal.errors import RequestError
from shoal.formats.fim import fim_marks
from shoal.server.constraints import Constraint
from shoal.server.embedding_job import EmbeddingQueue
from shoal.server.errors import ApiError, json_response, named
from shoal.server.grammar_check import GrammarChecker
from shoal.server.journal import new_id
from shoal.server.protocol import SamplingRequest
from shoal.server.sse import disconnected
from shoal.server.worker import ClientGoneError, EngineWorker, Piece, Results

T = TypeVar("T")
GRAMMAR_THREADS = 2
WATCH_AFTER = 0.25  # seconds: a task that waits for the client to leave costs more than a short answer's other HTTP


@dataclass(frozen=True, kw_only=True)
class Service:
    """One served model and what serves it.

    `name` is what `/v1/models` lists, and what `model` in a request must say, if anything."""

    name: str
    worker: EngineWorker
    adapters: tuple[str, ...] = ()  # of the engine, that a request may ask for instead of the model
    code: str | None = None  # a model in `LLM.beside` that fills gaps for those who name no model
    price_per_hour: float | None = None  # of the machine, in US dollars
    embeddings: EmbeddingQueue = field(default_factory=EmbeddingQueue)
    grammars: GrammarChecker = field(default_factory=GrammarChecker)
    # Trying a grammar may take a second: requests with one have threads of their own, or they would hold all others up.
    grammar_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(GRAMMAR_THREADS))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.adapters, *((self.code,) if self.code else ()))

    def gap_filler(self, model: str | None) -> str | None:
        """The model that fills a gap: the one that was asked for, or else one that can."""
        if model is None and self.code and fim_marks(self.worker.engine().tokenizer) is None:
            return self.code
        return model

    def engine_for(self, model: str | None) -> LLM:
        self.check_model(model)
        llm = self.worker.engine()
        return llm.beside[self.code] if model is not None and model == self.code else llm

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request's `model` asks for, if it is one."""
        return model if model in self.adapters else None

    def check_model(self, model: str | None) -> None:
        if model is not None and model not in self.names:
            shown = model if len(model) <= 100 else model[:100] + "…"
            served = " and ".join(map(repr, self.names))
            verb = "are" if len(self.names) > 1 else "is"
            raise ApiError(
                404, f"model {shown!r} is not served here; {served} {verb}", param="model", code="model_not_found"
            )

    def head(self, prefix: str, kind: str, model: str | None = None) -> dict[str, Any]:
        """The fields that open every answer and every streamed event."""
        name = model or self.name
        # Changes when the model or the version of Shoal does, so that a seed's promise can be checked.
        fingerprint = hashlib.sha256(f"{shoal.__version__} {name}".encode()).hexdigest()[:12]
        return {
            "id": f"{prefix}-{new_id()}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": f"fp_{fingerprint}",
        }


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def whole_answer(
    request: Request, results: Results, add: Callable[[Piece], object], body: Callable[[], dict[str, Any]]
) -> Response:
    """Collect every piece, then answer; a client that leaves meanwhile cancels the work, if it takes long enough for
    that to matter."""
    watch: asyncio.Task[None] | None = None

    def start_watching() -> None:
        nonlocal watch
        watch = asyncio.ensure_future(disconnected(request.receive))
        watch.add_done_callback(lambda _: results.leave())

    timer = results.loop.call_later(WATCH_AFTER, start_watching)
    try:
        async for piece in results:
            add(piece)
        return json_response(body())
    except ClientGoneError:
        results.metrics.cancelled += 1
        return Response(status_code=499)  # nobody is there to read it
    finally:
        timer.cancel()
        if watch is not None:
            watch.cancel()
        results.cancel()


async def in_thread(service: Service, body: SamplingRequest, prepare: Callable[[], T]) -> T:
    """What `prepare` returns, run in a thread. ApiError 429: too many requests wait there to have grammars tried."""
    limiter = service.grammar_threads if body.wants_form else None
    if limiter is not None and limiter.statistics().tasks_waiting > service.worker.max_queue:
        raise service.worker.busy()
    return await anyio.to_thread.run_sync(prepare, limiter=limiter)


def checked_grammar(service: Service, constraint: Constraint | None) -> str | None:
    """The grammar, once a helper process has compiled it unharmed; RequestError names the field that asks for it."""
    if constraint is None:
        return None
    field, grammar = constraint
    problem = service.grammars.problem(grammar)
    if problem is not None:
        raise RequestError(field, in_short(problem), code="invalid_grammar")
    return grammar


@contextlib.contextmanager
def naming(fields: Mapping[str, str]) -> Iterator[None]:
    """`errors.named` for what the block raises."""
    try:
        yield
    except RequestError as error:
        raise named(error, fields) from None


def usage(service: Service, stats: Sequence[Stats], *, choices_per_prompt: int, reasoning: int = 0) -> dict[str, Any]:
    """Token counts over all choices; a prompt counts once however many answers it got."""
    prompts = stats[::choices_per_prompt]
    prompt = sum(stat.prompt_tokens for stat in prompts)
    completion = sum(stat.completion_tokens for stat in stats)
    out: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(stat.cached_tokens for stat in prompts)},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    if service.price_per_hour is not None:
        seconds = sum(stat.machine_seconds for stat in stats)
        out["cost_usd"] = round(seconds * service.price_per_hour / 3600, 12)
    return out


def note_of(usage: Mapping[str, Any]) -> dict[str, Any]:
    """What the log says of an answer."""
    out = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "cost_usd") if name in usage}
    return {**out, "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]}


def timings(stats: Sequence[Stats]) -> dict[str, Any]:
    """Where the time went, in llama-server's names and three more; over all choices, of which the slowest counts."""
    read = sum(stat.prompt_tokens - stat.cached_tokens for stat in stats)
    written = sum(stat.completion_tokens for stat in stats)
    queue = max(stat.queue_seconds for stat in stats)
    prompt = max(stat.prompt_seconds - stat.queue_seconds for stat in stats)
    decode = max(stat.decode_seconds for stat in stats)
    later = written - sum(stat.completion_tokens > 0 for stat in stats)  # the first ones come with their prompts
    return {
        "cache_n": sum(stat.cached_tokens for stat in stats),
        "prompt_n": read,
        "prompt_ms": _ms(prompt),
        "prompt_per_second": round(read / prompt, 2) if prompt > 0 else 0.0,
        "predicted_n": written,
        "predicted_ms": _ms(decode),
        "predicted_per_second": round(later / decode, 2) if decode > 0 else 0.0,
        "queue_ms": _ms(queue),
        "machine_ms": _ms(sum(stat.machine_seconds for stat in stats)),
        "draft_n": sum(stat.drafted for stat in stats),
        "draft_n_accepted": sum(stat.accepted for stat in stats),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def token_text(raw: bytes) -> str:
    """A token as JSON can carry it: its text, or OpenAI's `bytes:\\x..` where it is a piece of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def shown_logprob(logprob: float) -> float:
    """JSON has no minus infinity; the OpenAI API writes -9999 for an impossible token."""
    return max(logprob, -9999.0)
