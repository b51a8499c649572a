"""`shoal.LLM`: a model opened by name, folder or GGUF file, ready to answer."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.engine.outputs import Chunk, Completion, Stats, TokenLogprob
from shoal.engine.params import SamplingParams
from shoal.engine.sampler import Sampler, likeliest, log_softmax
from shoal.engine.stops import StopMatcher
from shoal.engine.torch_backend import TorchBackend
from shoal.errors import RequestError
from shoal.formats.checkpoint import Checkpoint, open_checkpoint

Message = Mapping[str, Any]


class LLM:
    """A loaded model.

    Args:
        model: a short name (`shoal models`), a Hugging Face folder, a GGUF file, or an opened checkpoint.
        max_context: most tokens of prompt and answer together; the model's own limit if None or larger.
        threads: CPU threads; the library's choice if None.

    Raises:
        UnknownModelError, FileError, ConfigError: the model cannot be opened, with the reason.
    """

    def __init__(
        self, model: str | Path | Checkpoint, *, max_context: int | None = None, threads: int | None = None
    ) -> None:
        if max_context is not None and max_context < 1:
            raise RequestError("max_context", f"must be at least 1, got {max_context}")
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(_resolve(model))
        self.path = checkpoint.path
        self.name = model if isinstance(model, str) and not Path(model).exists() else checkpoint.path.stem
        self.config = checkpoint.config
        self.tokenizer = checkpoint.load_tokenizer()
        self.chat_format = checkpoint.load_chat()
        self.generation = checkpoint.generation
        limit = self.config.max_position_embeddings
        self.max_context = limit if max_context is None else min(max_context, limit)
        self._eos = frozenset(self.config.eos_token_id) | frozenset(self.tokenizer.eos_token_ids)
        self._backend = TorchBackend(checkpoint, threads=threads)

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
        sampler = Sampler(params, ids, self.config.vocab_size)
        return self._run(ids, params, sampler, max_tokens)

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
        return self._backend.session(len(ids)).forward(ids, every=True)

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

    def _run(
        self, ids: list[int], params: SamplingParams, sampler: Sampler, max_tokens: int
    ) -> Generator[Chunk, None, None]:
        session = self._backend.session(len(ids) + max_tokens)
        decoder = self.tokenizer.stream()
        stops = StopMatcher(params.stop)
        started = time.perf_counter()
        logits_V = session.forward(ids)[-1]
        first_at = time.perf_counter()
        produced = 0
        finish = "length"
        while True:
            logits_V = self._mask_padding(logits_V)
            token = sampler.choose(logits_V)
            if token in self._eos and not params.ignore_eos:
                finish = "stop"
                break
            produced += 1
            text = stops.push(decoder.push(token))
            yield Chunk(text=text, token_ids=(token,), logprobs=self._logprobs(params, logits_V, token))
            if stops.stopped:
                finish = "stop"
                break
            if produced == max_tokens:
                break
            logits_V = session.forward([token])[-1]
        tail = "" if stops.stopped else stops.push(decoder.flush())
        if stops.stopped:
            finish = "stop"
        tail += stops.flush()
        stats = Stats(
            prompt_tokens=len(ids),
            completion_tokens=produced,
            prompt_seconds=first_at - started,
            decode_seconds=time.perf_counter() - first_at,
        )
        yield Chunk(text=tail, finish_reason=finish, stats=stats)

    def _mask_padding(self, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embedding tables are often padded past the tokenizer's last id; those rows may never be chosen."""
        known = self.tokenizer.vocab_size
        if known < logits_V.size:
            logits_V = logits_V.copy()
            logits_V[known:] = -np.inf
        return logits_V

    def _logprobs(self, params: SamplingParams, logits_V: NDArray[np.float32], token: int) -> tuple[TokenLogprob, ...]:
        if params.logprobs is None:
            return ()
        logprobs_V = log_softmax(logits_V)
        to_bytes = self.tokenizer.token_bytes
        top = tuple((i, to_bytes(i), float(logprobs_V[i])) for i in likeliest(logprobs_V, params.logprobs))
        return (TokenLogprob(token_id=token, text_bytes=to_bytes(token), logprob=float(logprobs_V[token]), top=top),)


def _resolve(model: str | Path) -> Path:
    from shoal import hub

    return hub.resolve(model)


def _collect(chunks: Generator[Chunk, None, None]) -> Completion:
    text: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    last = Chunk()
    for last in chunks:
        text.append(last.text)
        token_ids.extend(last.token_ids)
        logprobs.extend(last.logprobs)
    assert last.finish_reason is not None and last.stats is not None
    return Completion(
        text="".join(text),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason=last.finish_reason,
        stats=last.stats,
    )
