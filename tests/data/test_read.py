"""Reading: every format gives the same documents, and everything unreadable is named with its line (case by case)."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.data import store
from shoal.data.plan import Part, Source, find_parts, plan_shards
from shoal.data.read import ReadOptions, read_documents, read_part
from shoal.data.streams import line_starts, read_lines
from shoal.errors import FileError

ROWS = [{"text": f"text {i} ü", "number": i} for i in range(20)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def read(path, **options):
    rejects = []
    documents = list(read_part(find_parts(path)[0], ReadOptions(**options), rejects.append))
    return documents, [(r.line, r.reason) for r in rejects]


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_row_format_gives_the_same_documents(file, tmp_path, name):
    packed = {"a.jsonl": LINES, "a.jsonl.gz": gzip.compress(LINES), "a.jsonl.zst": zstd(LINES)}
    if name in packed:
        path = file(name, packed[name])
    else:
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    documents = list(read_documents(path))
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    assert [d.metadata["row"]["number"] for d in documents] == list(range(20))
    assert [d.id for d in documents] == [f"{name}:{i}" for i in range(1, 21)]
    assert len({d.metadata["hash"] for d in documents}) == 20


def test_a_row_keeps_its_id_and_provenance(file):
    row = {"id": "x-1", "text": "t", "metadata": {"licence": "MIT", "line": 99}}
    [document] = read_documents(file("a.jsonl", json.dumps(row).encode()))
    assert document.id == "x-1"
    assert document.metadata["licence"] == "MIT"
    assert document.metadata["line"] == 1


def test_bad_rows_are_named_by_line(file):
    content = b"\n".join(
        [b'{"text": "good"}', b'{"text": "cut', b'{"other": 1}', b'{"text": 5}', b"[1]", b'{"text": "caf\xe9"}', b"",
         b'{"text": "last"}']
    )  # fmt: skip
    documents, bad = read(file("a.jsonl", content))
    assert [d.text for d in documents] == ["good", "last"]
    assert documents[1].metadata["line"] == 8
    assert bad == [
        (2, "the line is not JSON"),
        (3, "the row has no field 'text'"),
        (4, "field 'text' is not a string"),
        (5, "the row is not an object"),
        (6, "the line is not UTF-8"),
    ]
    with pytest.raises(FileError, match=r"a\.jsonl: line 2: the line is not JSON"):
        read(file("a.jsonl", content), strict=True)


def test_a_huge_line_is_passed_over_and_not_held(file):
    content = b'{"text": "a"}\n{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "b"}\n'
    documents, bad = read(file("a.jsonl", content), max_document=100_000)
    assert [d.text for d in documents] == ["a", "b"]
    assert bad == [(2, "the line is longer than 100000 bytes")]


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "a.jsonl.gz"), (zstd, "a.jsonl.zst")])
def test_a_truncated_stream_gives_what_came_before(file, pack, name):
    rows = [json.dumps({"text": f"{i} {hash((i, 1)):x}{hash((i, 2)):x}"}).encode() for i in range(40_000)]
    packed = pack(b"\n".join(rows))
    documents, bad = read(file(name, packed[: len(packed) // 2]))
    assert len(documents) > 10_000
    assert [d.metadata["line"] for d in documents] == list(range(1, len(documents) + 1))
    assert bad == [(len(documents) + 1, "the compressed stream ends too early (truncated)")]
    with pytest.raises(FileError, match=r"after line \d+: the compressed stream ends too early"):
        list(read_documents(file(name, packed[: len(packed) // 2])))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"PAR1 nonsense PAR1", "damaged Parquet"),
        ("a.parquet", b"", "damaged Parquet"),
        ("a.txt", b"caf\xe9", "the file is not UTF-8 and declares no other encoding"),
        ("a.py", b"# coding: nonsense\ncaf\xe9", "the file is not UTF-8 and declares no other encoding"),
        ("a.txt", b"a\0b", "the file is binary"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9] + b"xxxxxxxxx", "the compressed stream is damaged"),
    ],
)
def test_bad_files(file, name, content, reason):
    documents, [(_, found)] = read(file(name, content))
    assert documents == []
    assert found.startswith(reason)
    with pytest.raises(FileError, match=name):
        read(file(name, content), strict=True)


def test_an_empty_file_holds_no_rows(file):
    assert read(file("a.jsonl", b"")) == ([], [])


def test_parquet_without_the_column(file, tmp_path):
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([], [(1, "the row has no field 'text'")])
    [document] = read_documents(tmp_path / "a.parquet", ReadOptions(text_field="content"))
    assert document.text == "a"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "grün".encode()),
        ("a.txt", "grün".encode("utf-8-sig")),
        ("a.txt", "grün".encode("utf-16")),
        ("a.py", b"# -*- coding: latin-1 -*-\ngr\xfcn"),
        ("a.txt.gz", gzip.compress("grün".encode(), mtime=0)),
    ],
)
def test_encodings_of_whole_files(file, name, content):
    [document] = read_documents(file(name, content))
    assert document.text.splitlines()[-1] == "grün"


def test_a_source_tree(tmp_path):
    for name in ("b/x.py", "b/.git/y.py", "b/logo.png", "README.md", "Makefile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    [shard], passed = plan_shards([Source(path=tmp_path, name="tree", version="1", licence="MIT")])
    found = [d for part in shard for d in read_part(part, ReadOptions(), lambda _: None)]
    assert [(d.id, d.metadata["kind"], d.metadata.get("language")) for d in found] == [
        ("tree/Makefile", "code", "make"),
        ("tree/README.md", "text", None),
        ("tree/b/x.py", "code", "python"),
    ]
    assert {d.metadata["licence"] for d in found} == {"MIT"}
    assert passed == {".png": 1}


def test_rows_of_code_and_names_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x = 1"}')
    [[part]], _ = plan_shards([Source(path=tmp_path / "a.jsonl", kind="code")])
    [document] = read_part(part, ReadOptions(), lambda _: None)
    assert document.metadata["kind"] == "code"
    (tmp_path / "in").mkdir()
    with open(bytes(tmp_path / "in") + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    os.mkfifo(tmp_path / "in/pipe.txt")
    [document] = read_documents(tmp_path / "in")
    assert document.id == "in/caf?.txt"


def test_large_files_are_divided_and_nothing_is_lost(file, tmp_path):
    path = file("a.jsonl", LINES)
    for size in (1, 30, 31, 32, 33, 100, 10_000):
        shards, _ = plan_shards([Source(path=path)], shard_bytes=size)
        found = [d for shard in shards for part in shard for d in read_part(part, ReadOptions(), lambda _: None)]
        assert [d.id for d in found] == [f"a.jsonl:{i}" for i in range(1, 21)], size
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=3)
    shards, _ = plan_shards([Source(path=tmp_path / "a.parquet")], shard_bytes=200)
    assert len(shards) > 2
    found = [d for shard in shards for part in shard for d in read_part(part, ReadOptions(), lambda _: None)]
    assert [d.id for d in found] == [f"a.parquet:{i}" for i in range(1, 21)]


def test_line_starts_agree_with_splitting(file):
    content = b"\n\nab\n" + b"c" * 200_000 + b"\n" + b"\n".join(b"%d" % i for i in range(9000))
    path = file("a.jsonl", content)
    for every in (1, 2, 7, 1000, 65536, 150_000):
        starts = line_starts(path, every)
        assert starts[0] == (0, 1)
        for offset, number in starts[1:]:
            assert content[offset - 1 : offset] == b"\n"
            assert content[:offset].count(b"\n") == number - 1
        stops = [offset for offset, _ in starts[1:]] + [len(content)]
        parts = [
            line
            for (start, number), stop in zip(starts, stops, strict=True)
            for line in read_lines(path, limit=10**6, start=start, stop=stop, number=number)
        ]
        assert [line for _, line, _ in parts] == content.split(b"\n")
        assert [number for number, _, _ in parts] == list(range(1, len(parts) + 1))


def test_missing_file(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        list(read_documents(tmp_path / "none.jsonl"))
    part = Part(path=tmp_path / "gone.jsonl", name="gone.jsonl", metadata={})
    rejects = []
    assert list(read_part(part, ReadOptions(), rejects.append)) == []
    assert "cannot be read" in rejects[0].reason


def test_parquet_holds_what_json_does_not(tmp_path):
    """Nested columns, and values that JSON has no word for, travel as text; a row that is no text is named."""
    day = datetime.timedelta(days=1)
    table = pa.table(
        {
            "text": ["a", None, "c"], "price": [decimal.Decimal("1.50")] * 3, "image": [b"\xff\x00"] * 3,
            "span": [day] * 3,
            "nested": [{"list": [1, None], "map": None}] * 3,
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    documents, bad = read(tmp_path / "a.parquet")
    assert bad == [(2, "field 'text' is not a string")]
    with store.document_writer(tmp_path, 0) as write:
        for document in documents:
            write(document)
    row = next(store.read_folder(tmp_path)).metadata["row"]
    assert row == {
        "price": "1.50", "image": "/wA=", "span": "1 day, 0:00:00", "nested": {"list": [1, None], "map": None}
    }  # fmt: skip


def test_parquet_text_that_is_no_utf8_costs_one_row(tmp_path):
    raw = pa.array([b"a", b"caf\xe9", b"c"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "a.parquet")
    documents, [(line, reason)] = read(tmp_path / "a.parquet")
    assert [(d.text, d.metadata["line"]) for d in documents] == [("a", 1), ("c", 3)]
    assert (line, reason) == (2, "the row holds a value that is no text, number or time")


def test_parquet_damaged_in_the_middle_names_the_row(tmp_path):
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcdefgh", k=500))} for _ in range(300)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(content)
    documents, [(line, reason)] = read(path)
    assert [d.metadata["line"] for d in documents] == [*range(1, 101), *range(201, 301)]
    assert line == 101
    assert reason.startswith("damaged Parquet")
    assert reason.endswith("; the rows up to 200 are lost")


def test_names_in_capitals_are_divided_alike(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "A.PARQUET", row_group_size=3)
    shards, _ = plan_shards([Source(path=tmp_path / "A.PARQUET")], shard_bytes=200)
    found = [d for shard in shards for part in shard for d in read_part(part, ReadOptions(), lambda _: None)]
    assert [d.id for d in found] == [f"A.PARQUET:{i}" for i in range(1, 21)]


@pytest.mark.parametrize("coding", [b"rot13", b"hex", b"undefined", b"unicode_escape"])
def test_codings_that_are_none(file, coding):
    documents, [(_, reason)] = read(file("a.py", b"# coding: " + coding + b"\n\xe9 = '\\ud800'\n"))
    assert documents == []
    assert reason == "the file is not UTF-8 and declares no other encoding"


def test_deep_nesting_is_named_and_passed_over(file):
    deep = b"[" * 400 + b"]" * 400
    documents, bad = read(file("a.jsonl", b'{"text": "a", "x": ' + deep + b'}\n{"text": "b"}\n'))
    assert [d.text for d in documents] == ["b"]
    assert bad == [(1, "a column is nested too deeply")]


def test_provenance_is_words(file):
    row = {"text": "t", "metadata": {"kind": 5, "licence": ["MIT"], "version": None, "source": "web", "more": [1]}}
    [document] = read_documents(file("a.jsonl", json.dumps(row).encode()))
    assert document.metadata["kind"] == "text"
    assert document.metadata["source"] == "web"
    assert document.metadata["more"] == [1]
    assert "licence" not in document.metadata
    assert document.metadata["row"] == {"metadata": {"kind": 5, "licence": ["MIT"]}}


def test_a_text_is_measured_in_bytes(tmp_path):
    pq.write_table(pa.table({"text": ["ü" * 60, "u" * 60]}), tmp_path / "a.parquet")
    documents, bad = read(tmp_path / "a.parquet", max_document=100)
    assert [d.text for d in documents] == ["u" * 60]
    assert bad == [(1, "the text is longer than 100 bytes")]


def test_the_name_of_a_file_tells_its_kind(tmp_path):
    for name in ("a.py", "b.md", "c.txt"):
        (tmp_path / name).write_text("x = 1")
    [shard], _ = plan_shards([Source(path=tmp_path, kind="code")])
    found = [d for part in shard for d in read_part(part, ReadOptions(), lambda _: None)]
    assert [d.metadata["kind"] for d in found] == ["code", "text", "text"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.txt").write_text("a")
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FileError, match=r"shut: cannot be read: Permission denied"):
        plan_shards([Source(path=tmp_path)])
