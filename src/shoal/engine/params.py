"""What a caller may ask of a generation, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.errors import RequestError

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_GRAMMAR_CHARS = 1 << 18
BAN = -100.0  # a logit bias of this much forbids the token, as the OpenAI API promises


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Attributes:
        max_tokens: most tokens to produce; None means to the end of the context.
        temperature: 0 is greedy; logits are divided by it otherwise.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set whose probability reaches p (nucleus sampling, arXiv 1904.09751).
        min_p: drop tokens below this share of the likeliest one's probability (arXiv 2407.01082).
        seed: the same seed on the same model and machine gives the same text; None draws a fresh one.
        stop: strings that end the text; they are not part of it.
        logprobs: report the chosen token's log-probability and this many of the likeliest; None reports nothing.
            They are those of the model itself, before temperature, penalties and cuts.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens already produced, as in OpenAI's API.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or text (CTRL).
        logit_bias: added to the logits of single tokens, from -100, which forbids a token altogether, to 100.
        routing: report which experts each token went to, as it happens; nothing in models without experts.
        ignore_eos: go on past end-of-text tokens (benchmarks).
        grammar: what the text must match, in the dialect of `engine.grammar`; it decides where the text may end.
        grammar_after: the grammar begins behind this token (`</think>`); what comes before it is free.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    routing: bool = False
    ignore_eos: bool = False
    grammar: str | None = None
    grammar_after: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 1 << 31)
        _number("temperature", self.temperature, 0.0, 100.0)
        _whole("top_k", self.top_k, 0, 1 << 31)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p", "must be greater than 0")
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _whole("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _check_stops(self.stop)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, 0, 1 << 31)
            _number("logit_bias", bias, -100.0, 100.0)
        if self.grammar is not None:
            if self.ignore_eos:
                raise RequestError("ignore_eos", "does not go with a grammar, which decides where the text ends")
            if len(self.grammar) > MAX_GRAMMAR_CHARS:
                raise RequestError("grammar", f"at most {MAX_GRAMMAR_CHARS} characters, got {len(self.grammar)}")


def _check_stops(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOPS:
        raise RequestError("stop", f"at most {MAX_STOPS} strings, got {len(stop)}")
    for text in stop:
        if not text:
            raise RequestError("stop", "must be non-empty strings")
        if len(text) > MAX_STOP_CHARS:
            raise RequestError("stop", f"at most {MAX_STOP_CHARS} characters each, got {len(text)}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(name, f"must be a whole number between {low} and {high}, got {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(name, f"must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise RequestError(name, f"must lie between {low:g} and {high:g}, got {value:g}")
