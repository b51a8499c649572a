"""One request inside the engine: its tokens, its pages, and what it still wants."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from shoal.engine.pages import PrefixKey
from shoal.engine.params import SamplingParams
from shoal.engine.sampler import Sampler

LOOKUP_GRAM = 3


@dataclass(frozen=True, kw_only=True)
class Produced:
    """A chosen token; `logprob` and `top` (id, logprob) are filled only if asked for."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, eq=False)
class Sequence:
    """State of one generation. `computed` tokens have their cache filled; the rest of `tokens` is still to be run.

    `finish` is None while it runs, then `stop` (an end-of-text token, which is not among the outputs) or `length`.
    """

    tokens: list[int]
    prompt_tokens: int
    params: SamplingParams
    sampler: Sampler
    max_tokens: int
    eos: frozenset[int]
    draft_length: int = 0
    computed: int = 0
    cached_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    last_key: PrefixKey | None = None
    published: int = 0  # full pages already offered for sharing
    outputs: deque[Produced] = field(default_factory=deque)
    finish: str | None = None
    submitted_at: float = field(default_factory=time.perf_counter)
    first_at: float | None = None
    drafted: int = 0
    accepted: int = 0
    _grams: dict[tuple[int, ...], int] = field(default_factory=dict)
    _indexed: int = 0

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        """Only the newest token is left to run."""
        return self.computed == len(self.tokens) - 1

    def draft(self) -> list[int]:
        """Guess the next tokens from what followed the same last tokens before (prompt lookup); may be empty."""
        limit = min(self.draft_length, self.max_tokens - self.produced - 1)
        if limit <= 0:
            return []
        tokens, gram = self.tokens, LOOKUP_GRAM
        # The gram that ends the text is looked up before it is entered, or it would find itself.
        for end in range(max(self._indexed, gram), len(tokens)):
            self._grams[tuple(tokens[end - gram : end])] = end
        self._indexed = len(tokens)
        at = self._grams.get(tuple(tokens[-gram:])) if len(tokens) >= gram else None
        return tokens[at : at + limit] if at is not None else []

    def accept(self, produced: Produced) -> bool:
        """Take a chosen token; False once the sequence is finished."""
        if self.first_at is None:
            self.first_at = time.perf_counter()
        if produced.token in self.eos and not self.params.ignore_eos:
            self.finish = "stop"
            return False
        self.tokens.append(produced.token)
        self.outputs.append(produced)
        if self.produced >= self.max_tokens:
            self.finish = "length"
            return False
        return True
