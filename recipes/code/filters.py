"""Which Python files are worth a model's time: each rule says keep or why not. Reasons are counted by `corpus`."""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
import zlib
from pathlib import PurePosixPath

from licences import is_copyleft_source


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Folders, by what lies in them.
VENDORED = _names(
    """_bundled _internal_vendor _thirdparty _vendor _vendored bundled embed ext extern externals _externals
    node_modules site-packages third_party thirdparty vendor vendored"""
)
TESTS = _names("_tests fixtures golden test test_data testdata tests testsuite unit_tests unittests")
DATA = _names("asv_bench benchmarks lang_data locale locales migrations project_template template templates")
MIN_BYTES, MAX_BYTES = 256, 96 << 10
_GENERATED = re.compile(
    r"auto-?\s?generated|generated (by|from|with|using|code|file|automatically)|do not (edit|modify)|@generated"
    r"|machine generated",
    re.I,
)
_BANNER = re.compile(r"licen[cs]e|copyright|all rights reserved|\(c\)", re.I)


def drop_by_path(path: str) -> str:
    """The reason to leave a file out, from its name alone, or ""."""
    parts = PurePosixPath(path).parts
    folders, name = {part.lower() for part in parts[:-1]}, parts[-1].lower()
    if folders & VENDORED:
        return "vendored"
    if folders & TESTS or name.startswith("test_") or name.endswith(("_test.py", "_tests.py")) or name == "conftest.py":
        return "test"
    if folders & DATA:
        return "data or template"
    if name.endswith(("_pb2.py", "_pb2_grpc.py")) or name in ("_version.py", "version.py", "parsetab.py", "lextab.py"):
        return "generated"
    return ""


def drop_by_text(text: str) -> str:
    """The reason to leave a file out, from its text, or ""."""
    size = len(text.encode())
    if not MIN_BYTES <= size <= MAX_BYTES:
        return "too short" if size < MIN_BYTES else "too long"
    head = text[:2000]
    if _GENERATED.search(head):
        return "generated"
    if is_copyleft_source(head):
        return "other licence"
    lines = text.splitlines()
    if max(map(len, lines)) > 400 or size / len(lines) > 100:
        return "long lines"
    if sum(not char.isascii() for char in text) > 0.05 * len(text):
        return "not English"
    if len(zlib.compress(text.encode(), 1)) < 0.13 * size:
        return "repetitive"
    return _drop_by_syntax(text)


def _drop_by_syntax(text: str) -> str:
    """Files that do not parse, and tables of constants with little code around them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "does not parse"
    constants = nodes = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr_context | ast.operator | ast.cmpop):
            nodes += 1
            constants += isinstance(node, ast.Constant)
    return "table of constants" if constants > 0.45 * nodes else ""


def clean(raw: bytes) -> str | None:
    """The text with `\\n` line ends and without the notice at its head; None if it is not UTF-8.

    Notices are the same in thousands of files; who wrote what is kept in the list of packages instead.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    start = 0
    while start < len(lines) and (not lines[start].strip() or lines[start].startswith("#")):
        start += 1
    if _BANNER.search("\n".join(lines[:start])):
        lines = lines[start:]
    return "\n".join(lines).strip("\n") + "\n"


def fingerprint(text: str) -> bytes:
    """The same for two files that differ in comments, blank lines and spaces only."""
    return hashlib.blake2b("\n".join(_bare_lines(text)).encode(), digest_size=16).digest()


def windows(text: str, length: int = 8) -> set[int]:
    """A number for every run of `length` bare lines: what two files share is what they have copied."""
    lines = _bare_lines(text)
    runs = ("\n".join(lines[at : at + length]) for at in range(max(1, len(lines) - length + 1)))
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs}


def _bare_lines(text: str) -> list[str]:
    bare = ("".join(line.split("#", 1)[0].split()) for line in text.splitlines())
    return [line for line in bare if line]
