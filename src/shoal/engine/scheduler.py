"""Which tokens run in the next step: every decoding sequence first, then pieces of prompts (chunked prefill).

A prompt starts when the cache has room for all of it; several that are being read share a step's room evenly, so a
short one is never stuck behind a long one. When the cache is full the youngest sequence gives its pages back and waits;
its tokens are kept, so it continues later as if nothing had happened. The oldest always keeps going.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from shoal.engine.pages import PagePool
from shoal.engine.plan import PAGE_TOKENS
from shoal.engine.sequence import Sequence

MAX_PREFILLING = 4  # long prompts that are read side by side
DRAFT_ROWS = 64  # guessed tokens of all sequences together in one step
SCORE_ROWS = 128  # prompt rows in one step whose logits are wanted: they cost a vocabulary's width of memory each


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Tokens of one sequence for one step, from position `start` on.

    `draft` tokens are guesses that follow them. Logits are wanted from row `logits_from` on. `last`: the sequence's
    last token is among them, so the next one can be chosen. `expanded`: MLA's expanded form."""

    sequence: Sequence
    start: int
    tokens: list[int]
    draft: list[int] = field(default_factory=list)
    logits_from: int
    last: bool
    expanded: bool = False

    @property
    def rows(self) -> int:
        return len(self.tokens) + len(self.draft)


class Scheduler:
    """Holds waiting and running sequences and hands out cache pages.

    Args:
        step_tokens: prompt tokens in a step when nothing decodes.
        mixed_tokens: prompt tokens in a step that also decodes: what a token may be delayed by.
        max_running: most sequences that run at once.
        expand_from: tokens left to compute for which a prompt is expanded (`engine.prefill`); None: never.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        step_tokens: int,
        mixed_tokens: int,
        max_running: int,
        expand_from: int | None = None,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._step_tokens = step_tokens
        self._mixed_tokens = mixed_tokens
        self._max_running = max_running
        self._expand_from = expand_from
        self._arrivals = 0

    def submit(self, sequence: Sequence) -> None:
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, known or not, and give its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)

    def next_step(self) -> list[Slice]:
        """Work for one step; empty when nothing waits or runs."""
        decoding = self._decodes()
        room = self._mixed_tokens if decoding else self._step_tokens
        busy = {piece.sequence for piece in decoding}
        prefilling = [sequence for sequence in self.running if sequence not in busy]
        self._admit(prefilling, room)
        return decoding + _prefills(prefilling, room)

    def settle(self, piece: Slice, kept: int) -> None:
        """Record that a slice ran and `kept` of its draft tokens were right; full pages become shareable."""
        sequence = piece.sequence
        sequence.computed = piece.start + len(piece.tokens) + kept
        while (sequence.published + 1) * PAGE_TOKENS <= sequence.computed:
            self.pool.publish(sequence.pages[sequence.published], sequence.page_key(sequence.published))
            sequence.published += 1

    def _decodes(self) -> list[Slice]:
        slices: list[Slice] = []
        guesses = DRAFT_ROWS
        index = 0
        while index < len(self.running):  # a full cache shortens the list at its young end
            sequence = self.running[index]
            index += 1
            if sequence.left != 1 or not self._grow(sequence):
                continue
            expanded = _in_expanded_prompt(sequence)  # the last token of a prompt; guesses after it would not be
            draft = [] if expanded else self._draft(sequence, guesses)
            guesses -= len(draft)
            slices.append(
                Slice(
                    sequence=sequence,
                    start=sequence.computed,
                    tokens=sequence.tokens[-1:],
                    draft=draft,
                    logits_from=0,
                    last=True,
                    expanded=expanded,
                )
            )
        return slices

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more token; False if the sequence itself had to give way."""
        while len(sequence.pages) * PAGE_TOKENS <= sequence.computed:
            page = self.pool.take()
            if page is not None:
                sequence.pages.append(page)
                continue
            youngest = self.running.pop()
            self._free(youngest)
            youngest.preempted += 1
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _draft(self, sequence: Sequence, most: int) -> list[int]:
        """Guesses, as far as free pages go: nobody gives way to a guess."""
        draft = sequence.draft()[:most]
        while len(sequence.pages) * PAGE_TOKENS < sequence.computed + 1 + len(draft):
            page = self.pool.take()
            if page is None:
                return draft[: len(sequence.pages) * PAGE_TOKENS - sequence.computed - 1]
            sequence.pages.append(page)
        return draft

    def _admit(self, prefilling: list[Sequence], room: int) -> None:
        """Start waiting sequences, first come first served; they are added to `prefilling`."""
        passed: list[Sequence] = []
        wanted = sum(sequence.left for sequence in prefilling)
        while self.waiting and len(self.running) < self._max_running:
            if len(prefilling) >= MAX_PREFILLING and wanted >= room:
                break
            sequence = self.waiting.popleft()
            if self._follows(sequence, prefilling):
                passed.append(sequence)
            elif self._start(sequence):
                self.running.append(sequence)
                prefilling.append(sequence)
                wanted += sequence.left
            else:
                self.waiting.appendleft(sequence)
                break
        self.waiting.extendleft(reversed(passed))
        self.running.sort(key=lambda sequence: sequence.arrival)

    def _follows(self, sequence: Sequence, prefilling: list[Sequence]) -> bool:
        """Whether a running sequence is about to compute the page that this one needs next: waiting for it is cheaper
        than doing the same work twice (several answers to one prompt, a common system prompt)."""
        count = sequence.shareable_pages
        keys = (sequence.page_key(index) for index in range(count))
        known = len(self.pool.find(keys))
        return known < count and any(
            known < len(other.tokens) // PAGE_TOKENS and other.page_key(known) == sequence.page_key(known)
            for other in prefilling
        )

    def _start(self, sequence: Sequence) -> bool:
        """Take pages for all of the tokens, known ones from the cache; False if that leaves too few for the others."""
        shared = self.pool.find(sequence.page_key(index) for index in range(sequence.shareable_pages))
        self.pool.share(shared)
        needed = -(-len(sequence.tokens) // PAGE_TOKENS) - len(shared)
        # Each running sequence will soon want one more page; without that reserve they would push each other out.
        if self.pool.available < needed + len(self.running):
            self.pool.release(shared)
            return False
        fresh = [page for page in (self.pool.take() for _ in range(needed)) if page is not None]
        assert len(fresh) == needed
        sequence.pages = shared + fresh
        sequence.published = len(shared)
        sequence.computed = len(shared) * PAGE_TOKENS
        if sequence.started_at is None:
            sequence.started_at = time.perf_counter()
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            long = self._expand_from is not None and sequence.left >= self._expand_from
            sequence.expanded = long and sequence.adapter < 0  # adapters add to the absorbed matrices
        return True

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = sequence.published = 0


def _prefills(sequences: list[Sequence], room: int) -> list[Slice]:
    scored = sum(sequence.watch is not None for sequence in sequences)
    most = max(1, SCORE_ROWS // max(1, scored))  # rows that each scored prompt may have
    parts = map(_next_part, sequences)
    wants = [part if s.watch is None else min(part, most) for s, part in zip(sequences, parts, strict=True)]
    return [
        _piece(sequence, count) for sequence, count in zip(sequences, share_out(room, wants), strict=True) if count > 0
    ]


def _next_part(sequence: Sequence) -> int:
    """Tokens left, but of an expanded prompt that is read again those of the answer apart: they were never expanded."""
    return sequence.prompt_tokens - sequence.computed if _in_expanded_prompt(sequence) else sequence.left


def _in_expanded_prompt(sequence: Sequence) -> bool:
    """Whether its next token runs in MLA's expanded form."""
    return bool(sequence.expanded) and sequence.computed < sequence.prompt_tokens


def _piece(sequence: Sequence, count: int) -> Slice:
    start, last = sequence.computed, count == sequence.left
    logits_from = count - 1 if last else count
    if sequence.watch is not None and sequence.watched < sequence.prompt_tokens:
        logits_from = min(logits_from, max(0, sequence.watched - start))
    tokens = sequence.tokens[start : start + count]
    expanded = _in_expanded_prompt(sequence)
    return Slice(
        sequence=sequence, start=start, tokens=tokens, logits_from=logits_from, last=last, expanded=expanded
    )  # fmt: skip


def share_out(room: int, wants: Items[int]) -> list[int]:
    """Divide `room` evenly; what one does not want goes to the others (max-min fairness)."""
    given = [0] * len(wants)
    for place, index in enumerate(sorted(range(len(wants)), key=wants.__getitem__)):
        given[index] = min(wants[index], room // (len(wants) - place))
        room -= given[index]
    return given
