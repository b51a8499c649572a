"""`shoal.LLM`: a model opened by name, folder or GGUF file, ready to answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal import settings
from shoal.engine.adapters import PackedAdapter, pack_adapter
from shoal.engine.core import Core, Load
from shoal.engine.embedding import MAX_EMBEDDING_TOKENS, Embedder
from shoal.engine.expert_load import ExpertLoad
from shoal.engine.generation import Generation
from shoal.engine.grammar import Grammars
from shoal.engine.outputs import Chunk, Completion, TokenLogprob
from shoal.engine.params import SamplingParams
from shoal.engine.routing import OnRouting
from shoal.engine.sampler import Sampler
from shoal.engine.sequence import Sequence as Running
from shoal.errors import ConfigError, RequestError
from shoal.formats.adapter import load_adapter, merge
from shoal.formats.checkpoint import Checkpoint, open_checkpoint
from shoal.machine import available_bytes

Message = Mapping[str, Any]
DEFAULT_CACHE_TOKENS = 32768
MAX_THREADS = 1024
MAX_SPECULATE = 64


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """An adapter beside the weights. No two ever share a salt, so pages of an unloaded one are never found again."""

    number: int
    salt: bytes
    packed: PackedAdapter
    path: Path


class LLM:
    """A loaded model. Safe to use from several threads at once: their requests run together, step by step.

    Args:
        model: a short name (`shoal models`), a Hugging Face folder, a GGUF file, or an opened checkpoint.
        max_context: most tokens of prompt and answer together; the model's own limit if None or larger.
        threads: CPU threads; if None what `SHOAL_THREADS` says, else every processor that this process may use.
        weights: `auto` keeps the file's own precision; `f32`, `bf16`, `q8`, `q4`, `q4m` repack the large matrices.
        activations: `int8` or `int16` where they meet quantised weights; `auto` chooses by the kind of model.
        cache: `bf16`, `int8` or `f32`, the precision of the attention cache.
        prefill: form of a latent model's attention over prompts: `auto` takes the cheaper one, `absorbed` keeps every
            bit the same however much of a prompt the cache already knew (`engine.prefill`).
        cache_tokens: tokens that the cache holds over all running requests; at least one whole context.
        max_running: most requests that run at once; others wait for their turn.
        speculate: most tokens guessed ahead per step by prompt lookup; output is the same with and without.
        look_ahead: guess one token ahead with the model's own multi-token-prediction layer, if it has one; the same.
        adapter: a PEFT folder of a LoRA, merged into the weights as they are packed. `load_adapter` keeps LoRAs apart.
        helpers_on: processors for the team's threads beside the one that asks (`server.run`); any if none are named.

    Raises:
        UnknownModelError, FileError, ConfigError: the model cannot be opened, with the reason; one is that it needs
            more memory than there is.
        RequestError: an argument is out of its range.
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
        prefill: str = "auto",
        cache_tokens: int | None = None,
        max_running: int = 64,
        speculate: int = 0,
        look_ahead: bool = False,
        adapter: str | Path | None = None,
        helpers_on: Collection[int] = (),
    ) -> None:
        _check_range("max_context", max_context, 1, None)
        _check_range("threads", threads, 1, MAX_THREADS)
        _check_range("cache_tokens", cache_tokens, 1, None)
        _check_range("max_running", max_running, 1, None)
        _check_range("speculate", speculate, 0, MAX_SPECULATE)
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(_resolve(model))
        if adapter is not None:
            checkpoint = merge(checkpoint, load_adapter(adapter))
        self._merged = adapter is not None
        self._checkpoint = checkpoint
        self.beside: dict[str, LLM] = {}  # other models by name, which `step` advances too
        self._adapters: dict[str, _Loaded] = {}
        self._num_loaded = 0
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
        # Called for each request that is prepared; what it returns hears where the request's tokens go (`shoal.trace`).
        self.trace: Callable[[], OnRouting] | None = None
        self._eos = frozenset(self.config.eos_token_id) | frozenset(self.tokenizer.eos_token_ids)
        known_ids = min(self.tokenizer.vocab_size, self.config.vocab_size)
        self._grammars = Grammars(self.tokenizer, known_ids, tuple(self._eos))
        self._core = Core(
            checkpoint, threads=threads or settings.threads(), weights=weights, activations=activations, cache=cache,
            cache_tokens=cache_tokens, max_running=max_running, known_ids=known_ids,
            look_ahead=look_ahead, prefill=prefill, helpers_on=helpers_on,
        )  # fmt: skip

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Hold a LoRA (a PEFT folder) beside the weights, in bfloat16: requests that say `adapter=name` run with it, in
        the same steps as all others. Its memory counts in `weight_bytes`.

        Raises:
            FileError: the folder is damaged, does what Shoal does not, or does not fit the model; names the part.
            ConfigError: the name is taken, the model has an adapter merged in, or memory does not suffice.
        """
        if not name or name in self._adapters or name == self.name:
            raise ConfigError("adapter", f"the name {name!r} is taken" if name else "needs a name")
        if self._merged:
            raise ConfigError("adapter", "is merged into this model; others go beside a model without one")
        packed = pack_adapter(load_adapter(path), self._core.plan)
        left = available_bytes()
        if packed.nbytes > left:
            raise ConfigError("adapter", f"{name!r} needs {packed.nbytes / 1e6:.1f} MB, {left / 1e6:.1f} are available")
        number = self._core.add_adapter(packed)
        self._num_loaded += 1
        salt = hashlib.blake2b(f"adapter {self._num_loaded}".encode(), digest_size=32).digest()
        self._adapters[name] = _Loaded(number=number, salt=salt, packed=packed, path=Path(path))

    def unload_adapter(self, name: str) -> None:
        """Let go of an adapter and its memory. RequestError if there is none of that name or a request runs with it."""
        if not self._core.drop_adapter(self._loaded(name).number):
            raise RequestError("adapter", f"{name!r} is in use")
        del self._adapters[name]

    @property
    def adapters(self) -> dict[str, Path]:
        """Folders of the adapters beside the model, by name."""
        return {name: one.path for name, one in self._adapters.items()}

    def _loaded(self, name: str) -> _Loaded:
        if name not in self._adapters:
            known = ", ".join(map(repr, self._adapters)) or "none is loaded"
            raise RequestError("adapter", f"{name!r} is not loaded ({known})")
        return self._adapters[name]

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights and adapters."""
        return self._core.weight_bytes

    # ---- whole answers

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Completion:
        """Continue a text or a list of token ids, with an adapter of `load_adapter` if one is named. Raises
        RequestError when the prompt is empty or too long."""
        return _collect(self.stream(prompt, params, adapter=adapter))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> Completion:
        """Answer a conversation of `{"role": …, "content": …}` messages in the model's own chat format."""
        return _collect(self.chat_stream(messages, params, tools=tools, options=options, adapter=adapter))

    # ---- streams

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Generator[Chunk, None, None]:
        """As `generate`, piece by piece. Arguments are checked at once; closing the generator ends the work."""
        return self.prepare(prompt, params, adapter=adapter).chunks()

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> Generator[Chunk, None, None]:
        """As `chat`, piece by piece."""
        ids = self.encode_chat(messages, tools=tools, options=options)
        return self.prepare(ids, params, adapter=adapter, continuing=False).chunks()

    # ---- many requests from one thread, as a server runs them: prepare, start, step, take what is ready

    def prepare(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        score: bool = False,
        generate: bool = True,
        adapter: str | None = None,
        continuing: bool = True,
    ) -> Generation:
        """A checked request that has not started.

        Args:
            score: the first chunk carries the log-probabilities of the prompt's own tokens, with `params.logprobs` of
                the likeliest each.
            generate: False ends after the prompt.
            adapter: the name of a loaded one.
            continuing: the answer goes on from the prompt's text; False: it is a text of its own, as in a chat, and a
                first space that SentencePiece vocabularies put before it is left out.
        """
        sequence = self._sequence(prompt, params or SamplingParams(), generate=generate, adapter=adapter)
        return Generation(self._core, self.tokenizer, sequence, score=score, continuing=continuing)

    def step(self) -> bool:
        """Advance every started generation, those of `beside` too, by one step: a token each, or a piece of their
        prompts. False if there is nothing to do. A request that fails does so when its chunks are taken, not here."""
        worked = [self._core.step(), *(llm.step() for llm in self.beside.values())]
        return any(worked)

    @property
    def expert_load(self) -> ExpertLoad | None:
        """What counts how evenly the experts are used, over a sample of the steps; nothing does unless it is set."""
        return self._core.expert_load

    @expert_load.setter
    def expert_load(self, counts: ExpertLoad) -> None:
        self._core.expert_load = counts

    @property
    def load(self) -> Load:
        """Sequences that run and wait, and pages of the cache in use."""
        return self._core.load

    @property
    def cache_tokens(self) -> int:
        """How many tokens the cache holds, over all sequences."""
        return self._core.cache_tokens

    @property
    def cache_bytes_per_token(self) -> int:
        """What a token takes in the cache, over all layers."""
        return int(self._core.cache_bytes // self._core.cache_tokens)

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
            raise RequestError("messages", "this model has no chat format; send plain text to complete instead")
        if not messages:
            raise RequestError("messages", "must hold at least one message")
        return self.chat_format.encode(self.tokenizer, messages, tools=tools, options=options)

    def score(self, tokens: Sequence[int], top: int = 0, *, adapter: str | None = None) -> list[TokenLogprob]:
        """The log-probability of each token after those before it, and the `top` likeliest in its place.

        The first token has NaN, as nothing precedes it. Memory does not grow with T × V."""
        params = SamplingParams(logprobs=top)
        chunks = self.prepare(self._check_ids(tokens), params, score=True, generate=False, adapter=adapter).chunks()
        return [entry for chunk in chunks for entry in chunk.logprobs]

    @property
    def max_embedding(self) -> int:
        """Most tokens of a text to embed."""
        return min(self.max_context, MAX_EMBEDDING_TOKENS)

    def embedder(self) -> Embedder:
        """For `/v1/embeddings`: made anew on each call, over the weights that are loaded."""
        core = self._core
        return Embedder(
            self._checkpoint, core.plan, wide=core.wide, cache_type=core.cache_type, limit=self.max_embedding,
            adapters={one.number: one.packed for one in self._adapters.values()},
        )  # fmt: skip

    def adapter_number(self, name: str | None) -> int:
        """What `Embedder.embed` knows an adapter by; -1 for the model without one."""
        return -1 if name is None else self._loaded(name).number

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, pooling: str = "mean", adapter: str | None = None
    ) -> NDArray[np.float32]:
        """Float32 [texts, D], a vector of length 1 each (`engine.embedding`)."""
        embedder, number = self.embedder(), self.adapter_number(adapter)
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(text) if isinstance(text, str) else self._check_ids(text)
            found = embedder.embed(ids, pooling=pooling, adapter=number)
            rows += [done.vector for done in found if done is not None]
        return np.array(rows, np.float32).reshape(len(rows), self.config.hidden_size)

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> NDArray[np.float32]:
        """Float32 [T, V]: row t scores the token that follows tokens[: t + 1]."""
        sequence = self._sequence(self._check_ids(tokens), SamplingParams(), generate=False, adapter=adapter)
        out = np.empty((len(sequence.tokens), self.config.vocab_size), np.float32)

        def keep(first: int, rows: NDArray[np.float32]) -> None:
            out[first : first + len(rows)] = rows

        sequence.watch = keep
        for _ in Generation(self._core, self.tokenizer, sequence, score=False).chunks():
            pass
        return out

    def _sequence(
        self, prompt: str | Sequence[int], params: SamplingParams, *, generate: bool, adapter: str | None
    ) -> Running:
        loaded = None if adapter is None else self._loaded(adapter)
        ids = self._prompt_ids(prompt, room=int(generate))
        budget = self.max_context - len(ids) if generate else 0
        constraint = None
        if params.grammar is not None:
            constraint = self._grammars.constraint(params.grammar, params.grammar_after)
        sampler = Sampler(params, ids, self._core.known_ids, constraint)
        return Running(
            tokens=ids, prompt_tokens=len(ids), params=params, sampler=sampler,
            max_tokens=budget if params.max_tokens is None else min(params.max_tokens, budget), eos=self._eos,
            draft_length=self.speculate, on_routing=self._watchers(),
            adapter=loaded.number if loaded else -1, salt=loaded.salt if loaded else b"",
        )  # fmt: skip

    def _watchers(self) -> list[OnRouting]:
        """Who hears where the next sequence's tokens go."""
        return [self.trace()] if self.trace is not None else []

    def _prompt_ids(self, prompt: str | Sequence[int], *, room: int) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        ids = self._check_ids(ids)
        if len(ids) + room > self.max_context:
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
        return [int(token) for token in ids]


def _check_range(name: str, value: int | None, low: int, high: int | None) -> None:
    if value is not None and (value < low or (high is not None and value > high)):
        most = "" if high is None else f" and at most {high}"
        raise RequestError(name, f"must be at least {low}{most}, got {value}")


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
    assert last.finish_reason is not None
    assert last.stats is not None
    return Completion(
        text="".join(text),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason=last.finish_reason,
        stats=last.stats,
    )
