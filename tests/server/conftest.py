"""A server on a free loopback port over a small scripted engine, so that HTTP behaviour is tested without a model."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from shoal.engine import Chunk, SamplingParams, Stats, TokenLogprob
from shoal.engine.core import Load
from shoal.engine.embedding import Embedding
from shoal.errors import RequestError
from shoal.formats.checkpoint import GenerationDefaults
from shoal.formats.tokenizer import StreamDecoder
from shoal.server.app import Policy, create_app
from shoal.server.run import bind, uvicorn_config
from shoal.server.service import Service
from shoal.server.worker import EngineWorker


class ByteTokenizer:
    """One token a byte."""

    vocab_size = 256

    bos_token_id = None
    add_bos = False

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        return list(text.encode())

    def encode_piece(self, text: str) -> list[int]:
        return list(text.encode())

    def token_id(self, name: str) -> int | None:
        return None

    def is_control(self, token: int) -> bool:
        return False

    def find_control(self, text: str) -> Iterator[tuple[int, int, int]]:
        return iter(())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    strips_first_space = False

    def is_special(self, token: int) -> bool:
        return token == 1

    def stream(self, *, continuing: bool = False) -> StreamDecoder:
        return StreamDecoder(self, skip_special=True, continuing=continuing)  # type: ignore[arg-type]


class FakeConfig:
    hidden_size = 4
    vocab_size = 260  # a few rows of padding, as real models have


class FakeChatFormat:
    template_source = "{{ messages }}"

    def starts_in_reasoning(self, tokenizer: ByteTokenizer, ids: Sequence[int]) -> bool:
        return bytes(ids).endswith(b"<think>")


class FakeGeneration:
    """Gives its script one chunk a step of the engine."""

    def __init__(self, llm: FakeLLM, script: Generator[Chunk, None, None]) -> None:
        self.done = False
        self._llm = llm
        self._script = script
        self._chunks: list[Chunk] = []
        self._error: Exception | None = None
        self.started_by: str | None = None

    @property
    def settled(self) -> bool:
        return True

    def start(self) -> None:
        self.started_by = threading.current_thread().name
        if not self.done:
            self._llm.running.append(self)

    def advance(self) -> None:
        try:
            self._chunks.append(next(self._script))
        except StopIteration:
            raise AssertionError("stepped after the end") from None
        except Exception as error:
            self._error = error

    def ready(self) -> list[Chunk]:
        if self.done:
            return []
        if self._error is not None and not self._chunks:
            raise self._error
        out, self._chunks = self._chunks, []
        if out and out[-1].finish_reason is not None:
            self.cancel()
        return out

    def cancel(self) -> None:
        self.done = True
        with contextlib.suppress(ValueError):
            self._llm.running.remove(self)


class FakeEmbedder:
    """A piece, then a vector that tells the text's first token."""

    def embed(self, tokens: Sequence[int], *, pooling: str, adapter: int = -1) -> Iterator[Embedding | None]:
        yield None
        vector = np.array([tokens[0], 1 if pooling == "mean" else 2, 0, 0], np.float32)
        yield Embedding(vector=vector / np.linalg.norm(vector), tokens=len(tokens))


class FakeLLM:
    """Answers `reply`, a byte at a time. `before_token` runs before each; what it raises, that generation raises."""

    name = "fake"
    config = FakeConfig()
    tokenizer = ByteTokenizer()
    generation = GenerationDefaults()
    chat_format = FakeChatFormat()
    max_context = max_embedding = 100

    def __init__(self) -> None:
        self.reply = "Hello, wörld"
        self.before_token: Callable[[int], None] = lambda produced: None
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.messages: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.running: list[FakeGeneration] = []
        self.most_running = 0
        self.finished = 0
        self.machine_seconds = 0.0
        self.expert_load = None
        self.step_error: Exception | None = None

    def adapter_number(self, name: str | None) -> int:
        return -1

    def embedder(self) -> FakeEmbedder:
        return FakeEmbedder()

    @property
    def load(self) -> Load:
        return Load(running=0, waiting=0, pages=4, pages_in_use=1)

    def encode_chat(self, messages: Any, *, tools: Any = None, options: Any = None) -> list[int]:
        self.messages, self.options = list(messages), dict(options or {})
        return self.tokenizer.encode("".join(message["content"] for message in messages))

    def prepare(
        self, ids: Sequence[int], params: SamplingParams, *, score: bool = False, generate: bool = True,
        adapter: str | None = None, continuing: bool = True,
    ) -> FakeGeneration:  # fmt: skip
        if len(ids) >= self.max_context:
            raise RequestError("prompt", f"holds {len(ids)} tokens, 100 fit", code="context_length_exceeded")
        self.asked.append((list(ids), params))
        return FakeGeneration(self, self._script(list(ids), params, score, generate))

    def step(self) -> bool:
        if self.step_error is not None:
            raise self.step_error
        running = list(self.running)
        self.most_running = max(self.most_running, len(running))
        for generation in running:
            generation.advance()
        return bool(running)

    def _script(
        self, ids: list[int], params: SamplingParams, score: bool, generate: bool
    ) -> Generator[Chunk, None, None]:
        if score:
            yield Chunk(logprobs=self._scores(ids, params.logprobs or 0))
        raw = self.reply.encode() if generate else b""
        budget = self.max_context - len(ids)
        limit = min(budget, params.max_tokens or budget)
        held = b""
        for produced, byte in enumerate(raw[:limit]):
            self.before_token(produced)
            held += bytes([byte])
            try:
                text, held = held.decode(), b""
            except UnicodeDecodeError:
                text = ""
            yield Chunk(text=text, token_ids=(byte,), logprobs=self._logprobs(params, byte))
        reason = "stop" if generate and len(raw) <= limit else "length"
        stats = Stats(
            prompt_tokens=len(ids),
            completion_tokens=min(limit, len(raw)),
            prompt_seconds=0.1,
            decode_seconds=0.1,
            machine_seconds=self.machine_seconds,
        )
        self.finished += generate
        yield Chunk(text=held.decode(errors="replace"), finish_reason=reason, stats=stats)

    def _logprobs(self, params: SamplingParams, byte: int) -> tuple[TokenLogprob, ...]:
        if params.logprobs is None:
            return ()
        top = tuple((token, bytes([token]), -0.5 - rank) for rank, token in enumerate(range(65, 65 + params.logprobs)))
        logprob = -np.inf if byte == ord("w") else -0.25
        return (TokenLogprob(token_id=byte, text_bytes=bytes([byte]), logprob=float(logprob), top=top),)

    def _scores(self, ids: list[int], count: int) -> tuple[TokenLogprob, ...]:
        """Sure by one nat a step that the next byte is the current one plus one."""
        out = [TokenLogprob(token_id=ids[0], text_bytes=bytes(ids[:1]), logprob=math.nan)]
        for before, token in itertools.pairwise(ids):
            top = tuple((before + 1 + i, bytes([before + 1 + i]), -1.0 - i) for i in range(count))
            logprob = -1.0 - abs(token - before - 1)
            out.append(TokenLogprob(token_id=token, text_bytes=bytes([token]), logprob=logprob, top=top))
        return tuple(out)


class Running:
    """A running server and the ways to reach it."""

    def __init__(self, url: str, worker: EngineWorker, llm: FakeLLM) -> None:
        self.url = url
        self.worker = worker
        self.llm = llm
        self.http = httpx.Client(base_url=url, timeout=20, trust_env=False)
        self.openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
        )


@contextlib.contextmanager
def running(
    load: Callable[[], Any],
    *,
    ready: bool = True,
    policy: Policy | None = None,
    price_per_hour: float | None = None,
    code: str | None = None,
    **options: Any,
) -> Iterator[Running]:
    worker = EngineWorker(load, **options)
    app = create_app(Service(name="fake", worker=worker, price_per_hour=price_per_hour, code=code), policy)
    server = uvicorn.Server(uvicorn_config(app, drain_seconds=5))
    sock = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    box = Running(f"http://127.0.0.1:{sock.getsockname()[1]}", worker, load() if ready else FakeLLM())
    try:
        if ready:
            wait_for(lambda: worker.state == "ready")
        yield box
    finally:
        box.http.close()
        box.openai.close()
        server.should_exit = True
        thread.join(20)
        sock.close()
    assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """One server for a whole module; its engine is reset by `server`."""
    llm = FakeLLM()
    with running(lambda: llm, max_queue=4) as box:
        yield box


@pytest.fixture
def server(shared: Running) -> Running:
    shared.llm.__init__()  # type: ignore[misc]
    return shared
