"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from shoal.engine import LLM, Chunk, Generation, Stats, TokenLogprob
from shoal.errors import RequestError
from shoal.formats.reasoning import CLOSE, ReasoningSplitter
from shoal.formats.tools import ToolParser, ToolSyntax, describe_tools, takes_tools, tool_syntax
from shoal.server.body import read_json
from shoal.server.constraints import format_constraint, tool_constraint
from shoal.server.protocol import parse_request
from shoal.server.protocol_chat import ChatRequest, Message, Tool
from shoal.server.routing import with_routing
from shoal.server.service import (
    Service,
    checked_grammar,
    in_thread,
    naming,
    note_of,
    service_of,
    shown_logprob,
    timings,
    token_text,
    usage,
    whole_answer,
)
from shoal.server.sse import EventStream
from shoal.server.worker import Piece

# Switches that chat templates publish; anything else a client sends could override the template's own variables.
TEMPLATE_SWITCHES = ("thinking", "enable_thinking")
FIELDS = {"reasoning": "reasoning_content", "content": "content"}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What `_prepare` found out: a generation for each choice, none started; the client's names of the engine's
    arguments; whether they begin in the middle of reasoning; how the model writes calls, if it may."""

    generations: list[Generation]
    fields: dict[str, str]
    in_reasoning: bool
    syntax: ToolSyntax | None


async def chat_completions(request: Request) -> Response:
    body = parse_request(ChatRequest, await read_json(request))
    service = service_of(request)
    llm = service.engine_for(body.model)
    plan = await in_thread(service, body, lambda: _prepare(service, llm, body))
    results = service.worker.submit(plan.generations, seconds=body.timeout, whole=not body.stream, fields=plan.fields)
    reply = _Reply(request, body, plan)
    if body.stream:
        return EventStream(results, with_routing(reply.events, llm.tokenizer))
    return await whole_answer(request, results, reply.add, reply.body)


def _prepare(service: Service, llm: LLM, body: ChatRequest) -> _Plan:
    """Runs in a thread, as a long prompt would stall every other client. Everything that can be wrong with the request
    shows here, before a queue or a stream is entered."""
    tools = body.offered_tools
    ids = chat_ids(llm, body.messages, tools, _options(body))
    assert llm.chat_format is not None  # chat_ids has seen to that
    syntax = tool_syntax(llm.chat_format.template_source) if tools else None
    in_reasoning = llm.chat_format.starts_in_reasoning(llm.tokenizer, ids)
    constraint = format_constraint(body)
    if syntax is not None:
        calls = tool_constraint(body, syntax, llm.tokenizer)
        if calls is not None and constraint is not None:
            raise RequestError("tool_choice", f"does not go with {constraint[0].partition('.')[0]}")
        constraint = calls or constraint
    grammar = checked_grammar(service, constraint)
    after = llm.tokenizer.token_id(CLOSE) if in_reasoning and grammar is not None else None
    generations = []
    fields = {"prompt": "messages", **({"grammar": constraint[0]} if constraint else {})}
    with naming(fields):
        for choice in range(body.num_choices):
            params = body.sampling(
                llm.generation, max_tokens=body.token_limit, logprobs=body.num_logprobs, choice=choice,
                grammar=grammar, grammar_after=after,
            )  # fmt: skip
            generations.append(llm.prepare(ids, params, adapter=service.adapter_of(body.model), continuing=False))
    return _Plan(generations=generations, fields=fields, in_reasoning=in_reasoning, syntax=syntax)


def chat_ids(llm: LLM, messages: list[Message], tools: list[Tool], options: dict[str, bool]) -> list[int]:
    """Token ids of a conversation; tools are described in words where the model's template has no place for them."""
    plain = [_plain(message) for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    if llm.chat_format is not None and not takes_tools(llm.chat_format.template_source):
        if described or any(message.tool_calls or message.role == "tool" for message in messages):
            plain = describe_tools(plain, described)
        described = []
    return llm.encode_chat(plain, tools=described or None, options=options)


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

    def __init__(self, plan: _Plan) -> None:
        self.splitter = ReasoningSplitter(plan.in_reasoning)
        self.parser = ToolParser(plan.syntax) if plan.syntax is not None else None
        self.parts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.stats: Stats | None = None
        self.reasoning_tokens = 0

    def add(self, chunk: Chunk) -> dict[str, Any]:
        """Take a chunk in; the delta that it makes, which may be empty."""
        pieces = self.splitter.push(chunk.text)
        last = chunk.finish_reason is not None
        if last:
            pieces += self.splitter.flush()
        self.reasoning_tokens += self.splitter.in_reasoning * len(chunk.token_ids)
        delta: dict[str, Any] = {}
        for part, text in pieces:
            if part == "content" and self.parser is not None:
                self._add_parsed(self.parser.push(text), delta)
            else:
                self._add_text(part, text, delta)
        if last:
            if self.parser is not None:
                self._add_parsed(self.parser.flush(), delta)
            self.finish_reason, self.stats = chunk.finish_reason, chunk.stats
            if self.calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        self.logprobs.extend(_logprob(entry) for entry in chunk.logprobs)
        return delta

    def _add_text(self, part: str, text: str, delta: dict[str, Any]) -> None:
        self.parts[part].append(text)
        field = FIELDS[part]
        delta[field] = delta.get(field, "") + text

    def _add_parsed(self, pieces: list[tuple[str, int, str]], delta: dict[str, Any]) -> None:
        for kind, index, text in pieces:
            if kind == "text":
                self._add_text("content", text, delta)
                continue
            news: dict[int, dict[str, Any]] = {call["index"]: call for call in delta.setdefault("tool_calls", [])}
            if kind == "name":
                call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                self.calls.append({**call, "function": {"name": text, "arguments": ""}})
                delta["tool_calls"].append({"index": index, **call, "function": {"name": text, "arguments": ""}})
                continue
            self.calls[index]["function"]["arguments"] += text
            if index in news:
                news[index]["function"]["arguments"] += text
            else:
                delta["tool_calls"].append({"index": index, "function": {"arguments": text}})


class _Reply:
    """The answer to one request: events for a stream, one body otherwise."""

    def __init__(self, http: Request, request: ChatRequest, plan: _Plan) -> None:
        self._service = service = service_of(http)
        self._note: dict[str, Any] = http.scope["note"]
        self._head = service.head(
            "chatcmpl", "chat.completion.chunk" if request.stream else "chat.completion", request.model
        )
        self._plan = plan
        self._request = request
        self._choices: dict[int, _Choice] = {}

    def add(self, piece: Piece) -> dict[str, Any]:
        index, chunk = piece
        if index not in self._choices:
            self._choices[index] = _Choice(self._plan)
        return self._choices[index].add(chunk)

    def body(self) -> dict[str, Any]:
        choices = []
        for index, choice in sorted(self._choices.items()):
            content, reasoning = ("".join(choice.parts[part]) for part in ("content", "reasoning"))
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            if reasoning:
                message["reasoning_content"] = reasoning
            if choice.calls:
                message |= {"content": content or None, "tool_calls": choice.calls}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                }
            )
        return {**self._head, "choices": choices, **self._counts()}

    def events(self, piece: Piece) -> list[dict[str, Any]]:
        index, chunk = piece
        out = []
        if index not in self._choices:
            out.append(self._event(index, {"role": "assistant", "content": ""}))
        delta = self.add(piece)
        if delta or chunk.logprobs:
            logprobs = self._logprobs([_logprob(entry) for entry in chunk.logprobs])
            out.append(self._event(index, delta, logprobs=logprobs))
        if chunk.finish_reason is not None:
            out.append(self._event(index, {}, finish_reason=self._choices[index].finish_reason))
            if self._all_finished():
                counts = self._counts()
                out[-1]["timings"] = counts["timings"]
                if self._request.include_usage:
                    out.append({**self._head, "choices": [], **counts})
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

    def _counts(self) -> dict[str, Any]:
        choices = [choice for _, choice in sorted(self._choices.items())]
        stats = [choice.stats for choice in choices if choice.stats is not None]
        counted = usage(
            self._service, stats, choices_per_prompt=self._request.num_choices,
            reasoning=sum(choice.reasoning_tokens for choice in choices),
        )  # fmt: skip
        self._note.update(note_of(counted))
        return {"usage": counted, "timings": timings(stats)}


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    def one(raw: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token_text(raw), "logprob": shown_logprob(logprob), "bytes": list(raw)}

    top = [one(raw, logprob) for _, raw, logprob in entry.top]
    return {**one(entry.text_bytes, entry.logprob), "top_logprobs": top}
