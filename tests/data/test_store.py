"""Documents and what is known about them lie beside each other and cannot come apart unnoticed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")

from shoal.data import store  # noqa: E402
from shoal.data.document import Document  # noqa: E402
from shoal.errors import FileError  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    for shard in range(2):
        with store.document_writer(tmp_path, shard) as write:
            for i in range(3):
                write(Document(id=f"{shard}-{i}", text=f"text {i}\n", metadata={"licence": "MIT", "hash": "0"}))
    return tmp_path


def test_attributes_join_their_documents(folder):
    for shard in range(2):
        store.write_attributes(folder, "quality", shard, {"score": [shard + i / 10 for i in range(3)]})
    store.write_attributes(folder, "half", 0, {"other": [1, 2, 3]})
    found = list(store.read_folder(folder, ["quality"]))
    assert [(d.id, d.attributes) for d in found[2:4]] == [("0-2", {"score": 0.2}), ("1-0", {"score": 1.0})]
    assert found[0].metadata == {"licence": "MIT", "hash": "0"}
    assert store.attribute_names(folder) == ["quality"]


@pytest.mark.parametrize(
    "values",
    [
        [3, -1, 1 << 62], [3, None, 0] * 7, [0.5, float("nan"), -0.0], [None, 1.5], ["a", "", "ü\0"] * 5, [None, "b"],
        [None, None], [], [True, False], [[1.0], []], np.arange(4), np.arange(4, dtype=np.float32)[::2],
        np.array([1, 2], np.uint8), np.array([True, False]), np.array([np.nan, 1.0]),
    ],
    ids=repr,
)  # fmt: skip
def test_columns_are_those_that_arrow_makes(values):
    ours, theirs = store.column(values), pyarrow.array(values)
    ours.validate(full=True)
    assert ours.type == theirs.type
    assert ours.null_count == theirs.null_count
    assert repr(ours.to_pylist()) == repr(theirs.to_pylist())  # nan is nan
    assert store.texts([None, None]).equals(pyarrow.array([None, None], pyarrow.string()))


def test_attributes_are_written_and_read_without_pandas(folder):
    pytest.importorskip("pandas")
    code = (
        "import sys; from pathlib import Path; from shoal.data import store\n"
        f"folder = Path({str(folder)!r})\n"
        "store.write_attributes(folder, 'some', 0, {'a': [1, 2, None], 'b': [0.5, 1.5, 2.5], 'c': ['x', 'y', 'z']})\n"
        "store.write_verdict(folder, 'select', 0, [None, 'why', None])\n"
        "print(store.read_attributes(folder, 'some', 0), store.verdict_names(folder))\n"
        "print('pandas' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("False\n")


@pytest.mark.parametrize("rows", [2, 4])
def test_a_wrong_number_of_rows_is_found(folder, rows):
    store.write_attributes(folder, "quality", 0, {"score": [0.0] * rows})
    with pytest.raises(FileError, match=f"score .*{rows}"):
        list(store.read_shard(folder, 0, ["quality"]))


def test_missing_and_damaged_attributes(folder):
    with pytest.raises(FileError, match=r"quality/00001\.parquet: is missing"):
        store.read_attributes(folder, "quality", 1)
    store.write_attributes(folder, "quality", 1, {"score": [0.0] * 3})
    path = store.attribute_path(folder, "quality", 1)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FileError, match=r"quality/00001\.parquet: is damaged"):
        store.read_attributes(folder, "quality", 1)


def test_a_full_disk_is_named(tmp_path):
    code = (
        "import resource, signal; from pathlib import Path; from shoal.data import store\n"
        "import os; from shoal.data.document import Document\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try:\n"
        f"    with store.document_writer(Path({str(tmp_path)!r}), 0) as write:\n"
        "        for i in range(99): write(Document(id='a', text=os.urandom(1 << 14).hex()))\n"
        "except store.FileError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"{tmp_path}/documents/00000.jsonl.zst: cannot be written: " in done.stdout, done.stderr
    assert list((tmp_path / "documents").iterdir()) == []


def test_a_failed_writer_leaves_nothing(tmp_path):
    def fail() -> None:
        with store.document_writer(tmp_path, 0) as write:
            write(Document(id="a", text="b"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "documents").iterdir()) == []
    with pytest.raises(FileError, match="holds no documents"):
        store.shard_numbers(tmp_path)
