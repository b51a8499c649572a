"""POST /v1/completions: text in, text on; also the scoring of given text (`echo` with `logprobs`)."""

from __future__ import annotations

import codecs
import itertools
import math
from collections.abc import Generator, Iterable
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine import LLM, Chunk, Stats, TokenLogprob
from shoal.engine.sampler import likeliest, log_softmax
from shoal.errors import RequestError
from shoal.server.body import read_json
from shoal.server.protocol import CompletionRequest, parse_request
from shoal.server.service import Piece, run_all, service_of, shown_logprob, token_text, usage, whole_answer
from shoal.server.sse import EventStream

# Scoring a prompt holds float32 scores of every token against the whole vocabulary at once.
MAX_SCORE_BYTES = 2 << 30


async def completions(request: Request) -> Response:
    body = parse_request(CompletionRequest, await read_json(request))
    service = service_of(request)
    llm = service.engine_for(body.model)
    streams = await anyio.to_thread.run_sync(_prepare, llm, body)
    results = service.worker.submit(run_all(streams))
    reply = _Reply(service.head("cmpl", "text_completion"), body)
    if body.stream:
        return EventStream(results, reply.events)
    return await whole_answer(request, results, reply.add, reply.body)


def _prepare(llm: LLM, body: CompletionRequest) -> list[Generator[Chunk, None, None]]:
    """A generation for each choice of each prompt, none started. Runs in a thread and finds every fault."""
    streams = []
    for prompt in body.prompts:
        ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if any(token >= llm.tokenizer.vocab_size for token in ids):  # rows that only pad the embedding table
            raise RequestError("prompt", f"token ids must lie below {llm.tokenizer.vocab_size}")
        if body.echo and body.logprobs is not None and 4 * len(ids) * llm.config.vocab_size > MAX_SCORE_BYTES:
            raise RequestError("prompt", f"{len(ids)} tokens are too many to score at once", code="prompt_too_long")
        for choice in range(body.num_choices):
            # One token stands in for none, which the engine does not take; its stream is then never started.
            limit = 1 if body.max_tokens == 0 else body.max_tokens
            params = body.sampling(llm.generation, max_tokens=limit, logprobs=body.logprobs, choice=choice)
            stream = llm.stream(ids, params)
            if body.echo:
                text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(ids)
                stream = _after_echo(_echo(llm, ids, text, body.logprobs), stream, len(ids), body.max_tokens == 0)
            streams.append(stream)
    return streams


def _after_echo(
    echo: Iterable[Chunk], stream: Generator[Chunk, None, None], num_prompt: int, echo_only: bool
) -> Generator[Chunk, None, None]:
    yield from echo
    if echo_only:
        stream.close()
        stats = Stats(prompt_tokens=num_prompt, completion_tokens=0, prompt_seconds=0.0, decode_seconds=0.0)
        yield Chunk(finish_reason="length", stats=stats)
    else:
        yield from stream


def _echo(llm: LLM, ids: list[int], text: str, logprobs: int | None) -> Generator[Chunk, None, None]:
    """The prompt as a chunk; runs on the engine's thread. Nothing predicts the first token: its logprob is NaN."""
    entries: list[TokenLogprob] = []
    if logprobs is not None:
        to_bytes = llm.tokenizer.token_bytes
        entries.append(TokenLogprob(token_id=ids[0], text_bytes=to_bytes(ids[0]), logprob=math.nan))
        for token, logits_V in zip(ids[1:], llm.logits(ids), strict=False):
            logprobs_V = log_softmax(logits_V[: llm.tokenizer.vocab_size])
            top = tuple((i, to_bytes(i), float(logprobs_V[i])) for i in likeliest(logprobs_V, logprobs))
            entries.append(
                TokenLogprob(token_id=token, text_bytes=to_bytes(token), logprob=float(logprobs_V[token]), top=top)
            )
    yield Chunk(text=text, logprobs=tuple(entries))


class _Choice:
    """One text as it grows."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.stats: Stats | None = None
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, chunk: Chunk) -> dict[str, Any] | None:
        """Take a chunk in; the log-probabilities that it brings."""
        self.text.append(chunk.text)
        if chunk.finish_reason is not None:
            self.finish_reason, self.stats = chunk.finish_reason, chunk.stats
        if not chunk.logprobs:
            return None
        columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}  # type: dict[str, list[Any]]
        for entry in chunk.logprobs:
            columns["tokens"].append(token_text(entry.text_bytes))
            columns["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(entry.text_bytes))
            known = not math.isnan(entry.logprob)
            columns["token_logprobs"].append(shown_logprob(entry.logprob) if known else None)
            columns["top_logprobs"].append(_top(entry) if known else None)
        self.logprobs.append(columns)
        return columns

    def all_logprobs(self) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            name: list(itertools.chain.from_iterable(part[name] for part in self.logprobs)) for name in self.logprobs[0]
        }


class _Reply:
    """The answer to one request: events for a stream, one body otherwise."""

    def __init__(self, head: dict[str, Any], request: CompletionRequest) -> None:
        self._head = head
        self._request = request
        self._num_choices = len(request.prompts) * request.num_choices
        self._choices: dict[int, _Choice] = {}

    def add(self, piece: Piece) -> dict[str, Any] | None:
        index, chunk = piece
        return self._choices.setdefault(index, _Choice()).add(chunk)

    def body(self) -> dict[str, Any]:
        choices = [
            _choice(index, "".join(choice.text), choice.all_logprobs(), choice.finish_reason)
            for index, choice in sorted(self._choices.items())
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self, piece: Piece) -> list[dict[str, Any]]:
        index, chunk = piece
        logprobs = self.add(piece)
        out = []
        if chunk.text or logprobs or chunk.finish_reason:
            event = {**self._head, "choices": [_choice(index, chunk.text, logprobs, chunk.finish_reason)]}
            out.append({**event, "usage": None} if self._request.include_usage else event)
        if chunk.finish_reason and self._request.include_usage and index == self._num_choices - 1:
            out.append({**self._head, "choices": [], "usage": self._usage()})
        return out

    def _usage(self) -> dict[str, int]:
        stats = [choice.stats for _, choice in sorted(self._choices.items()) if choice.stats is not None]
        return usage(stats, choices_per_prompt=self._request.num_choices)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _top(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the chosen one even where it is not among them."""
    top = {token_text(raw): shown_logprob(logprob) for _, raw, logprob in entry.top}
    top.setdefault(token_text(entry.text_bytes), shown_logprob(entry.logprob))
    return top
