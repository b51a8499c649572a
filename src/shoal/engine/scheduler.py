"""Which tokens run in the next step: every decoding sequence, then pieces of waiting prompts (chunked prefill).

First come, first served. When the cache is full the youngest running sequence gives its pages back and waits; its
tokens are kept, so it continues later as if nothing had happened.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from shoal.engine.pages import PagePool
from shoal.engine.plan import PAGE_TOKENS
from shoal.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Tokens of one sequence for one step. `draft` tokens are guesses that follow them; logits are wanted from the last
    real token on if `wants_logits`."""

    sequence: Sequence
    tokens: list[int]
    draft: list[int] = field(default_factory=list)
    wants_logits: bool = True


class Scheduler:
    """Holds waiting and running sequences and hands out cache pages."""

    def __init__(self, pool: PagePool, *, step_tokens: int, max_running: int) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._step_tokens = step_tokens
        self._max_running = max_running

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and give its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)

    def next_step(self) -> list[Slice]:
        """Work for one step; empty when nothing waits or runs."""
        room = self._step_tokens
        slices: list[Slice] = []
        for sequence in list(self.running):
            if sequence not in self.running or room == 0:
                continue
            piece = self._slice(sequence, room)
            if piece is not None:
                slices.append(piece)
                room -= len(piece.tokens) + len(piece.draft)
        while self.waiting and room > 0 and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            self._start(sequence)
            piece = self._slice(sequence, room, may_evict=not self.running)
            if piece is None:
                self._free(sequence)
                break
            self.running.append(self.waiting.popleft())
            slices.append(piece)
            room -= len(piece.tokens)
        return [piece for piece in slices if piece.sequence in self.running]

    def settle(self, piece: Slice, kept: int) -> None:
        """Record that a slice ran and `kept` of its draft tokens were right; full pages become shareable."""
        sequence = piece.sequence
        sequence.computed += len(piece.tokens) + kept
        while (sequence.published + 1) * PAGE_TOKENS <= sequence.computed:
            start = sequence.published * PAGE_TOKENS
            tokens = sequence.tokens[start : start + PAGE_TOKENS]
            page = sequence.pages[sequence.published]
            sequence.last_key = self.pool.publish(page, sequence.last_key, tokens)
            sequence.published += 1

    def _start(self, sequence: Sequence) -> None:
        if sequence.pages:
            return
        sequence.pages, sequence.last_key = self.pool.share(sequence.tokens)
        sequence.published = len(sequence.pages)
        sequence.computed = sequence.published * PAGE_TOKENS
        sequence.cached_tokens = sequence.computed

    def _slice(self, sequence: Sequence, room: int, *, may_evict: bool = True) -> Slice | None:
        left = len(sequence.tokens) - sequence.computed
        count = min(left, room)
        draft = sequence.draft()[: room - count] if left == 1 else []
        needed = -(-(sequence.computed + count + len(draft)) // PAGE_TOKENS)
        while len(sequence.pages) < needed:
            page = self.pool.take()
            if page is not None:
                sequence.pages.append(page)
            elif not may_evict or not self._evict(sequence):
                return None
        tokens = sequence.tokens[sequence.computed : sequence.computed + count]
        return Slice(sequence=sequence, tokens=tokens, draft=draft, wants_logits=count == left)

    def _evict(self, keep: Sequence) -> bool:
        """Send the youngest other sequence back to wait; False if there is none."""
        for sequence in reversed(self.running):
            if sequence is not keep:
                self.running.remove(sequence)
                self._free(sequence)
                self.waiting.appendleft(sequence)
                return True
        return False

    def _free(self, sequence: Sequence) -> None:
        for page in sequence.pages:
            self.pool.release(page)
        sequence.pages = []
        sequence.computed = sequence.published = 0
        sequence.last_key = None
