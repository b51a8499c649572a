"""Measures the engine: prompt and decode speed, time to the first token, and how much of the memory's speed is used.

Everything runs through `Core`, as a request does: scheduler, cache, sampler and Python are in the numbers. All tokens
are random, generated ones too: left to itself a model that reads noise soon says the same in every sequence, and
sequences that say the same share their experts. What was in fact read is counted.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.config import ModelConfig
from shoal.engine.core import Core
from shoal.engine.params import SamplingParams
from shoal.engine.plan import PAGE_TOKENS
from shoal.engine.sampler import Sampler
from shoal.engine.sequence import Sequence as Running
from shoal.errors import RequestError, ShoalError
from shoal.formats.checkpoint import Checkpoint

SEED = 20_260_101
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
MAX_BATCH = 256  # more would not decode in one step beside each other's prompts
WARM_TOKENS = 512
READ_BYTES = 1 << 30
READ_PASSES = 24
# Prints bytes a second. In a process of its own, so that its buffer is no part of the model's peak memory.
_READ = "import sys; from shoal.kernels import native; print(native.read_bandwidth(*map(int, sys.argv[1:])))"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to measure: `batch` sequences, each with `depth` tokens in the cache, then a prompt of `prompt` tokens, then
    `gen` generated ones after the first; 0 measures the prompt alone."""

    prompt: int = 512
    gen: int = 64
    depth: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (("prompt", 1, 1 << 24), ("gen", 0, 1 << 24), ("depth", 0, 1 << 24)):
            _between(name, getattr(self, name), low, high)
        _between("batch", self.batch, 1, MAX_BATCH)

    @property
    def length(self) -> int:
        """Tokens that a sequence may come to hold: two start it, and some pass while the last of a batch starts."""
        return self.depth + self.prompt + 2 + self.gen + (0 if self.batch == 1 else PAGE_TOKENS + 2 * self.batch)

    @property
    def cache_tokens(self) -> int:
        """Room in the cache so that nothing is pushed out: whole pages, and two to spare for each sequence."""
        return self.batch * (-(-self.length // PAGE_TOKENS) + 2) * PAGE_TOKENS


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The middle and the ends of some measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(median=float(np.median(values)), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Speeds of a case over the repeats; those of decoding are None where nothing was generated.

    Attributes:
        prompt_tok_s: prompt tokens a second, all sequences together.
        first_token_s: seconds from submission to a sequence's first token.
        decode_tok_s: generated tokens a second, all sequences together.
        decode_gb_s: bytes that decoding must read (weights once a step, used experts, every sequence's cache), in 10⁹ a
            second.
        weight_bytes, expert_bytes, cache_bytes: the parts of that, for a step, on average.
        experts_per_layer: distinct experts that a layer reads in a step, on average; None without experts.
    """

    case: Case
    prompt_tok_s: Spread
    first_token_s: Spread
    decode_tok_s: Spread | None
    decode_gb_s: Spread | None
    weight_bytes: int
    expert_bytes: int
    cache_bytes: int
    experts_per_layer: float | None


@dataclass(kw_only=True)
class _Times:
    """One repeat."""

    prompt_tokens: int
    prompt_s: float
    first_token_s: list[float]
    decode_s: float = 0.0
    experts: int = 0
    expert_bytes: int = 0
    positions: int = 0  # cached tokens that the decoding steps attended to, together


def open_core(checkpoint: Checkpoint, cases: Sequence[Case], **options: object) -> Core:
    """An engine whose cache holds any of the cases; `options` are those of `Core`.

    Raises:
        RequestError: a case does not fit the model's context.
    """
    limit = checkpoint.config.max_position_embeddings
    for case in cases:
        if case.length > limit:
            problem = f"{case.depth} + {case.prompt} + {case.gen} tokens do not fit the model's context of {limit}"
            raise RequestError("depth" if case.depth else "prompt", problem)
    cache_tokens = max(case.cache_tokens for case in cases)
    return Core(checkpoint, cache_tokens=cache_tokens, max_running=MAX_BATCH, **options)  # type: ignore[arg-type]


class _Dice(Sampler):
    """Chooses the likeliest token, for the work that this is, and then says a random one."""

    def __init__(self, rng: np.random.Generator, tokens: list[int], vocab_size: int) -> None:
        super().__init__(GREEDY, tokens, vocab_size)
        self._dice = rng
        self._sides = vocab_size

    def choose(self, logits_V: NDArray[np.float32], best: int | None = None) -> int:
        super().choose(logits_V, best)
        return int(self._dice.integers(self._sides))


class Bench:
    """Measures cases one after the other on one engine."""

    def __init__(self, core: Core, config: ModelConfig) -> None:
        self._core = core
        self._config = config
        # One stream for all prompts of a run: none is ever a repetition that the cache already knows.
        self._rng = np.random.default_rng(SEED)

    def measure(self, case: Case, *, repeats: int) -> Measured:
        """Run a case `repeats` times, after one short run that is not counted."""
        _between("repeats", repeats, 1, 10_000)
        before = [self._depth_tokens(index, case.depth) for index in range(case.batch)]
        self._read(self._prompts([[]], min(case.prompt, WARM_TOKENS)))
        if case.depth:
            self._read(before)
        return self._summary(case, [self._repeat(case, before) for _ in range(repeats)])

    def _repeat(self, case: Case, before: list[list[int]]) -> _Times:
        prompts = self._prompts(before, case.prompt)
        start = time.perf_counter()
        read = self._read(prompts)
        times = _Times(prompt_tokens=0, prompt_s=time.perf_counter() - start, first_token_s=[])
        for sequence in read:
            assert sequence.first_at is not None
            times.first_token_s.append(sequence.first_at - start)
            assert (sequence.cached_tokens or 0) <= case.depth, "a random prompt was known"
            times.prompt_tokens += sequence.prompt_tokens - (sequence.cached_tokens or 0)
        if case.gen:
            self._decode(case, [sequence.tokens for sequence in read], times)
        return times

    def _read(self, prompts: list[list[int]]) -> list[Running]:
        """Run prompts up to their first token. Their pages stay in the cache for whoever starts alike."""
        sequences = [self._sequence(tokens, 1) for tokens in prompts]
        try:
            for sequence in sequences:
                self._core.submit(sequence)
            for sequence in sequences:
                self._core.advance(sequence)
        finally:
            for sequence in sequences:
                self._core.release(sequence)
        return sequences

    def _decode(self, case: Case, texts: list[list[int]], times: _Times) -> None:
        """Go on from texts whose pages are in the cache. The clock starts when all sequences generate."""
        sequences = [self._sequence(tokens, case.length - len(tokens)) for tokens in texts]
        try:
            for sequence in sequences:
                self._core.submit(sequence)
            for sequence in sequences:
                self._core.advance(sequence)
            for sequence in sequences:
                sequence.max_tokens = sequence.produced + case.gen
                sequence.outputs.clear()
                times.positions += sum(len(sequence.tokens) + step for step in range(case.gen))
            experts, expert_bytes = self._core.experts_read
            start = time.perf_counter()
            for _ in range(case.gen):
                for sequence in sequences:
                    self._core.advance(sequence)
                    sequence.outputs.popleft()
            times.decode_s = time.perf_counter() - start
            times.experts = self._core.experts_read[0] - experts
            times.expert_bytes = self._core.experts_read[1] - expert_bytes
        finally:
            for sequence in sequences:
                self._core.release(sequence)

    def _sequence(self, tokens: list[int], max_tokens: int) -> Running:
        sampler = _Dice(self._rng, tokens, self._config.vocab_size)
        return Running(
            tokens=list(tokens), prompt_tokens=len(tokens), params=GREEDY, sampler=sampler, max_tokens=max_tokens,
            eos=frozenset(),
        )  # fmt: skip

    def _prompts(self, before: list[list[int]], count: int) -> list[list[int]]:
        """The texts so far, each with `count` fresh random tokens behind it."""
        return [text + self._rng.integers(0, self._config.vocab_size, count).tolist() for text in before]

    def _depth_tokens(self, index: int, count: int) -> list[int]:
        """The same for every repeat and, up to its length, every depth: it is read once."""
        tokens: list[int] = np.random.default_rng([SEED, index]).integers(0, self._config.vocab_size, count).tolist()
        return tokens

    def _summary(self, case: Case, times: list[_Times]) -> Measured:
        steps = case.gen * len(times)
        position_bytes = self._core.cache_bytes // self._core.cache_tokens
        moe_layers = self._config.num_moe_layers

        def gb_s(one: _Times) -> float:
            read = case.gen * self._core.step_bytes + one.expert_bytes + one.positions * position_bytes
            return float(read / one.decode_s / 1e9)

        def per_step(total: float) -> float:
            return total / steps if steps else 0.0

        experts = per_step(sum(one.experts for one in times)) / moe_layers if moe_layers and steps else None
        return Measured(
            case=case,
            prompt_tok_s=Spread.of([one.prompt_tokens / one.prompt_s for one in times]),
            first_token_s=Spread.of([seconds for one in times for seconds in one.first_token_s]),
            decode_tok_s=Spread.of([case.gen * case.batch / one.decode_s for one in times]) if steps else None,
            decode_gb_s=Spread.of([gb_s(one) for one in times]) if steps else None,
            weight_bytes=self._core.step_bytes,
            expert_bytes=round(per_step(sum(one.expert_bytes for one in times))),
            cache_bytes=round(per_step(sum(one.positions for one in times) * position_bytes)),
            experts_per_layer=experts,
        )


def read_bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads from memory with so many threads, measured now (about two seconds)."""
    command = [sys.executable, "-c", _READ, str(threads), str(READ_BYTES), str(READ_PASSES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ShoalError(f"memory bandwidth could not be measured: {problem}")
    rate: float = float(done.stdout)
    return rate


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RequestError(name, f"must lie between {low} and {high}, got {value}")
