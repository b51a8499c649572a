"""Score a query by what it returns: run it and the reference on the same SQLite database and compare the rows.

The database is opened read-only, an authorizer lets nothing through but reading, and steps, rows and memory are
bounded, so no process of its own is needed.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from shoal.errors import FileError

MAX_STEPS = 50_000_000  # of SQLite's virtual machine, some seconds
MAX_ROWS = 100_000
MAX_HEAP = 256 << 20
_STEPS_A_CALL = 100_000
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}


class QueryError(Exception):
    """The query is not one, reads what is not there, or exceeds a limit."""


def same_answer(database: Path, query: str, reference: str) -> bool:
    """Whether both give the same rows, in the same order if the reference orders them. A faulty query does not.

    Raises:
        FileError: the database cannot be read, or the reference itself fails on it.
    """
    try:
        wanted = run_query(database, reference)
    except QueryError as error:
        raise FileError(database, f"the reference query fails: {error}", item=reference) from error
    try:
        found = run_query(database, query)
    except QueryError:
        return False
    if "order by" in " ".join(reference.lower().split()):
        return found == wanted
    return Counter(found) == Counter(wanted)


def run_query(database: Path, query: str) -> list[tuple[Any, ...]]:
    """The rows of one reading statement, floats rounded to 6 decimals. Raises QueryError, or FileError for the file."""
    try:
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    except sqlite3.Error as error:
        raise FileError(database, f"cannot be opened: {error}") from error
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls * _STEPS_A_CALL > MAX_STEPS

    try:
        connection.execute(f"pragma hard_heap_limit = {MAX_HEAP}")
        connection.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise FileError(database, f"is not a SQLite database: {error}") from error
    try:
        connection.set_authorizer(_allow)
        connection.set_progress_handler(count, _STEPS_A_CALL)
        rows = connection.execute(query.strip().rstrip(";")).fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError, OverflowError) as error:
        raise QueryError(str(error)) from error
    finally:
        connection.close()
    if len(rows) > MAX_ROWS:
        raise QueryError(f"more than {MAX_ROWS} rows")
    return [tuple(round(value, 6) if isinstance(value, float) else value for value in row) for row in rows]


def _allow(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY
