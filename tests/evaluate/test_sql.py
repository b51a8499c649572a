"""Queries scored by their rows, and queries that must not do anything but read."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from shoal.errors import FileError
from shoal.evaluate.sql import QueryError, run_query, same_answer


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "music.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        "create table track (id integer, name text, price real); insert into track values"
        " (1, 'Reef', 0.99), (2, 'Tide', 1.29), (3, 'Kelp', 0.99), (4, null, 2.0);"
    )
    connection.close()
    return path


@pytest.mark.parametrize(("query", "reference", "same"), [
    ("select name from track where price < 1", "select name from track where id in (3, 1)", True),
    ("select name from track where price < 1;", "select name from track where id in (3, 1) order by name", False),
    ("select name from track where price < 1 order by 1", "select name from track where id % 2 order by name", True),
    ("select id, name from track", "select name from track", False),
    ("select 0.1 + 0.2", "select 0.3", True), ("select 1", "select '1'", False), ("select null", "select 0", False),
    ("select name from track union all select name from track", "select name from track", False),
    ("with a as (select max(price) p from track) select p from a", "select 2.0", True),
    ("select 2.0", "select 2", True), ("select 2.0 order by 1", "select 2 order by 1", True),
    ("selec name from track", "select 1", False), ("", "select 1", False),
    ("select 1; drop table track", "select 1", False),
])  # fmt: skip
def test_answers_are_compared_as_rows(database: Path, query: str, reference: str, same: bool) -> None:
    assert same_answer(database, query, reference) is same


@pytest.mark.parametrize("query", [
    "drop table track", "delete from track", "insert into track values (9, 'x', 1)", "update track set price = 0",
    "attach 'other.db' as other", "pragma journal_mode = off", "vacuum into 'copy.db'", "create table x (a)",
    "select load_extension('x')", "begin",
    "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n",
    "with recursive n(i) as (select 1 union all select i + 1 from n limit 200000) select i from n",
    "select zeroblob(900000000)", "select hex(randomblob(400000000))",
])  # fmt: skip
def test_nothing_but_reading_and_that_within_limits(
    database: Path, query: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    before = database.read_bytes()
    with pytest.raises(QueryError):
        run_query(database, query)
    assert database.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["music.db"]


def test_a_faulty_reference_or_database_is_the_tasks_fault(database: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="reference query fails"):
        same_answer(database, "select 1", "select nothing")
    (tmp_path / "not.db").write_text("no database at all, but long enough to be read as one" * 40)
    with pytest.raises(FileError, match="not a SQLite database"):
        run_query(tmp_path / "not.db", "select 1")
    with pytest.raises(FileError):
        run_query(tmp_path / "missing.db", "select 1")
