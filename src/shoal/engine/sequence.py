"""One request inside the engine: its tokens, its pages, and what it still wants."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shoal.engine.pages import page_key
from shoal.engine.params import SamplingParams
from shoal.engine.plan import PAGE_TOKENS
from shoal.engine.routing import OnRouting
from shoal.engine.sampler import Sampler

LOOKUP_GRAM = 3
Watch = Callable[[int, NDArray[np.float32]], None]


@dataclass(frozen=True, kw_only=True)
class Produced:
    """A chosen token; `logprob` and `top` (id, logprob) are filled only if asked for."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, eq=False)
class Sequence:
    """State of one generation. `computed` tokens have their cache filled; the rest of `tokens` is still to be run.

    Attributes:
        max_tokens: most tokens to produce; 0 only reads the prompt.
        watch: called with the position of a prompt token and the logits after it and its successors, [n, V], for all of
            the prompt in order and each position once; the array is overwritten by the next step.
        on_routing: each is called with where tokens went, prompt and answer in order and each token once. Tokens that
            came from the cache, and an answer's last one, which nothing reads, are left out.
        finish: None while it runs, then `stop` (an end-of-text token, which is not among the outputs, or the end of its
            grammar), `length`, or `error`, with `error` set.
        cancelled: nobody waits for it any more.
        adapter: number of the adapter that it runs with, -1 for none; `salt` keeps its pages apart from others'.
    """

    tokens: list[int]
    prompt_tokens: int
    params: SamplingParams
    sampler: Sampler
    max_tokens: int
    eos: frozenset[int] = frozenset()
    draft_length: int = 0
    adapter: int = -1
    salt: bytes = b""
    ahead: tuple[int, int] | None = None  # (length of `tokens`, the model's own guess of the token that follows)
    watch: Watch | None = None
    watched: int = 0
    on_routing: list[OnRouting] = field(default_factory=list)
    routed: int = 0  # tokens before this position have been reported
    arrival: int = -1  # its place in the order of submission
    computed: int = 0
    cached_tokens: int | None = None  # of the prompt, found in the cache; None before the first step
    pages: list[int] = field(default_factory=list)
    expanded: bool | None = None  # whether its prompt runs in MLA's expanded form; None before the first step
    published: int = 0  # full pages already offered for sharing
    outputs: deque[Produced] = field(default_factory=deque)
    finish: str | None = None
    error: Exception | None = None
    cancelled: bool = False
    submitted_at: float = 0.0
    started_at: float | None = None  # when it first left the queue
    first_at: float | None = None
    machine_seconds: float = 0.0  # its share of the steps that it took part in, by rows
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0  # how often it gave its pages back and had to wait
    _keys: list[bytes] = field(default_factory=list)
    _grams: dict[tuple[int, ...], int] = field(default_factory=dict)
    _indexed: int = 0

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens still to be run."""
        return len(self.tokens) - self.computed

    @property
    def ready(self) -> bool:
        """Whether there is something to take, or nothing more to wait for."""
        return bool(self.outputs) or self.finish is not None or self.cancelled

    def page_key(self, index: int) -> bytes:
        """Key of a full page; each is computed once, as tokens never change."""
        while len(self._keys) <= index:
            start = len(self._keys) * PAGE_TOKENS
            before = self._keys[-1] if self._keys else self.salt
            self._keys.append(page_key(before, self.tokens[start : start + PAGE_TOKENS]))
        return self._keys[index]

    @property
    def shareable_pages(self) -> int:
        """How many pages may come from the cache: one token is left to run, and watched positions must be run."""
        whole = (len(self.tokens) - 1) // PAGE_TOKENS
        return whole if self.watch is None else min(whole, self.watched // PAGE_TOKENS)

    def draft(self) -> list[int]:
        """Guess the next tokens: by the model's own prediction head if it has made a guess for this place, else from
        what followed the same last tokens before (prompt lookup); may be empty."""
        room = self.max_tokens - self.produced - 1
        if room > 0 and self.ahead is not None and self.ahead[0] == len(self.tokens):
            return [self.ahead[1]]
        limit = min(self.draft_length, room)
        if limit <= 0:
            return []
        tokens, gram = self.tokens, LOOKUP_GRAM
        # The gram that ends the text is looked up before it is entered, or it would find itself.
        for end in range(max(self._indexed, gram), len(tokens)):
            self._grams[tuple(tokens[end - gram : end])] = end
        self._indexed = len(tokens)
        at = self._grams.get(tuple(tokens[-gram:])) if len(tokens) >= gram else None
        if at is None:
            return []
        out = tokens[at : at + limit]
        period = len(tokens) - at
        while len(out) < limit:  # the match runs into the end: what repeats goes on repeating
            out.append(out[-period])
        return out

    def accept(self, produced: Produced) -> bool:
        """Take a chosen token; False once the sequence is finished."""
        if self.first_at is None:
            self.first_at = time.perf_counter()
        if produced.token in self.eos and not self.params.ignore_eos:
            self.finish = "stop"
            return False
        self.tokens.append(produced.token)
        self.outputs.append(produced)
        if self.sampler.finished:
            self.finish = "stop"
            return False
        if self.produced >= self.max_tokens:
            self.finish = "length"
            return False
        return True

    def fail(self, error: Exception) -> None:
        self.error = error
        self.finish = "error"
