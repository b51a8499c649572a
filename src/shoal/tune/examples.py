"""Tuning data on disk: one JSON object a line (or one JSON list), in any of four common shapes.

    messages   {"messages": [{"role": …, "content": …}, …], "tools": […]?}                     OpenAI, Hugging Face
    prompt     {"prompt": text or messages, "completion": text or messages}                    TRL
    alpaca     {"instruction": text, "input": text?, "output": text, "system": text?}          Stanford Alpaca
    sharegpt   {"conversations": [{"from": "human" or "gpt" or …, "value": text}, …], "system": text?}

All become a conversation or a plain (prompt, completion). Nothing is skipped: the first bad line ends the reading with
its number and field.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from shoal.errors import ConfigError, FileError

MAX_LINE_BYTES = 64 << 20
MAX_LIST_BYTES = 2 << 30
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant", "tool": "tool",
    "function_response": "tool", "observation": "tool",
}  # fmt: skip
Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """Something to learn from: `messages` with at least one answer, or plain text.

    Attributes:
        messages: a conversation, empty for plain text.
        prompt, completion: plain text; only the completion is learnt.
        tools: function descriptions that go with the messages.
        line: where it stands in the file, from 1.
    """

    messages: Sequence[Json] = ()
    prompt: str = ""
    completion: str = ""
    tools: Sequence[Json] | None = None
    line: int = 0


class _BadFieldError(Exception):
    """What is wrong with a line: the field and the problem."""

    def __init__(self, field: str, problem: str) -> None:
        self.field, self.problem = field, problem


def read_examples(path: str | Path, *, shape: str = "auto") -> list[Example]:
    """All examples of a `.jsonl`, `.jsonl.gz` or `.json` file.

    Args:
        shape: `messages`, `prompt`, `alpaca` or `sharegpt`; `auto` goes by the keys of the first line.

    Raises:
        FileError: the file cannot be read, or a line is not what the shape says; names line and field.
        ConfigError: an unknown shape.
    """
    path = Path(path)
    if shape != "auto" and shape not in SHAPES:
        raise ConfigError("format", f"{shape!r} is not one of auto, {', '.join(SHAPES)}")
    out = []
    for number, record in _records(path):
        if shape == "auto":
            shape = _detect(path, number, record)
        try:
            if not isinstance(record, dict):
                raise _BadFieldError("", "must be a JSON object")
            example = SHAPES[shape](record)
        except _BadFieldError as bad:
            raise FileError(f"{path}:{number}", bad.problem, item=bad.field or None) from None
        out.append(Example(**{**example, "line": number}))
    if not out:
        raise FileError(path, "holds no examples")
    return out


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            first = file.readline(MAX_LINE_BYTES + 1)
            if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                yield from _list_records(path, first + file.read(MAX_LIST_BYTES))
            else:
                yield from _line_records(path, first, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FileError(path, f"is damaged: {error}") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror or error}") from None


def _line_records(path: Path, line: bytes, file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, Any]]:
    number = 1
    line = line.removeprefix(b"\xef\xbb\xbf")
    while line:
        if len(line) > MAX_LINE_BYTES:
            raise FileError(f"{path}:{number}", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
        if line.strip():
            yield number, _parse(path, number, line)
        line = file.readline(MAX_LINE_BYTES + 1)
        number += 1


def _list_records(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    if len(data) > MAX_LIST_BYTES:
        raise FileError(path, f"is a JSON list of more than {MAX_LIST_BYTES >> 30} GiB; write one object a line")
    records = _parse(path, 1, data.removeprefix(b"\xef\xbb\xbf"))
    yield from enumerate(records if isinstance(records, list) else [records], 1)


def _parse(path: Path, number: int, data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise FileError(f"{path}:{number}", f"is not valid JSON: {error}") from None


def _detect(path: Path, number: int, record: Any) -> str:
    keys = set(record) if isinstance(record, dict) else set()
    for shape, wanted in (("messages", {"messages"}), ("prompt", {"prompt", "completion"}),
                          ("alpaca", {"instruction", "output"}), ("sharegpt", {"conversations"})):  # fmt: skip
        if wanted <= keys:
            return shape
    problem = f"has the keys {sorted(keys)}, which are none of {', '.join(SHAPES)}" if keys else "is no JSON object"
    raise FileError(f"{path}:{number}", problem)


# One function a shape: a record to the fields of an Example.


def _from_messages(record: Json) -> dict[str, Any]:
    return {"messages": _conversation(record.get("messages"), "messages"), "tools": _tools(record)}


def _from_prompt(record: Json) -> dict[str, Any]:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        messages = [*_messages(prompt, "prompt"), *_messages(completion, "completion")]
        for index, message in enumerate(messages):
            if index < len(prompt or ()) and message["role"] == "assistant":
                messages[index] = {**message, "weight": 0}  # part of the question
        return {"messages": _with_answer(messages, "completion"), "tools": _tools(record)}
    return {"prompt": _text(record, "prompt"), "completion": _text(record, "completion", empty=False)}


def _from_alpaca(record: Json) -> dict[str, Any]:
    question, extra = _text(record, "instruction", empty=False), _text(record, "input", needed=False)
    system = _text(record, "system", needed=False)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{question}\n\n{extra}" if extra else question})
    return {"messages": [*messages, {"role": "assistant", "content": _text(record, "output", empty=False)}]}


def _from_sharegpt(record: Json) -> dict[str, Any]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _BadFieldError("conversations", "must be a list of turns")
    system = _text(record, "system", needed=False)
    messages = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise _BadFieldError(where, "must be an object")
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker.lower() not in _SPEAKERS:
            raise _BadFieldError(f"{where}.from", f"{speaker!r} is not one of {', '.join(_SPEAKERS)}")
        if not isinstance(text, str):
            raise _BadFieldError(f"{where}.value", "must be text")
        if turn.get("weight", 1) not in (0, 1):
            raise _BadFieldError(f"{where}.weight", "must be 0 or 1")
        message = {"role": _SPEAKERS[speaker.lower()], "content": text}
        messages.append({**message, "weight": turn["weight"]} if "weight" in turn else message)
    return {"messages": _with_answer(messages, "conversations")}


SHAPES: dict[str, Callable[[Json], dict[str, Any]]] = {
    "messages": _from_messages,
    "prompt": _from_prompt,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
}


def _conversation(value: Any, where: str) -> list[Json]:
    return _with_answer(_messages(value, where), where)


def _messages(value: Any, where: str) -> list[Json]:
    if not isinstance(value, list) or not value:
        raise _BadFieldError(where, "must be a list of messages")
    for index, message in enumerate(value):
        here = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise _BadFieldError(here, "must be an object")
        if message.get("role") not in ROLES:
            raise _BadFieldError(f"{here}.role", f"{message.get('role')!r} is not one of {', '.join(ROLES)}")
        content = message.get("content")
        calls = message.get("tool_calls")
        if not isinstance(content, (str, list)) and not (content is None and calls):
            raise _BadFieldError(f"{here}.content", "must be text or a list of text parts")
        if message.get("weight", 1) not in (0, 1):
            raise _BadFieldError(f"{here}.weight", "must be 0 or 1")
    return value


def _with_answer(messages: list[Any], where: str) -> list[Json]:
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise _BadFieldError(where, "hold no assistant message to learn from")
    return messages


def _tools(record: Json) -> list[Json] | None:
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _BadFieldError("tools", "must be a list of objects")
    return tools


def _text(record: Json, name: str, *, needed: bool = True, empty: bool = True) -> str:
    value = record.get(name)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise _BadFieldError(name, "is missing" if value is None else "must be text")
    if not value and not empty:
        raise _BadFieldError(name, "is empty")
    return value
