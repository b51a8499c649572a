"""How models call functions: the syntax a chat template teaches, and reading calls out of streamed text.

A call is a marker, a head that holds the name, the arguments as JSON, and a marker again. Each family writes that in
its own way. Templates that know no tools get the plainest of them, described in a system message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OBJECT_HEAD = r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
PYTHON_TAG = "<|python_tag|>"  # what Llama may put before a call
MAX_HEAD = 1024  # characters before the arguments, of a model that has lost its way


@dataclass(frozen=True, kw_only=True)
class ToolSyntax:
    """One way of writing calls: `opening`, then `marker` `before` arguments `after` for each call, then `closing`.

    Attributes:
        opening, closing: around all calls of an answer; may be empty.
        marker: announces a call; empty where an answer that starts with `{` is one.
        before: from the marker to the arguments, with `{name}` where the name stands, unless the JSON holds it.
        after: what closes a call.
        key: name of the arguments in a JSON object beside `name`; None: the arguments stand alone.
        head: matches from behind the marker up to the arguments.
    """

    opening: str = ""
    closing: str = ""
    marker: str
    before: str = ""
    after: str = ""
    key: str | None = None
    head: str = _OBJECT_HEAD

    @property
    def start(self) -> str:
        """What announces the first call."""
        return self.opening or self.marker


HERMES = ToolSyntax(marker="<tool_call>", before="\n", after="\n</tool_call>", key="arguments")
DEEPSEEK_V3 = ToolSyntax(
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    marker="<｜tool▁call▁begin｜>",
    before="function<｜tool▁sep｜>{name}\n```json\n",
    after="\n```<｜tool▁call▁end｜>",
    head=r"\s*function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n",
)
DEEPSEEK_V3_1 = ToolSyntax(
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    marker="<｜tool▁call▁begin｜>",
    before="{name}<｜tool▁sep｜>",
    after="<｜tool▁call▁end｜>",
    head=r"\s*(?P<name>[^\n<{]+)<｜tool▁sep｜>",
)
LLAMA = ToolSyntax(marker="", key="parameters")


def tool_syntax(template: str) -> ToolSyntax:
    """The syntax that a chat template teaches, told by its markers; the plainest where it teaches none."""
    if "<｜tool▁call▁begin｜>" in template:
        return DEEPSEEK_V3 if "```json" in template else DEEPSEEK_V3_1
    if "<tool_call>" not in template and re.search(r'"parameters"\s*:', template):
        return LLAMA
    return HERMES


def takes_tools(template: str) -> bool:
    """Whether a chat template has a place for tools."""
    return re.search(r"\btools\b", template) is not None


class ToolParser:
    """Splits an answer's text into ("text", 0, …), ("name", n, …) of the n-th call, and ("arguments", n, …) pieces.

    Arguments are passed on as they come. What looks like a call and is none is given back as text.
    """

    def __init__(self, syntax: ToolSyntax) -> None:
        self._syntax = syntax
        self._head = re.compile(syntax.head)
        self._end = syntax.after.strip()  # models are not sure of the white space
        self._state = "text" if syntax.marker else "start"
        self._opened = ""
        self._held = ""
        self._json = _JsonEnd()
        self.count = 0  # calls begun

    def push(self, text: str) -> list[tuple[str, int, str]]:
        """What is certain after this text; pieces are never empty."""
        self._held += text
        out: list[tuple[str, int, str]] = []
        while self._step(out):
            pass
        return out

    def flush(self) -> list[tuple[str, int, str]]:
        """What was held back, at the end of the text: text, unless it closes a call."""
        held, self._held = self._held, ""
        lost = held if self._state in ("start", "text") else self._opened + held if self._state == "head" else ""
        return [("text", 0, lost)] if lost.strip() else []

    def _step(self, out: list[tuple[str, int, str]]) -> bool:
        """Consume what can be told from the held text; True if there may be more."""
        if self._state == "start":
            return self._at_start()
        if self._state == "text":
            return self._in_text(out)
        if self._state == "between":
            return self._between()
        if self._state == "head":
            return self._in_head(out)
        if self._state == "arguments":
            return self._in_arguments(out)
        return self._in_tail()

    def _at_start(self) -> bool:
        body = self._held.lstrip()
        if PYTHON_TAG.startswith(body):
            return False
        body = body.removeprefix(PYTHON_TAG).lstrip()
        if not body:
            return False
        if body[0] == "{":
            self._opened = self._held[: len(self._held) - len(body)]
            self._state, self._held = "head", body
        else:
            self._state = "text"
        return True

    def _in_text(self, out: list[tuple[str, int, str]]) -> bool:
        start = self._syntax.start
        at = self._held.find(start) if start else -1
        if at >= 0:
            # White space before a call belongs to the format.
            before = self._held[:at].rstrip()
            self._emit(out, before)
            self._opened = self._held[len(before) : at] + start
            self._held = self._held[at + len(start) :]
            self._state = "between" if self._syntax.opening else "head"
            return True
        keep = _overlap(self._held, start)
        end = len(self._held[: len(self._held) - keep].rstrip()) if start else len(self._held)
        self._emit(out, self._held[:end])
        self._held = self._held[end:]
        return False

    def _emit(self, out: list[tuple[str, int, str]], text: str) -> None:
        if text:
            out.append(("text", 0, text))

    def _between(self) -> bool:
        """Inside `opening` … `closing`, where the next call or the end comes."""
        body = self._held.lstrip()
        for marker, state in ((self._syntax.marker, "head"), (self._syntax.closing, "text")):
            if body.startswith(marker):
                self._state, self._opened, self._held = state, marker, body[len(marker) :]
                return True
        if any(marker.startswith(body) for marker in (self._syntax.marker, self._syntax.closing)):
            return False
        self._held, self._state = body, "text"  # neither: the model goes on in words
        return True

    def _in_head(self, out: list[tuple[str, int, str]]) -> bool:
        match = self._head.match(self._held)
        if match and match.end() < len(self._held):  # else more white space may come
            name = match["name"]
            try:
                name = json.loads(name) if name.startswith('"') else name.strip()
            except ValueError:
                return self._give_up()
            out.append(("name", self.count, name))
            self._json = _JsonEnd()
            self._state, self._held = "arguments", self._held[match.end() :]
            return True
        lost = len(self._held) > MAX_HEAD or (self._end and self._end in self._held)
        if self._syntax.key is not None:
            lost = lost or not '{"name":'.startswith("".join(self._held.split())[:8])
        return self._give_up() if lost else False

    def _give_up(self) -> bool:
        """It was no call: the marker and what follows are ordinary text, and no further call is looked for in it."""
        self._held = self._opened + self._held
        self._syntax = ToolSyntax(marker="")
        self._state = "text"
        return True

    def _in_arguments(self, out: list[tuple[str, int, str]]) -> bool:
        end = self._json.push(self._held)
        piece = self._held if end is None else self._held[:end]
        if piece:
            out.append(("arguments", self.count, piece))
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return False
        self._state = "tail"
        self.count += 1
        return True

    def _in_tail(self) -> bool:
        """From the end of the arguments to the end of the call."""
        body = self._held.lstrip()
        if not body:
            return False
        if self._syntax.key is not None:
            body = body.removeprefix("}").lstrip()
        if self._end and not body.startswith(self._end):
            if len(body) < len(self._end):
                return False
            self._held = body  # another ending than it was taught
        else:
            self._held = body[len(self._end) :]
        self._state = "between" if self._syntax.opening else "text"
        return bool(self._held)


class _JsonEnd:
    """Finds where a JSON object or array ends in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> int | None:
        """The length of the piece up to the value's end, or None if it goes on. What is no object ends at once."""
        for index, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
            if self._depth <= 0 and not self._in_string:
                return index + 1
        return None


def _overlap(text: str, marker: str) -> int:
    """Length of the longest beginning of `marker` that ends `text`."""
    return next((size for size in range(min(len(marker), len(text)), 0, -1) if text.endswith(marker[:size])), 0)


# Templates that know no tools


def describe_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with its tools, calls and results as plain text, for a template that has no place for them."""
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these functions, one JSON description a line:\n{listed}\n\n"
        "To call one, answer with nothing but a JSON object between tags:\n"
        '<tool_call>\n{"name": "function_name", "arguments": {"argument": "value"}}\n</tool_call>'
    )
    out = [_plain(message) for message in messages]
    if not tools:
        return out
    if out and out[0]["role"] == "system":
        out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{text}"}
        return out
    return [{"role": "system", "content": text}, *out]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(message)
    calls = out.pop("tool_calls", None) or []
    out.pop("tool_call_id", None)
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    written = [
        f'<tool_call>\n{{"name": {json.dumps(call["function"]["name"])}, "arguments": {_arguments(call)}}}'
        "\n</tool_call>"
        for call in calls
    ]
    if written:
        out["content"] = "\n".join([*([out["content"]] if out.get("content") else []), *written])
    return out


def _arguments(call: Mapping[str, Any]) -> str:
    value = call["function"].get("arguments") or "{}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
