"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine import LLM, Chunk, Generation, Stats, TokenLogprob
from shoal.errors import RequestError
from shoal.formats.reasoning import ReasoningSplitter
from shoal.server.body import read_json
from shoal.server.protocol import ChatRequest, Message, parse_request
from shoal.server.routing import with_routing
from shoal.server.service import service_of, shown_logprob, token_text, usage, whole_answer
from shoal.server.sse import EventStream
from shoal.server.worker import Piece

# Switches that chat templates publish; anything else a client sends could override the template's own variables.
TEMPLATE_SWITCHES = ("thinking", "enable_thinking")
FIELDS = {"reasoning": "reasoning_content", "content": "content"}


async def chat_completions(request: Request) -> Response:
    body = parse_request(ChatRequest, await read_json(request))
    service = service_of(request)
    llm = service.engine_for(body.model)
    generations, in_reasoning = await anyio.to_thread.run_sync(_prepare, llm, body)
    results = service.worker.submit(generations)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    reply = _Reply(service.head("chatcmpl", kind), body, in_reasoning)
    if body.stream:
        return EventStream(results, with_routing(reply.events, llm.tokenizer))
    return await whole_answer(request, results, reply.add, reply.body)


def _prepare(llm: LLM, body: ChatRequest) -> tuple[list[Generation], bool]:
    """A generation for each choice, none started, and whether they begin in the middle of reasoning.

    Runs in a thread, as a long prompt would stall every other client. Everything that can be wrong with the request
    shows here, before a queue or a stream is entered.
    """
    messages = [_plain(message) for message in body.messages]
    ids = llm.encode_chat(messages, options=_options(body))
    generations = []
    for choice in range(body.num_choices):
        params = body.sampling(llm.generation, max_tokens=body.token_limit, logprobs=body.num_logprobs, choice=choice)
        try:
            generations.append(llm.prepare(ids, params))
        except RequestError as error:
            if error.param != "prompt":
                raise
            raise RequestError("messages", str(error).removeprefix("prompt: "), code=error.code) from None
    assert llm.chat_format is not None  # encode_chat has seen to that
    return generations, llm.chat_format.starts_in_reasoning(llm.tokenizer, ids)


def _plain(message: Message) -> dict[str, Any]:
    out = message.model_dump(exclude_none=True)
    if out["role"] == "developer":  # OpenAI's newer name; templates know the older one
        out["role"] = "system"
    out.setdefault("content", "")
    return out


def _options(body: ChatRequest) -> dict[str, bool]:
    options = {name: value for name, value in (body.chat_template_kwargs or {}).items() if name in TEMPLATE_SWITCHES}
    for name, value in options.items():
        if not isinstance(value, bool):
            raise RequestError(f"chat_template_kwargs.{name}", "must be true or false")
    return options


class _Choice:
    """One answer as it grows."""

    def __init__(self, in_reasoning: bool) -> None:
        self.splitter = ReasoningSplitter(in_reasoning)
        self.parts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.stats: Stats | None = None

    def add(self, chunk: Chunk) -> dict[str, Any]:
        """Take a chunk in; the delta that it makes, which may be empty."""
        pieces = self.splitter.push(chunk.text)
        if chunk.finish_reason is not None:
            pieces += self.splitter.flush()
            self.finish_reason, self.stats = chunk.finish_reason, chunk.stats
        self.logprobs.extend(_logprob(entry) for entry in chunk.logprobs)
        delta: dict[str, Any] = {}
        for part, text in pieces:
            self.parts[part].append(text)
            field = FIELDS[part]
            delta[field] = delta.get(field, "") + text
        return delta


class _Reply:
    """The answer to one request: events for a stream, one body otherwise."""

    def __init__(self, head: dict[str, Any], request: ChatRequest, in_reasoning: bool) -> None:
        self._head = head
        self._in_reasoning = in_reasoning
        self._request = request
        self._choices: dict[int, _Choice] = {}

    def add(self, piece: Piece) -> dict[str, Any]:
        index, chunk = piece
        return self._choices.setdefault(index, _Choice(self._in_reasoning)).add(chunk)

    def body(self) -> dict[str, Any]:
        choices = []
        for index, choice in sorted(self._choices.items()):
            content, reasoning = ("".join(choice.parts[part]) for part in ("content", "reasoning"))
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            if reasoning:
                message["reasoning_content"] = reasoning
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                }
            )
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self, piece: Piece) -> list[dict[str, Any]]:
        index, chunk = piece
        out = []
        if index not in self._choices:
            out.append(self._event(index, {"role": "assistant", "content": ""}))
        delta = self.add(piece)
        logprobs = self._logprobs([_logprob(entry) for entry in chunk.logprobs])
        if delta or chunk.logprobs:
            out.append(self._event(index, delta, logprobs=logprobs))
        if chunk.finish_reason is not None:
            out.append(self._event(index, {}, finish_reason=chunk.finish_reason))
            if self._request.include_usage and self._all_finished():
                out.append({**self._head, "choices": [], "usage": self._usage()})
        return out

    def _all_finished(self) -> bool:
        finished = sum(choice.finish_reason is not None for choice in self._choices.values())
        return finished == self._request.num_choices

    def _event(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        event = {**self._head, "choices": [choice]}
        return {**event, "usage": None} if self._request.include_usage else event

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self._request.logprobs else None

    def _usage(self) -> dict[str, int]:
        stats = [choice.stats for _, choice in sorted(self._choices.items()) if choice.stats is not None]
        return usage(stats, choices_per_prompt=self._request.num_choices)


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    def one(raw: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token_text(raw), "logprob": shown_logprob(logprob), "bytes": list(raw)}

    top = [one(raw, logprob) for _, raw, logprob in entry.top]
    return {**one(entry.text_bytes, entry.logprob), "top_logprobs": top}
