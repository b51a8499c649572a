"""The SQL recipe: its database, its splits, and a judge that only ever reads."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "recipes" / "sql" / "task.py"
spec = importlib.util.spec_from_file_location("sql_task", PATH)
assert spec is not None and spec.loader is not None
task = importlib.util.module_from_spec(spec)
import sys  # noqa: E402

sys.modules["sql_task"] = task
spec.loader.exec_module(task)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A shop of 40 artists with the fixture's own shape."""
    records = []

    def add(model, pk, **fields):
        records.append({"pk": pk, "model": f"chinook.{model}", "fields": fields})

    for i, name in enumerate(["Rock", "Jazz", "Blues"], 1):
        add("genre", i, name=name)
    add("mediatype", 1, name="MPEG audio file")
    add("playlist", 1, name="Music")
    add("employee", 1, firstname="A", lastname="Park", title="Agent", city="X", country="Y", reports_to=None)
    for i in range(1, 41):
        add("artist", i, name=f"Artist O'{i}")
        add("album", i, title=f"Album {i}", artist=i)
        add("track", i, name=f"Song {i}", album=i, genre=1 + i % 3, mediatype=1, composer=None,
            milliseconds=60000 * (i % 9) + i, bytes=1, unit_price=0.99)  # fmt: skip
        add("playlisttrack", i, playlist=1, track=i)
        add("customer", i, firstname=f"F{i}", lastname=f"L{i}", company=None, city=f"City {i % 7}",
            country=f"Land {i % 11}", email=f"{i}@x", support_rep=1)  # fmt: skip
        add("invoice", i, customer=i, invoicedate=f"20{10 + i % 4}-01-01", billingcountry=f"Land {i % 11}",
            billingcity="c", total=1.1 * i)  # fmt: skip
        add("invoiceline", i, invoice=i, track=i, unit_price=0.99, quantity=1)
    folder = tmp_path_factory.mktemp("sql")
    (folder / "data.json").write_text(json.dumps(records))
    task.build(folder / "data.json", folder / "shop.sqlite")
    return folder / "shop.sqlite"


def test_every_template_asks_something_and_its_answer_is_right(database):
    parts = task.questions(database)
    assert all(len(part) > 5 for part in parts.values())
    asked = [example["messages"] for part in parts.values() for example in part]
    forms = [t.sql.split("{")[0] for t in task.TEMPLATES]
    assert {form for form in forms if not any(m[1]["content"].startswith(form) for m in asked)} == set()
    for question, answer in asked[::17]:
        assert "{" not in question["content"]
        assert task.is_right(database, answer["content"], answer["content"] + ";")


def test_what_is_held_out_is_never_in_training(database):
    parts = task.questions(database)
    text = {name: [m["messages"][0]["content"] for m in part] for name, part in parts.items()}
    seen = set(text["train"])
    assert not seen & {q for name in ("values", "phrasings", "templates") for q in text[name]}
    sql = {m["messages"][1]["content"] for m in parts["train"]}
    assert not sql & {m["messages"][1]["content"] for name in ("values", "templates") for m in parts[name]}
    assert not any(q.startswith(("Count the albums of", "Whose album is")) for q in seen)
    assert not any("AVG(total)" in m["messages"][1]["content"] for m in parts["train"])


def test_rows_decide_not_words(database):
    def right(expected, answer):
        return task.is_right(database, expected, answer)

    count = "SELECT COUNT(*) FROM album"
    assert right(count, "SELECT COUNT(id) AS n FROM album")
    assert not right(count, "SELECT COUNT(*) FROM genre")
    assert right("SELECT name FROM genre", "SELECT name FROM genre ORDER BY name DESC")
    assert not right("SELECT name FROM genre ORDER BY id", "SELECT name FROM genre ORDER BY id DESC")
    assert right("SELECT SUM(total) FROM invoice", "SELECT SUM(total + 0.1) - 4.0 FROM invoice")
    assert not right("SELECT name FROM genre", "SELECT DISTINCT 'Rock' FROM genre")


@pytest.mark.parametrize(
    "attack",
    [
        "DELETE FROM album", "DROP TABLE album", "PRAGMA writable_schema = 1", "ATTACH '/tmp/x' AS x", "VACUUM",
        "CREATE TABLE t (a)", "SELECT load_extension('x')", "SELECT 1; DELETE FROM album", "", "\ud800", "select",
    ],
)  # fmt: skip
def test_an_answer_can_only_read(database, attack):
    before = database.read_bytes()
    assert task.run_query(database, attack) in (None, [])
    assert database.read_bytes() == before


def test_an_endless_answer_ends(database):
    endless = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT SUM(x) FROM t"
    assert task.run_query(database, endless, seconds=0.2) is None
    many = "SELECT a.id FROM track a, track b, track c"
    assert task.run_query(database, many) is None
    with sqlite3.connect(database) as file:
        assert file.execute("SELECT COUNT(*) FROM track").fetchone() == (40,)
