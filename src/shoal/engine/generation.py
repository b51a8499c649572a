"""One request from its start to its last chunk: tokens of the engine become text, log-probabilities, an ending."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as Several

from shoal.engine.core import Core, Floats
from shoal.engine.outputs import Chunk, Stats, TokenLogprob
from shoal.engine.routing import Routing
from shoal.engine.sampler import likeliest, log_total
from shoal.engine.sequence import Produced, Sequence
from shoal.engine.stops import StopMatcher
from shoal.errors import ShoalError
from shoal.formats.tokenizer import Tokenizer


class Generation:
    """Made by `LLM.prepare`. One thread takes chunks, by `chunks` or by `ready`; any thread may `cancel`.

    With `score` the first chunk carries the log-probabilities of the prompt's own tokens; nothing predicts the first
    one, whose logprob is NaN.
    """

    def __init__(
        self, core: Core, tokenizer: Tokenizer, sequence: Sequence, *, score: bool, continuing: bool = True
    ) -> None:
        self.done = False
        self._core = core
        self._tokenizer = tokenizer
        self._sequence = sequence
        self._decoder = tokenizer.stream(continuing=continuing)
        self._stops = StopMatcher(sequence.params.stop)
        self._taken = 0
        self._scores: list[TokenLogprob] = []
        self._scores_shown = not score
        self._routings: deque[Routing] = deque()
        if sequence.params.routing:
            sequence.on_routing.append(self._routings.append)
        if score:
            sequence.watch = self._watch
            self._scores.append(self._logprob(Produced(token=sequence.tokens[0], logprob=math.nan)))

    @property
    def settled(self) -> bool:
        """Whether `ready` may bring the last chunk: the engine is done, or a stop string may be among the text."""
        return self._sequence.finish is not None or bool(self._sequence.params.stop) or self.done

    def start(self) -> None:
        """Hand the request to the engine, which runs it at its next steps."""
        self._core.submit(self._sequence)

    def chunks(self) -> Generator[Chunk, None, None]:
        """Start, then yield every chunk as it comes. Closing the generator cancels."""
        self.start()
        try:
            while not self.done:
                self._core.advance(self._sequence)
                yield from self.ready()
        finally:
            self.cancel()

    def ready(self) -> list[Chunk]:
        """What has come since the last call; never waits. Raises what ended the request, once all else is taken."""
        sequence = self._sequence
        finish = sequence.finish  # read before the outputs: all of them precede it
        out: list[Chunk] = []
        if self.done:
            return out
        if not self._scores_shown and (sequence.outputs or finish in ("stop", "length")):
            self._scores_shown = True
            out.append(Chunk(logprobs=tuple(self._scores)))
        if self._routings:
            out.append(Chunk(routing=tuple(self._routings.popleft() for _ in range(len(self._routings)))))
        text, tokens, logprobs = "", [], []
        while sequence.outputs and not self._stops.stopped:
            produced = sequence.outputs.popleft()
            text += self._stops.push(self._decoder.push(produced.token))
            tokens.append(produced.token)
            if sequence.params.logprobs is not None:
                logprobs.append(self._logprob(produced))
        if tokens:
            self._taken += len(tokens)
            out.append(Chunk(text=text, token_ids=tuple(tokens), logprobs=tuple(logprobs)))
        if self._stops.stopped:
            out.append(self._last("", "stop"))
        elif finish == "error":
            if not out:
                self.cancel()
                assert sequence.error is not None
                raise sequence.error
        elif finish is not None:
            out.append(self._last(self._stops.push(self._decoder.flush()) + self._stops.flush(), finish))
        return out

    def cancel(self) -> None:
        """Stop, finished or not, and free the cache pages at once. Nothing more comes."""
        if not self.done:
            self.done = True
            self._core.release(self._sequence)

    def _last(self, text: str, finish: str) -> Chunk:
        self.cancel()
        sequence, ended = self._sequence, time.perf_counter()
        first_at = ended if sequence.first_at is None else sequence.first_at
        stats = Stats(
            prompt_tokens=sequence.prompt_tokens,
            cached_tokens=sequence.cached_tokens or 0,
            completion_tokens=self._taken,
            prompt_seconds=first_at - sequence.submitted_at,
            decode_seconds=ended - first_at,
            drafted=sequence.drafted,
            accepted=sequence.accepted,
            queue_seconds=(ended if sequence.started_at is None else sequence.started_at) - sequence.submitted_at,
            machine_seconds=sequence.machine_seconds,
        )
        # The tail itself may complete a stop string.
        return Chunk(text=text, finish_reason="stop" if self._stops.stopped else finish, stats=stats)

    def _watch(self, first: int, rows: Floats) -> None:
        """Rows from position `first` on predict the tokens from `first` + 1 on."""
        sequence, known = self._sequence, self._core.known_ids
        count = sequence.params.logprobs or 0
        for token, logits_V in zip(sequence.tokens[first + 1 : sequence.prompt_tokens], rows, strict=False):
            scored_V = logits_V[:known]
            if not math.isfinite(scored_V.max()):
                raise ShoalError("the model's scores for the prompt are not finite; its weights may be damaged")
            total = log_total(scored_V)
            top = tuple((i, float(scored_V[i]) - total) for i in likeliest(scored_V, count))
            logprob = float(scored_V[token]) - total if token < known else -math.inf
            self._scores.append(self._logprob(Produced(token=token, logprob=logprob, top=top)))

    def _logprob(self, out: Produced) -> TokenLogprob:
        to_bytes = self._tokenizer.token_bytes
        top = tuple((token, to_bytes(token), logprob) for token, logprob in out.top)
        return TokenLogprob(token_id=out.token, text_bytes=to_bytes(out.token), logprob=out.logprob, top=top)


def run_together(step: Callable[[], object], running: Several[Generation]) -> list[list[Chunk]]:
    """All chunks of prepared generations, which an engine's `step` advances together."""
    chunks: list[list[Chunk]] = [[] for _ in running]
    try:
        for generation in running:
            generation.start()
        while not all(generation.done for generation in running):
            step()
            for mine, generation in zip(chunks, running, strict=True):
                mine.extend(generation.ready())
    finally:
        for generation in running:
            generation.cancel()
    return chunks
