"""A server on a free loopback port over a small scripted engine, so that HTTP behaviour is tested without a model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from numpy.typing import NDArray

from shoal.engine import Chunk, SamplingParams, Stats, TokenLogprob
from shoal.errors import RequestError
from shoal.formats.checkpoint import GenerationDefaults
from shoal.server.app import create_app
from shoal.server.run import bind
from shoal.server.service import Service
from shoal.server.worker import EngineWorker


class ByteTokenizer:
    """One token a byte."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


class FakeConfig:
    vocab_size = 260  # a few rows of padding, as real models have


class FakeChatFormat:
    def starts_in_reasoning(self, tokenizer: ByteTokenizer, ids: Sequence[int]) -> bool:
        return bytes(ids).endswith(b"<think>")


class FakeLLM:
    """Answers `reply`, a byte at a time. `step` runs before every token; what it raises, the engine raises."""

    name = "fake"
    config = FakeConfig()
    tokenizer = ByteTokenizer()
    generation = GenerationDefaults()
    chat_format = FakeChatFormat()
    max_context = 100

    def __init__(self) -> None:
        self.reply = "Hello, wörld"
        self.step: Callable[[int], None] = lambda produced: None
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.messages: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.open_streams = 0
        self.finished = 0

    def encode_chat(self, messages: Any, *, tools: Any = None, options: Any = None) -> list[int]:
        self.messages, self.options = list(messages), dict(options or {})
        return self.tokenizer.encode("".join(message["content"] for message in messages))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Certain that the next byte is the current one plus one; every other byte has logit 0."""
        out = np.zeros((len(ids), self.config.vocab_size), np.float32)
        out[np.arange(len(ids)), (np.asarray(ids) + 1) % 256] = 20.0
        out[:, 256:] = 100.0
        return out

    def stream(self, ids: Sequence[int], params: SamplingParams) -> Generator[Chunk, None, None]:
        if len(ids) >= self.max_context:
            raise RequestError("prompt", f"holds {len(ids)} tokens, 100 fit", code="context_length_exceeded")
        self.asked.append((list(ids), params))
        return self._run(len(ids), params)

    def _run(self, num_prompt: int, params: SamplingParams) -> Generator[Chunk, None, None]:
        self.open_streams += 1
        try:
            raw = self.reply.encode()
            budget = self.max_context - num_prompt
            limit = min(budget, params.max_tokens or budget)
            held = b""
            for produced, byte in enumerate(raw[:limit]):
                self.step(produced)
                held += bytes([byte])
                try:
                    text, held = held.decode(), b""
                except UnicodeDecodeError:
                    text = ""
                yield Chunk(text=text, token_ids=(byte,), logprobs=self._logprobs(params, byte))
            reason = "stop" if len(raw) <= limit else "length"
            stats = Stats(
                prompt_tokens=num_prompt,
                completion_tokens=min(limit, len(raw)),
                prompt_seconds=0.1,
                decode_seconds=0.1,
            )
            yield Chunk(text=held.decode(errors="replace"), finish_reason=reason, stats=stats)
            self.finished += 1
        finally:
            self.open_streams -= 1

    def _logprobs(self, params: SamplingParams, byte: int) -> tuple[TokenLogprob, ...]:
        if params.logprobs is None:
            return ()
        top = tuple((token, bytes([token]), -0.5 - rank) for rank, token in enumerate(range(65, 65 + params.logprobs)))
        logprob = -np.inf if byte == ord("w") else -0.25
        return (TokenLogprob(token_id=byte, text_bytes=bytes([byte]), logprob=float(logprob), top=top),)


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
def running(load: Callable[[], Any], *, ready: bool = True, **options: Any) -> Iterator[Running]:
    worker = EngineWorker(load, **options)
    server = uvicorn.Server(
        uvicorn.Config(create_app(Service(name="fake", worker=worker)), log_level="error", timeout_graceful_shutdown=5)
    )
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
