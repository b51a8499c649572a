"""POST /v1/completions: text in, text on; filling in the middle (`suffix`); scoring given text (`echo`, `logprobs`)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from shoal.engine import LLM, Chunk, Generation, Stats, TokenLogprob
from shoal.errors import RequestError
from shoal.formats.fim import fim_prompt
from shoal.formats.tokenizer import StreamDecoder, Tokenizer
from shoal.server.body import read_json
from shoal.server.constraints import format_constraint
from shoal.server.protocol import parse_request
from shoal.server.protocol_text import CompletionRequest
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

SHORT = 1024  # characters or tokens


async def completions(request: Request) -> Response:
    body = parse_request(CompletionRequest, await read_json(request))
    service = service_of(request)
    model = service.gap_filler(body.model) if body.suffix else body.model
    llm = service.engine_for(model)
    if _is_short(body):
        generations, echoes, fields = _prepare(service, llm, body)
    else:
        generations, echoes, fields = await in_thread(service, body, lambda: _prepare(service, llm, body))
    results = service.worker.submit(generations, seconds=body.timeout, whole=not body.stream, fields=fields)
    reply = _Reply(request, body, model, echoes, llm.tokenizer)
    if body.stream:
        return EventStream(results, with_routing(reply.events, llm.tokenizer))
    return await whole_answer(request, results, reply.add, reply.body)


def _is_short(body: CompletionRequest) -> bool:
    """Whether checking it takes a fraction of a millisecond: going to another thread and back would take longer."""
    size = sum(map(len, body.prompts)) + len(body.suffix or "")
    few = len(body.prompts) * body.num_choices <= 8
    return size <= SHORT and few and not body.wants_form


def _prepare(service: Service, llm: LLM, body: CompletionRequest) -> tuple[list[Generation], list[str], dict[str, str]]:
    """A generation for each choice of each prompt, none started; the text that opens each answer (the prompt, if it is
    to be echoed); the client's names of the engine's arguments. Finds every fault."""
    constraint = format_constraint(body)
    grammar = checked_grammar(service, constraint)
    fields = {"grammar": constraint[0]} if constraint else {}
    generations, echoes = [], []
    for prompt in body.prompts:
        ids = _prompt_ids(llm, prompt, body.suffix)
        echo = "" if not body.echo else prompt if isinstance(prompt, str) else llm.tokenizer.decode(ids)
        score = bool(body.echo) and body.logprobs is not None
        for choice in range(body.num_choices):
            params = body.sampling(
                llm.generation, max_tokens=body.max_tokens or None, logprobs=body.logprobs, choice=choice,
                grammar=grammar,
            )  # fmt: skip
            with naming(fields):
                generations.append(
                    llm.prepare(
                        ids, params, score=score, generate=body.max_tokens != 0, adapter=service.adapter_of(body.model)
                    )
                )
            echoes.append(echo)
    return generations, echoes, fields


def _prompt_ids(llm: LLM, prompt: str | list[int], suffix: str | None) -> list[int]:
    tokenizer = llm.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_bos=False if suffix else None)
    else:
        ids = prompt
        if not all(0 <= token < tokenizer.vocab_size for token in ids):  # beyond are rows that only pad the table
            raise RequestError("prompt", f"token ids must lie from 0 to {tokenizer.vocab_size - 1}")
    if not suffix:
        return ids
    filled = fim_prompt(tokenizer, ids, tokenizer.encode(suffix, add_bos=False))
    if filled is None:
        raise RequestError("suffix", "this model was not made to fill in the middle", code="unsupported_parameter")
    return filled


class _Choice:
    """One text as it grows."""

    def __init__(self, decoder: StreamDecoder) -> None:
        self.text: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.stats: Stats | None = None
        self._offset = 0
        self._decoder = decoder

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
            self._offset += len(self._decoder.push(entry.token_id))  # nothing for a token that the text leaves out
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

    def __init__(
        self, http: Request, request: CompletionRequest, model: str | None, echoes: list[str], tokenizer: Tokenizer
    ) -> None:
        self._service = service = service_of(http)
        self._note: dict[str, Any] = http.scope["note"]
        self._head = service.head("cmpl", "text_completion", model)
        self._request = request
        self._echoes = echoes
        self._tokenizer = tokenizer
        self._choices: dict[int, _Choice] = {}

    def add(self, piece: Piece) -> dict[str, Any] | None:
        index, chunk = self._with_echo(piece)
        return self._choices[index].add(chunk)

    def _with_echo(self, piece: Piece) -> Piece:
        """An answer's first chunk starts with the echoed prompt."""
        index, chunk = piece
        if index in self._choices:
            return piece
        self._choices[index] = _Choice(self._tokenizer.stream(continuing=not self._request.echo))
        return index, replace(chunk, text=self._echoes[index] + chunk.text)

    def body(self) -> dict[str, Any]:
        choices = [
            _choice(index, "".join(choice.text), choice.all_logprobs(), choice.finish_reason)
            for index, choice in sorted(self._choices.items())
        ]
        return {**self._head, "choices": choices, **self._counts()}

    def events(self, piece: Piece) -> list[dict[str, Any]]:
        index, chunk = piece = self._with_echo(piece)
        logprobs = self._choices[index].add(chunk)
        out = []
        if chunk.text or logprobs or chunk.finish_reason:
            event = {**self._head, "choices": [_choice(index, chunk.text, logprobs, chunk.finish_reason)]}
            out.append({**event, "usage": None} if self._request.include_usage else event)
        if chunk.finish_reason and self._all_finished():
            counts = self._counts()
            out[-1]["timings"] = counts["timings"]
            if self._request.include_usage:
                out.append({**self._head, "choices": [], **counts})
        return out

    def _all_finished(self) -> bool:
        return sum(choice.finish_reason is not None for choice in self._choices.values()) == len(self._echoes)

    def _counts(self) -> dict[str, Any]:
        stats = [choice.stats for _, choice in sorted(self._choices.items()) if choice.stats is not None]
        counted = usage(self._service, stats, choices_per_prompt=self._request.num_choices)
        self._note.update(note_of(counted))
        return {"usage": counted, "timings": timings(stats)}


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _top(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the chosen one even where it is not among them."""
    top = {token_text(raw): shown_logprob(logprob) for _, raw, logprob in entry.top}
    top.setdefault(token_text(entry.text_bytes), shown_logprob(entry.logprob))
    return top
