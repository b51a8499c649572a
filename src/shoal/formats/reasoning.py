"""Telling a model's reasoning from its answer while both stream by: `<think>reasoning</think>answer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from shoal.formats.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
Part = Literal["reasoning", "content"]


class ReasoningSplitter:
    """Splits streamed text into ("reasoning", …) and ("content", …) pieces, however it is cut into chunks.

    A `<think>` counts only at the very start (white space may come before it), a `</think>` only while reasoning;
    anywhere else they are ordinary text. Newlines right after `<think>`, around `</think>` and at the reasoning's end
    belong to neither part. A missing `</think>` makes everything reasoning.
    """

    def __init__(self, start_in_reasoning: bool) -> None:
        self._state: Literal["start", "reasoning", "content"] = "reasoning" if start_in_reasoning else "start"
        self._held = ""
        self._trim = start_in_reasoning

    @property
    def in_reasoning(self) -> bool:
        return self._state == "reasoning"

    def push(self, text: str) -> list[tuple[Part, str]]:
        """What is certain after this text; pieces are never empty."""
        self._held += text
        out: list[tuple[Part, str]] = []
        while self._step(out):
            pass
        return out

    def flush(self) -> list[tuple[Part, str]]:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        out: list[tuple[Part, str]] = []
        if self._state == "reasoning":
            self._emit(out, "reasoning", held.rstrip("\n"))
        else:
            self._emit(out, "content", held)
        return out

    def _step(self, out: list[tuple[Part, str]]) -> bool:
        """Consume what can be told from the held text; True if a tag was passed and there may be more."""
        if self._state == "start":
            body = self._held.lstrip()
            if body.startswith(OPEN):
                self._enter("reasoning", body[len(OPEN) :], trim=True)
                return True
            if OPEN.startswith(body):
                return False
            self._enter("content", self._held, trim=False)
            return True
        if self._state == "content":
            self._emit(out, "content", self._held)
            self._held = ""
            return False
        at = self._held.find(CLOSE)
        if at >= 0:
            self._emit(out, "reasoning", self._held[:at].rstrip("\n"))
            self._enter("content", self._held[at + len(CLOSE) :], trim=True)
            return True
        safe = _certain(self._held)
        self._emit(out, "reasoning", self._held[:safe])
        self._held = self._held[safe:]
        return False

    def _enter(self, state: Literal["reasoning", "content"], held: str, *, trim: bool) -> None:
        self._state, self._held, self._trim = state, held, trim

    def _emit(self, out: list[tuple[Part, str]], part: Part, text: str) -> None:
        if self._trim:
            text = text.lstrip("\n")
        if text:
            self._trim = False
            out.append((part, text))


def _certain(text: str) -> int:
    """Length of `text` without a tail that may be newlines before, or the beginning of, `</think>`."""
    end = len(text)
    at = text.rfind("<", max(0, end - len(CLOSE) + 1))
    if at >= 0 and CLOSE.startswith(text[at:]):
        end = at
    return len(text[:end].rstrip("\n"))


def split_reasoning(text: str, *, start_in_reasoning: bool) -> tuple[str, str]:
    """(reasoning, answer) of a whole text, exactly as the splitter gives them in pieces."""
    splitter = ReasoningSplitter(start_in_reasoning)
    parts = splitter.push(text) + splitter.flush()
    reasoning, content = ("".join(piece for part, piece in parts if part == kind) for kind in ("reasoning", "content"))
    return reasoning, content


def prompt_opens_reasoning(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends with an open `<think>`, white space aside, and so starts the answer with reasoning.

    Where `<think>` is a control token only its id counts, so that a user's own text cannot switch the parts.
    """
    think = tokenizer.token_id(OPEN)
    at = len(prompt)
    while at and not tokenizer.token_bytes(prompt[at - 1]).strip():
        at -= 1
    if not at:
        return False
    if think is not None and tokenizer.is_control(think):
        return prompt[at - 1] == think
    return tokenizer.decode(prompt[max(0, at - 16) : at], skip_special=False).rstrip().endswith(OPEN)
