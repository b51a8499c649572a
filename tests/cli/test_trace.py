"""`shoal trace` from prompts to summary and timeline, on a tiny random model."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

pytest.importorskip("pyarrow")

import pyarrow.parquet as pq
from tests.cli.conftest import Result
from tests.server.test_end_to_end import Server
from tests.trace.tiny import CONFIG, tiny_folder

from shoal.cli.trace import read_prompts

Shoal = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("trace") / "tiny")


def prompts(tmp_path: Path, text: str, name: str = "prompts.txt") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_record_sum_up_compare_draw(shoal: Shoal, model: str, tmp_path: Path) -> None:
    asked = prompts(tmp_path, "The capital of France\n\nOne two three four five\n")
    first, second = str(tmp_path / "one.parquet"), str(tmp_path / "two.parquet")
    told = shoal("trace", model, "--prompts", asked, "--out", first, "--max-tokens", "6", "--json")
    assert told.code == 0, told.err
    facts = json.loads(told.out)
    table = pq.read_table(first)
    assert facts["tokens"] * 4 == table.num_rows
    words: dict[tuple[int, bool], str] = {}
    for row in table.filter(pq.read_table(first)["layer"].to_numpy() == 1).to_pylist():
        words[row["request"], row["generated"]] = words.get((row["request"], row["generated"]), "") + row["text"]
    assert (words[0, False], words[1, False]) == ("The capital of France", "One two three four five")
    assert words[0, True]
    lines = "".join(
        json.dumps(entry) + "\n" for entry in ("Hello there", {"messages": [{"role": "user", "content": "Hi"}]})
    )
    asked = prompts(tmp_path, lines, "more.jsonl")
    assert shoal("trace", model, "--prompts", asked, "--out", second, "--no-text").code == 0
    shown = shoal("trace", "summary", first, "--against", second)
    assert shown.code == 0
    head, *rest = shown.out.splitlines()
    assert head.split()[:3] == ["LAYER", "TOKENS", "MAXVIO"]
    assert [line.split()[0] for line in rest[:4]] == ["1", "2", "3", "4"]
    both = json.loads(shoal("trace", "summary", first, "--against", second, "--json").out)
    assert CONFIG.moe is not None
    assert [sum(layer["load"]) for layer in both["layers"]] == [facts["tokens"] * 4] * 4
    assert all(0 < layer["divergence"] < 1 for layer in both["drift"])
    drawn = tmp_path / "t.json"
    assert shoal("trace", "export", first, "--out", str(drawn), "--steps", "3").err == (
        f"{drawn}: 3 calls; the rest is left out, see --steps\n"
    )
    assert json.loads(drawn.read_text())["traceEvents"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_server_records_and_keeps_no_text_unless_asked(model: str, tmp_path: Path, keep: bool) -> None:
    folder = tmp_path / "traces"
    server = Server("--model", model, "--threads", "1", "--trace-dir", str(folder), *["--trace-text"] * keep)
    server.wait_ready()
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "ignore_eos": True}
    usage = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()["usage"]
    server.process.send_signal(signal.SIGTERM)
    code, _, said = server.ended()
    assert code == 0, said
    (path,) = folder.iterdir()
    table = pq.read_table(path)
    assert table.num_rows == 4 * (usage["total_tokens"] - 1)  # nothing reads the last token
    text = "".join(piece or "" for piece in table["text"].to_pylist())
    assert ("Hello" in text) == keep
    assert table["token"].null_count == (0 if keep else table.num_rows)


def test_a_server_without_experts_has_nothing_to_record(tmp_path: Path) -> None:
    code, _, said = Server("--model", "smollm2-135m", "--trace-dir", str(tmp_path / "traces")).ended()
    assert code == 2
    assert "has no experts" in said


def test_a_line_of_prompts_ends_at_its_newline_alone(tmp_path: Path) -> None:
    path = prompts(tmp_path, '{"prompt": "one\u2028two"}\r\n\n"three\x85four"\n', "p.jsonl")
    assert read_prompts(Path(path)) == ["one\u2028two", "three\x85four"]


def test_what_can_be_asked_wrongly(shoal: Shoal, model: str, tmp_path: Path) -> None:
    asked, out = prompts(tmp_path, "Hello\n"), str(tmp_path / "t.parquet")
    long = prompts(tmp_path, "fine\n" + "word " * 3000 + "\n", "long.txt")
    for arguments, problem in (
        (("trace",), "Missing argument"),
        (("trace", "summary"), "summary needs a recording"),
        (("trace", model), "--prompts and --out"),
        (("trace", model, "x.parquet", "--prompts", asked, "--out", out), "take recordings"),
        (("trace", model, "--prompts", str(tmp_path / "none"), "--out", out), "none: No such file"),
        (("trace", model, "--prompts", prompts(tmp_path, " \n", "e.txt"), "--out", out), "holds no prompt"),
        (("trace", model, "--prompts", prompts(tmp_path, '"a"\n{\n', "b.jsonl"), "--out", out), "line 2: is no JSON"),
        (("trace", model, "--prompts", prompts(tmp_path, '{"a":1}\n', "c.jsonl"), "--out", out), "line 1: must be"),
        (("trace", model, "--prompts", long, "--out", out), "long.txt: prompt 2: prompt: holds"),
        (("trace", model, "--prompts", asked, "--out", str(tmp_path / "no" / "t.parquet")), "cannot be written"),
        (("trace", "smollm2-135m", "--prompts", asked, "--out", out), "has no experts"),
        (("trace", "summary", asked), "is no Parquet file"),
        (("trace", "export", str(tmp_path / "gone.parquet")), "No such file"),
    ):
        failed = shoal(*arguments)
        assert failed.code == 2, arguments
        assert problem in failed.error
    assert not Path(out).exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
