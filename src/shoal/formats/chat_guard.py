"""Keeping a user's text from becoming control tokens on its way through a chat template.

Each string from outside gets a sentinel, a character found nowhere in the input, between the characters of everything
that reads as a control token, and at an edge where the template's own text could complete one. What the template then
writes is searched for control tokens, which sentinels break; the rest is encoded as plain text without the sentinels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

from shoal.errors import RequestError
from shoal.formats.reasoning import CLOSE, OPEN
from shoal.formats.tokenizer import Tokenizer, well_formed

MAX_DEPTH = 64
# Words that templates compare with or build tags from; they pass unchanged where they are a role or a type.
_KNOWN_WORDS = {"system", "developer", "user", "assistant", "tool", "function", "latest_reminder", "text"}
_KNOWN_WORDS |= {"json_object", "json_schema", "object", "string", "number", "integer", "boolean", "array", "null"}
_NONCHARACTERS = [*range(0xFDD0, 0xFDF0), *(plane << 16 | low for plane in range(17) for low in (0xFFFE, 0xFFFF))]
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Strings:
    """Copies request values into plain JSON types for a template. This base leaves the strings as they are."""

    sentinel = ""

    def message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        """One chat message; an assistant's own `<think>` tags stay whole, so that templates can drop old reasoning."""
        keep = (OPEN, CLOSE) if message["role"] == "assistant" else ()
        out = {}
        for key, value in message.items():
            if keep and key in ("content", "reasoning_content") and isinstance(value, str):
                out[key] = self.text(value, keep=keep)
            else:
                out[self._key(key, where)] = self._value(key, value, f"{where}.{key}", 1)
        return out

    def plain(self, value: Any, where: str) -> Any:
        return self._value("", value, where, 0)

    def text(self, text: str, *, keep: tuple[str, ...] = ()) -> str:
        return well_formed(text)

    def name(self, text: str) -> str:
        return well_formed(text)

    def _key(self, key: object, where: str) -> str:
        if not isinstance(key, str):
            raise RequestError(where, f"has the key {key!r:.40}, which is no string")
        return self.name(key)

    def _value(self, key: str, value: Any, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise RequestError(where, f"is nested deeper than {MAX_DEPTH}")
        if isinstance(value, str):
            known = key in ("role", "type") and value in _KNOWN_WORDS
            return str(value) if known else self.text(value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {
                self._key(name, where): self._value(name, inner, f"{where}.{name}"[:200], depth + 1)
                for name, inner in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._value(key, inner, where, depth + 1) for inner in value]
        raise RequestError(where, f"holds a {type(value).__name__}, which is no JSON value")


class _Pieces:
    """What a string's edge must not look like: beginnings and ends of control tokens, and their insides."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = list(tokenizer.control_tokens)
        self.longest = max(map(len, tokens), default=0)
        self.heads = {token[:end] for token in tokens for end in range(1, len(token))}
        self.tails = {token[start:] for token in tokens for start in range(1, len(token))}
        self.joined = "\n\n".join(tokens)
        self.single = [token for token in tokens if len(token) == 1]

    def ends_open(self, text: str) -> bool:
        return any(text[-size:] in self.heads for size in range(1, min(self.longest, len(text) + 1)))

    def starts_open(self, text: str) -> bool:
        return any(text[:size] in self.tails for size in range(1, min(self.longest, len(text) + 1)))

    def is_inside(self, text: str) -> bool:
        return 0 < len(text) < self.longest and text in self.joined


_PIECES: WeakKeyDictionary[Tokenizer, _Pieces] = WeakKeyDictionary()


class Guard(Strings):
    """Protects strings on the way in (`message`, `plain`) and encodes the rendered text on the way out."""

    def __init__(self, tokenizer: Tokenizer, inputs: object, template: str) -> None:
        """`inputs`: everything from outside, so that the sentinel is a character that none of it holds."""
        self._tokenizer = tokenizer
        if tokenizer not in _PIECES:
            _PIECES[tokenizer] = _Pieces(tokenizer)
        self._pieces = _PIECES[tokenizer]
        used = set(template).union(*_strings(inputs, 0))
        free = (chr(code) for code in chain(_NONCHARACTERS, _PRIVATE_USE) if chr(code) not in used)
        # A token of one character cannot be broken; another unused character stands in for it.
        self.sentinel, *others = [*islice(free, 1 + len(self._pieces.single))] or [""]
        if len(others) < len(self._pieces.single) or not self.sentinel:
            raise RequestError("messages", "hold every character that could mark their text")
        self._hide = str.maketrans(dict(zip(self._pieces.single, others, strict=True)))
        self._show = str.maketrans({self.sentinel: None, **dict(zip(others, self._pieces.single, strict=True))})

    def text(self, text: str, *, keep: tuple[str, ...] = ()) -> str:
        text = self._break(well_formed(text).translate(self._hide), keep)
        if self._pieces.ends_open(text) or self._pieces.is_inside(text):
            text += self.sentinel
        return self.sentinel + text if self._pieces.starts_open(text) else text

    def name(self, text: str) -> str:
        """A key: templates look known ones up, so only what is no identifier is guarded at its edges."""
        return self._break(text.translate(self._hide), ()) if text.isidentifier() else self.text(text)

    def _break(self, text: str, keep: tuple[str, ...]) -> str:
        """A sentinel before, between and after the characters of each control token, so none overlapping fits."""
        out, at = [], 0
        for start, end, _ in self._tokenizer.find_control(text):
            if text[start:end] not in keep:
                out += [text[at:start], self.sentinel, self.sentinel.join(text[start:end]), self.sentinel]
                at = end
        return "".join([*out, text[at:]]) if out else text

    def encode(self, rendered: str, *, first: bool = True) -> list[int]:
        """Ids of a rendered text, or of a part of one that does not begin it (`first` is False)."""
        ids: list[int] = []
        at = 0
        for start, end, token_id in self._tokenizer.find_control(rendered):
            ids += self._plain_ids(rendered[at:start], first=first and at == 0)
            ids.append(token_id)
            at = end
        return ids + self._plain_ids(rendered[at:], first=first and at == 0)

    def _plain_ids(self, text: str, *, first: bool) -> list[int]:
        return self._tokenizer.encode_piece(text.translate(self._show), first=first)


def _strings(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif depth <= MAX_DEPTH + 4:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from _strings(key, depth + 1)
                yield from _strings(inner, depth + 1)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                yield from _strings(inner, depth + 1)
