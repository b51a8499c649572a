"""What the code model is asked: lines and functions of held-out packages, drawn by a seed."""

from __future__ import annotations

import ast
import json
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path

from shoal.formats.fim import fim_prompt
from shoal.formats.tokenizer import Tokenizer

MIN_LINE, MAX_LINE = 8, 160  # characters of a line worth asking for


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question.

    Attributes:
        kind: `line` (a whole line), `rest` (a line from somewhere inside it) or `function` (a body after its head).
        prefix, suffix: the file before and after the gap.
        expected: what stood in the gap; for a function, its body.
    """

    kind: str
    package: str
    path: str
    prefix: str
    suffix: str
    expected: str


def draw_cases(corpus: Path, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Case]:
    """`count` cases of each kind, at most one of a kind from a file."""
    with (corpus / "held_out.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    draw = random.Random(seed)
    draw.shuffle(documents)
    cases: list[Case] = []
    for kind in ("line", "rest", "function"):
        found = 0
        for document in documents:
            make = _function_case if kind == "function" else _line_case
            case = make(document, kind, tokenizer, draw)
            if case is not None:
                cases.append(case)
                found += 1
            if found == count:
                break
    return cases


def _line_case(document: dict[str, str], kind: str, tokenizer: Tokenizer, draw: random.Random) -> Case | None:
    lines = document["text"].splitlines(keepends=True)
    wanted = [
        index
        for index, line in enumerate(lines)
        if index > 4 and MIN_LINE <= len(line.strip()) <= MAX_LINE and not line.lstrip().startswith(("#", '"""', "'''"))
    ]
    if not wanted:
        return None
    index = draw.choice(wanted)
    line = lines[index].rstrip("\n")
    start = 0
    if kind == "rest":  # the cursor stands between two tokens, where an editor would ask
        ids = tokenizer.encode(line, add_bos=False)
        if len(ids) < 4:
            return None
        start = len(tokenizer.decode(ids[: draw.randrange(2, len(ids) - 1)]))
        if not line[:start].strip() or not line[start:].strip():
            return None
    prefix, suffix = "".join(lines[:index]) + line[:start], "\n" + "".join(lines[index + 1 :])
    return Case(
        kind=kind, package=document["package"], path=document["path"], prefix=prefix, suffix=suffix,
        expected=line[start:],
    )  # fmt: skip


def _function_case(document: dict[str, str], kind: str, tokenizer: Tokenizer, draw: random.Random) -> Case | None:
    text = document["text"]
    lines = text.splitlines(keepends=True)
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body[0].lineno > node.lineno  # no one-liner
        and 2 <= (node.end_lineno or 0) - node.body[0].lineno <= 15
    ]
    if not functions:
        return None
    node = draw.choice(functions)
    head, end = node.body[0].lineno - 1, node.end_lineno or 0
    return Case(
        kind=kind, package=document["package"], path=document["path"], prefix="".join(lines[:head]),
        suffix="".join(lines[end:]), expected="".join(lines[head:end]),
    )  # fmt: skip


def prompt_ids(case: Case, tokenizer: Tokenizer, room: int, *, with_suffix: bool) -> list[int]:
    """The prompt in at most `room` tokens: the end of the prefix and, if asked for, a quarter of it of the suffix.

    In the order of the tokenizer (`shoal.formats.fim`).
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prefix = tokenizer.encode(case.prefix, add_bos=False)
    if not with_suffix:
        return bos + prefix[-(room - len(bos)) :]
    suffix = tokenizer.encode(case.suffix, add_bos=False)[: room // 4]
    prompt = fim_prompt(tokenizer, prefix[-(room - len(bos) - 3 - len(suffix)) :], suffix)
    assert prompt is not None
    return prompt


def first_line(text: str) -> str:
    """What an editor would insert for one line."""
    return text.split("\n", 1)[0].rstrip()


def is_valid_function(case: Case, generated: str) -> bool:
    """Whether the head of the function with the generated body parses, up to where the indentation ends it.

    A body that was cut off by the token limit is judged without its last, unfinished line.
    """
    lines = case.prefix.splitlines(keepends=True)
    at = next(
        index for index in reversed(range(len(lines))) if lines[index].lstrip().startswith(("def ", "async def "))
    )
    indent = len(lines[at]) - len(lines[at].lstrip())
    body: list[str] = []
    text_lines = generated.splitlines(keepends=True)
    for line in text_lines if generated.endswith("\n") else text_lines[:-1]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        body.append(line)
    if not any(line.strip() for line in body):
        return False
    try:
        ast.parse(textwrap.dedent("".join(lines[at:] + body)))
    except (SyntaxError, ValueError):
        return False
    return True
