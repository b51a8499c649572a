"""Reading: every format gives the same documents, and everything unreadable is named with its line (case by case)."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
        ("a.jsonl.gz", gzip.compress(b"{}")[:-9] + b"xxxxxxxxx", "the compressed stream is damaged"),
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
        ("a.txt.gz", gzip.compress("grün".encode())),
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
