"""The same shards on a Ray cluster of two workers, one of which is killed at its work: the same bytes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.data import texts

from shoal.data.plan import Source
from shoal.data.prepare import prepare
from shoal.data.recipe import Recipe
from shoal.data.run import Machine
from shoal.data.steps import editing, standard_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for i, text in enumerate(texts.english()[:120]):
        (folder / f"{i:03}.txt").write_text(text)
    return folder


def deadly_once(recipe: Recipe):
    """The standard steps; the worker that meets one document first dies by SIGKILL, whoever meets it again lives."""
    marker = recipe.sources[0].path.parent / "struck"

    def strike(document):
        if document.id.endswith("077.txt") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return [*standard_steps(recipe), ("strike", editing(strike))]


def test_a_killed_ray_worker_changes_no_byte(source, tmp_path):
    pytest.importorskip("ray", minversion="2.40")
    recipe = Recipe(sources=(Source(path=source),), vocab_size=500, shard_bytes=20_000)
    (tmp_path / "struck").touch()
    prepare(recipe, tmp_path / "here", Machine(workers=1), steps=deadly_once)
    (tmp_path / "struck").unlink()
    prepare(recipe, tmp_path / "there", Machine(workers=2, engine="ray"), steps=deadly_once)
    assert (tmp_path / "struck").exists()
    assert len(list((tmp_path / "here/done/clean").iterdir())) >= 4

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(tmp_path / "there") == content(tmp_path / "here")
