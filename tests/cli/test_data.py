"""`shoal data` as it is typed: exit codes, one JSON object, sizes, and what can be asked wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Result

from shoal.cli.data import parse_size
from shoal.errors import ConfigError

Shoal = Callable[..., Result]
TEXT = " ".join(
    f"Sentence {i} of the text that we have to be there with says a thing of its own, word{i}." for i in range(12)
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{TEXT} Row {i} ends with another word{i * 7}."}) for i in range(8)))
    return path


def test_prepare_report_pack_and_tokenizer(shoal: Shoal, rows: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = shoal(
        "data", "prepare", str(rows), "--out", out, "--near", "0", "--rules", "none", "--workers", "1", "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"folder": out, "read": 8, "kept": 8, "tokens": 0, "unreadable": 0}
    page = (tmp_path / "out/report.html").read_text()
    assert "What became of the text" in page
    assert "http" not in page.replace("http-equiv", "")  # it loads nothing
    done = shoal("data", "pack", out, "--vocab-size", "400", "--workers", "1", "--json")
    assert json.loads(done.out)["tokens"] > 100
    assert (tmp_path / "out/tokens/index.json").is_file()
    done = shoal("data", "tokenizer", out, "--out", str(tmp_path / "own"), "--vocab-size", "300")
    assert done.code == 0
    assert (tmp_path / "own/tokenizer.json").is_file()
    assert shoal("data", "report", out).out.strip() == f"{out}/report.html"
    assert json.loads(shoal("data", "report", out, "--json").out)["clean"]["steps"]["read"][0] == 8


def test_nothing_to_read_is_a_result(shoal: Shoal, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    done = shoal(
        "data", "prepare", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "out"), "--vocab-size", "300",
        "--band", "0.1,0.9", "--workers", "1", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["kept"] == 0
    assert (tmp_path / "out/report.html").is_file()


def test_dedupe_finds_copies(shoal: Shoal, rows: Path, tmp_path: Path) -> None:
    done = shoal("data", "dedupe", str(rows), "--out", str(tmp_path / "out"), "--workers", "1", "--json")
    assert json.loads(done.out)["kept"] == 1  # the rows differ by a few words each


def test_an_unreadable_row_is_said_by_the_exit_code(shoal: Shoal, rows: Path, tmp_path: Path) -> None:
    rows.write_text(rows.read_text() + "\nbroken\n")
    done = shoal("data", "prepare", str(rows), "--out", str(tmp_path / "out"), "--workers", "1")
    assert done.code == 3
    assert "1 rows or files could not be read" in done.err
    done = shoal("data", "prepare", str(rows), "--out", str(tmp_path / "strict"), "--workers", "1", "--strict")
    assert done.code == 2
    assert "rows.jsonl: line 9: the line is not JSON" in done.err


def test_a_plan_without_doing_it(shoal: Shoal, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('sources = ["rows.jsonl"]\nrules = ["c4"]\nseed = 3\n')
    done = shoal("data", "prepare", "--recipe", str(path), "--out", str(tmp_path / "out"), "--seed", "4", "--dry-run")
    plan = json.loads(done.out)
    assert (plan["recipe"]["rules"], plan["recipe"]["seed"]) == (["c4"], 4)
    assert (plan["shards"], plan["files"], plan["bytes"]) == (1, 1, rows.stat().st_size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name at least one file or folder"),
        (("nothing.jsonl",), "there is no such file or folder"),
        (("{rows}", "--rules", "gofer"), "must be of auto, gopher"),
        (("{rows}", "--band", "high"), "must be numbers with commas"),
        (("{rows}", "--memory", "much"), "must be a size such as 512M"),
        (("{rows}", "--memory", "10M"), "must be at least"),
        (("{rows}", "--engine", "spark"), "must be processes or ray"),
        (("{rows}", "--vocab-size", "300", "--tokenizer", "smollm2-135m"), "trains a tokenizer"),
    ],
)
def test_wrong_questions(shoal: Shoal, rows: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    filled = [arg.replace("{rows}", str(rows)) for arg in args]
    done = shoal("data", "prepare", *filled, "--out", str(tmp_path / "out"))
    assert done.code == 2
    assert message in done.err


def test_sizes() -> None:
    assert parse_size("memory", "1.5G") == parse_size("memory", "1536 MiB") == 1536 << 20
    assert parse_size("memory", "100") == 100
    assert parse_size("memory", None) is None
    with pytest.raises(ConfigError, match="memory"):
        parse_size("memory", "-1G")
