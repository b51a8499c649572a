"""`info`, `models`, `pull` and `convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Result

from shoal.cli.console import human_bytes, human_count
from shoal.errors import FileError

Shoal = Callable[..., Result]


def test_info_of_the_machine(shoal: Shoal) -> None:
    result = shoal("info", "--json")
    facts = json.loads(result.out)
    assert result.err == ""
    assert facts["memory_bytes"] >= facts["memory_available_bytes"] > 0
    assert 1 <= facts["usable_threads"] <= facts["threads"]
    assert facts["isa"] in facts["isa_available"]
    assert "numpy" in facts["packages"]
    text = shoal("info")
    assert f"processor  {facts['cpu']}" in text.out
    assert text.err == ""


def test_info_of_a_model(shoal: Shoal) -> None:
    facts = json.loads(shoal("info", "smollm2-135m", "--json", "--context", "1000").out)
    assert facts["total_params"] == facts["active_params"] == 134_515_008
    assert facts["cache_bytes_per_token"] == 23_040
    assert facts["max_position_embeddings"] == 8192
    assert facts["flops_per_token"]["attention_over_context"] == 30 * 1000 * 4 * 576
    assert facts["stored_dtypes"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert facts["disk_bytes"] == Path(facts["path"]).stat().st_size
    text = shoal("info", "smollm2-135m").out
    assert "134.52 M" in text
    assert "23,040 bytes per token" in text


def test_models(shoal: Shoal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_MODELS", str(tmp_path))
    entries = json.loads(shoal("models", "--json").out)
    assert [entry["name"] for entry in entries] == ["shoal-code", "smollm2-135m"]
    table = shoal("models").out.splitlines()
    assert table[0].split() == ["NAME", "SIZE", "FORMAT", "LICENCE", "PATH"]
    assert [row.split()[0] for row in table[1:]] == ["shoal-code", "smollm2-135m"]
    assert Path(table[2].split()[-1]).is_file()


def test_no_models_says_how_to_get_one(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.hub.list_models", list)
    result = shoal("models")
    assert "shoal pull smollm2-135m" in result.err
    assert json.loads(shoal("models", "--json").out) == []


def test_pull_prints_the_path_and_reports_by_tenths(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(name: str, progress: Callable[[int, int], None]) -> Path:
        for done in range(1025):
            progress(done, 1024)
        return Path("/models/x.gguf")

    monkeypatch.setattr("shoal.hub.pull", pull)
    result = shoal("pull", "x")
    assert result.out == "/models/x.gguf\n"
    lines = result.err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "fetching x: 1.0 KiB of 1.0 KiB"
    assert json.loads(shoal("pull", "x", "--json").out) == {"name": "x", "path": "/models/x.gguf"}


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the conversion itself, which has its own tests: writes a file; fails for dtype `broken`."""
    calls: list[dict[str, Any]] = []

    def convert(
        src: Path, dst: Path, *, dtype: str, progress: Callable[[int, int], None], adapter: Path | None
    ) -> None:
        calls.append({"src": src, "dst": dst, "dtype": dtype, "adapter": adapter})
        if dtype == "broken":
            raise FileError(src, "is damaged")
        dst.write_bytes(b"new")
        progress(3, 3)

    monkeypatch.setattr("shoal.formats.convert.convert", convert)
    return calls


def test_convert(shoal: Shoal, converter: list[dict[str, Any]], tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    result = shoal("convert", "smollm2-135m", str(target), "--dtype", "q8_0", "--json")
    data = json.loads(result.out)
    assert (data["path"], data["dtype"], data["bytes"]) == (str(target), "q8_0", 3)
    assert converter[0]["src"].suffix == ".gguf"


def test_convert_refuses_to_overwrite_unless_forced(
    shoal: Shoal, converter: list[dict[str, Any]], tmp_path: Path
) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    result = shoal("convert", "smollm2-135m", str(target))
    assert result.code == 2
    assert "already exists" in result.error
    assert converter == []
    assert shoal("convert", "smollm2-135m", str(target), "--force").code == 0
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_replacement_keeps_what_was_there(
    shoal: Shoal, converter: list[dict[str, Any]], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "weights").write_bytes(b"old")
    result = shoal("convert", "smollm2-135m", str(target), "--force", "--dtype", "broken")
    assert result.code == 2
    assert (target / "weights").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_convert_never_replaces_its_own_source(shoal: Shoal, converter: list[dict[str, Any]], tmp_path: Path) -> None:
    source = tmp_path / "model" / "m.gguf"
    source.parent.mkdir()
    source.write_bytes(b"GGUF")
    for target in (source, source.parent, tmp_path):
        result = shoal("convert", str(source), str(target), "--force")
        assert result.code == 2
        assert "holds the source" in result.error
    assert source.read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (1 << 50, "1024.0 TiB")]
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (1500, "1.50 k"), (671_026_419_200, "671.03 B"), (2e12, "2.00 T")]
)
def test_human_count(count: float, text: str) -> None:
    assert human_count(count) == text
