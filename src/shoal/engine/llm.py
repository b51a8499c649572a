"""`shoal.LLM`: a model opened by name, folder or GGUF file, ready to answer."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.engine.core import Core
from shoal.engine.outputs import Chunk, Completion, Stats, TokenLogprob
from shoal.engine.params import SamplingParams
from shoal.engine.sampler import Sampler
from shoal.engine.sequence import Produced
from shoal.engine.sequence import Sequence as Running
from shoal.engine.stops import StopMatcher
from shoal.errors import RequestError
from shoal.formats.checkpoint import Checkpoint, open_checkpoint

Message = Mapping[str, Any]
DEFAULT_CACHE_TOKENS = 32768


class LLM:
    """A loaded model. Safe to use from several threads at once: their requests run together, step by step.

    Args:
        model: a short name (`shoal models`), a Hugging Face folder, a GGUF file, or an opened checkpoint.
        max_context: most tokens of prompt and answer together; the model's own limit if None or larger.
        threads: CPU threads; every processor that this process may use if None.
        weights: `auto` keeps the file's own precision; `f32`, `bf16`, `q8`, `q4`, `q4m` repack the large matrices.
        activations: `int8` or `int16` where they meet quantised weights; `auto` chooses by the kind of model.
        cache: `bf16`, `int8` or `f32`, the precision of the attention cache.
        cache_tokens: tokens that the cache holds over all running requests; at least one whole context.
        speculate: most tokens guessed ahead per step by prompt lookup; output is the same with and without.

    Raises:
        UnknownModelError, FileError, ConfigError: the model cannot be opened, with the reason.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        max_context: int | None = None,
        threads: int | None = None,
        weights: str = "auto",
        cache: str = "bf16",
        activations: str = "auto",
        cache_tokens: int | None = None,
        speculate: int = 0,
    ) -> None:
        for name, value in (("max_context", max_context), ("threads", threads), ("cache_tokens", cache_tokens)):
            if value is not None and value < 1:
                raise RequestError(name, f"must be at least 1, got {value}")
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(_resolve(model))
        self.path = checkpoint.path
        self.name = (
            model
            if isinstance(model, str) and not Path(model).exists()
            else (checkpoint.path.name if checkpoint.path.is_dir() else checkpoint.path.stem)
        )
        self.config = checkpoint.config
        self.tokenizer = checkpoint.load_tokenizer()
        self.chat_format = checkpoint.load_chat()
        self.generation = checkpoint.generation
        self.speculate = speculate
        limit = self.config.max_position_embeddings if max_context is None else max_context
        self.max_context = min(limit, self.config.max_position_embeddings)
        if cache_tokens is None:
            cache_tokens = max(DEFAULT_CACHE_TOKENS, self.max_context) if max_context else DEFAULT_CACHE_TOKENS
        self.max_context = min(self.max_context, cache_tokens)
        self._eos = frozenset(self.config.eos_token_id) | frozenset(self.tokenizer.eos_token_ids)
        self._core = Core(
            checkpoint, threads=threads, weights=weights, activations=activations, cache=cache,
            cache_tokens=cache_tokens, known_ids=self.tokenizer.vocab_size,
        )  # fmt: skip

    # ---- whole answers

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Completion:
        """Continue a text or a list of token ids. Raises RequestError when the prompt is empty or too long."""
        return _collect(self.stream(prompt, params))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Completion:
        """Answer a conversation of `{"role": …, "content": …}` messages in the model's own chat format."""
        return _collect(self.chat_stream(messages, params, tools=tools, options=options))

    # ---- streams

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Generator[Chunk, None, None]:
        """As `generate`, piece by piece. Arguments are checked at once; closing the generator ends the work."""
        ids = self._prompt_ids(prompt)
        params = params or SamplingParams()
        budget = self.max_context - len(ids)
        max_tokens = budget if params.max_tokens is None else min(params.max_tokens, budget)
        running = Running(
            tokens=ids, prompt_tokens=len(ids), params=params, sampler=Sampler(params, ids, self.config.vocab_size),
            max_tokens=max_tokens, eos=self._eos, draft_length=self.speculate,
        )  # fmt: skip
        return self._run(running)

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Generator[Chunk, None, None]:
        """As `chat`, piece by piece."""
        return self.stream(self.encode_chat(messages, tools=tools, options=options), params)

    # ---- parts that callers also need by themselves

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the model's reply. Message text never becomes a control token."""
        if self.chat_format is None:
            raise RequestError("messages", f"model {self.name} has no chat format; send plain text to complete instead")
        if not messages:
            raise RequestError("messages", "must hold at least one message")
        return self.chat_format.encode(self.tokenizer, messages, tools=tools, options=options)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Float32 [T, V]: row t scores the token that follows tokens[: t + 1]."""
        ids = self._check_ids(tokens)
        if len(ids) > self.max_context:
            raise RequestError(
                "tokens", f"{len(ids)} exceed the context of {self.max_context}", code="context_length_exceeded"
            )
        return self._core.score(ids)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        self._check_ids(ids)
        if len(ids) >= self.max_context:
            raise RequestError(
                "prompt",
                f"holds {len(ids)} tokens and leaves no room in the context of {self.max_context}",
                code="context_length_exceeded",
            )
        return ids

    def _check_ids(self, tokens: Sequence[int]) -> list[int]:
        ids = list(tokens)
        if not ids:
            raise RequestError("prompt", "must hold at least one token")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                raise RequestError("prompt", f"token ids must be whole numbers, got {token!r}")
            if not 0 <= token < self.config.vocab_size:
                raise RequestError("prompt", f"token {token} is outside the vocabulary of {self.config.vocab_size}")
        return ids

    def _run(self, running: Running) -> Generator[Chunk, None, None]:
        self._core.submit(running)
        try:
            yield from self._pieces(running)
        finally:
            self._core.release(running)

    def _pieces(self, running: Running) -> Generator[Chunk, None, None]:
        decoder = self.tokenizer.stream()
        stops = StopMatcher(running.params.stop)
        produced = 0
        while not stops.stopped:
            self._core.advance(running)
            if not running.outputs:
                break
            out = running.outputs.popleft()
            produced += 1
            text = stops.push(decoder.push(out.token))
            yield Chunk(text=text, token_ids=(out.token,), logprobs=self._logprobs(running.params, out))
        tail = "" if stops.stopped else stops.push(decoder.flush())
        tail += stops.flush()
        ended = time.perf_counter()
        first_at = running.first_at or ended
        stats = Stats(
            prompt_tokens=running.prompt_tokens,
            cached_tokens=running.cached_tokens,
            completion_tokens=produced,
            prompt_seconds=first_at - running.submitted_at,
            decode_seconds=ended - first_at,
            drafted=running.drafted,
            accepted=running.accepted,
        )
        finish = "stop" if stops.stopped or running.finish is None else running.finish
        yield Chunk(text=tail, finish_reason=finish, stats=stats)

    def _logprobs(self, params: SamplingParams, out: Produced) -> tuple[TokenLogprob, ...]:
        if params.logprobs is None:
            return ()
        to_bytes = self.tokenizer.token_bytes
        top = tuple((token, to_bytes(token), logprob) for token, logprob in out.top)
        return (TokenLogprob(token_id=out.token, text_bytes=to_bytes(out.token), logprob=out.logprob, top=top),)


def _resolve(model: str | Path) -> Path:
    from shoal import hub

    return hub.resolve(model)


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _collect(chunks: Generator[Chunk, None, None]) -> Completion:
    text: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    last = Chunk()
    for last in chunks:
        text.append(last.text)
        token_ids.extend(last.token_ids)
        logprobs.extend(last.logprobs)
    assert last.finish_reason is not None
    assert last.stats is not None
    return Completion(
        text="".join(text),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason=last.finish_reason,
        stats=last.stats,
    )
