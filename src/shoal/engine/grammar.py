"""Answers that keep to a grammar: which tokens may come next, from llguidance (MIT), as one more mask for the sampler.

A grammar is llguidance's Lark dialect, which embeds JSON schemas (`%json {…}`) and regular expressions (`/…/`); it may
name control tokens by id (`<[128808]>`), which text never matches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RequestError
from shoal.formats.tokenizer import Tokenizer

MAX_KEPT = 64
Floats = NDArray[np.float32]


class Constraint:
    """One answer's place in its grammar, which begins behind the token `after` or, without one, at once."""

    def __init__(self, matcher: Any, after: int | None) -> None:
        self._matcher = matcher
        self._after = after

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and admits nothing more."""
        return self._after is None and bool(self._matcher.is_stopped())

    def restrict(self, logits_V: Floats) -> Floats:
        """The logits with −inf for every token that the grammar forbids here. RequestError: it became too complex."""
        if self._after is not None:
            return logits_V
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError("grammar", in_short(self._matcher.get_error()), code="invalid_grammar")
        allowed_V = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(logits_V), bitorder="little")
        return np.where(allowed_V, logits_V, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        if self._after is None:
            self._matcher.consume_token(token)
        elif token == self._after:
            self._after = None


class Grammars:
    """Compiles grammars against one vocabulary and keeps the newest of them.

    Args:
        vocab_size: ids from here on are never chosen.
        eos: the tokens that end a text, allowed wherever the grammar may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(token for token in eos if token < vocab_size)
        self._vocabulary: Any = None
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def constraint(self, grammar: str, after: int | None = None) -> Constraint:
        """A fresh start in the grammar. Raises RequestError if it is none, or an impossible one. Safe from several
        threads."""
        kept = self._kept.get(grammar)
        if kept is None:
            kept = self._compile(grammar)
            self._kept[grammar] = kept  # a second thread may have done the same meanwhile, which does no harm
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return Constraint(kept.deep_copy(), after)

    def _compile(self, grammar: str) -> Any:
        import llguidance  # here, as few processes need it

        if self._vocabulary is None:
            self._vocabulary = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)),
                eos_token=self._eos or [self._vocab_size],
            )
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, limits=limits, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some faults show only here
        if matcher.is_error():
            raise RequestError("grammar", in_short(matcher.get_error()), code="invalid_grammar")
        return matcher


class _Vocabulary:
    """What llguidance asks of a tokenizer. One more token, that no model has, ends texts where a model has none."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._encode = tokenizer.encode_piece
        self.eos_token_id = vocab_size
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)] + [b"<end>"]
        self.special_token_ids = [token for token in range(vocab_size) if tokenizer.is_control(token)] + [vocab_size]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode(errors="replace"))


def in_short(problem: str) -> str:
    """The first line, and the one that a regular expression's own parser ends with; the rest draws the place."""
    if "NoExtension" in problem[:40]:  # llguidance's name for it
        return "leaves no token of this model's vocabulary to choose"
    if problem.startswith("panic"):  # what follows speaks of the library's inside
        return "cannot be compiled"
    lines = [line.strip() for line in problem.splitlines() if line.strip()] or ["cannot be followed any further"]
    short = " ".join([lines[0], *[line for line in lines[1:] if line.startswith("error:")]])
    return short if len(short) <= 300 else short[:300] + "…"
