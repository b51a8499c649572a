"""Text to calibrate on and to measure with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shoal.errors import FileError, ShoalError
from shoal.quant.texts import load_texts, windows


def test_the_builtin_text_is_large_and_its_parts_apart() -> None:
    texts = load_texts("builtin")
    assert len(texts.calibration) > 300_000 and len(texts.held_out) > 100_000
    lines = [{line for line in part.splitlines() if len(line) > 60} for part in texts]
    assert len(lines[0] & lines[1]) < 0.01 * len(lines[1])


def test_a_file_is_cut_once(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 10, encoding="utf-8")
    texts = load_texts(str(path))
    assert texts.calibration + texts.held_out == "abcdefghij" * 10
    assert len(texts.held_out) == 20


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "cannot be read"), (b" \n", "no text"), (b"ok \xff", "byte 3")]
)
def test_files_without_text(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=problem):
        load_texts(str(path))


def test_a_python_without_its_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ShoalError, match="name a text file instead"):
        load_texts("builtin")


@pytest.mark.parametrize(
    ("count", "length", "most", "starts"),
    [(100, 10, 30, [0, 30, 60]), (100, 10, 1000, list(range(0, 100, 10))), (25, 10, 20, [0, 10]), (7, 10, 20, [0]),
     (100, 10, 5, [0])],
)  # fmt: skip
def test_windows_are_spread_evenly(count: int, length: int, most: int, starts: list[int]) -> None:
    found = windows(range(count), length, most)
    assert [window[0] for window in found] == starts
    assert all(len(window) == min(length, count) for window in found)
    assert windows([], 10, 10) == []
