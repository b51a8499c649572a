"""Whole runs: the same bytes from any number of workers, after any interruption, within the memory that was given."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.data import texts

from shoal.data import store
from shoal.data.document import Document, Reject
from shoal.data.plan import Source
from shoal.data.prepare import pack_folder, prepare, read_recipe
from shoal.data.recipe import Recipe, load_recipe
from shoal.data.run import PRELOADED, Machine, WorkerError
from shoal.data.shards import open_shards
from shoal.data.steps import filtering, standard_steps
from shoal.data.vocabulary import load_tokenizer, train_tokenizer
from shoal.errors import ConfigError, FileError
from shoal.formats.atomic import sole_user

SECRET = "jane.doe@mail.company.org"
ALONE = Machine(workers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A corpus with planted faults, in two files and a source tree."""
    folder = tmp_path_factory.mktemp("source")
    rng = random.Random(0)
    english = texts.english()
    rows = [{"text": text} for text in english]
    rows += [{"text": english[i]} for i in range(5)]  # exact copies
    rows += [{"text": texts.edited(english[i], 0.02, rng)} for i in range(5, 10)]  # near copies
    rows += [{"text": "".join(rng.choices("abcdefghij0123456789+/", k=4000))} for _ in range(4)]  # noise
    rows += [{"text": f"Buy now number {i}. " * 60} for i in range(4)]  # repetition
    rows.append({"text": english[20] + f" Write to {SECRET} for more."})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:90])) + '\n{"text": "cut\n{"no": "text"}\n')
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows[90:])))
    for name, text in list(texts.code().items())[:30]:
        (folder / "code").mkdir(exist_ok=True)
        (folder / "code" / name).write_text(text)
    return folder


def recipe(source: Path, **options) -> Recipe:
    options = {"vocab_size": 600, "shard_bytes": 60_000, "near_duplicates": 0.7, **options}
    return Recipe(sources=(Source(path=source, name="all"),), **options)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a result; markers and the page, too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def result(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("result") / "out"
    prepare(recipe(source), folder, ALONE)
    return folder


def test_what_comes_out(source, result):
    summary = json.loads((result / "summary.json").read_bytes())
    dropped = {reason: row[0] for steps in (summary["clean"], summary["pack"]) for one in steps["dropped"].values()
               for reason, row in one.items()}  # fmt: skip
    assert dropped["the line is not JSON"] == 1
    assert dropped["the row has no field 'text'"] == 1
    assert dropped["duplicate: exact"] >= 5
    assert dropped["duplicate: near"] >= 5
    assert sum(row for reason, row in dropped.items() if reason.startswith("gopher")) >= 8
    assert summary["clean"]["masked"]["EMAIL"] >= 1
    assert list(summary["clean"]["steps"]) == ["read", "normalise", "licence", "language", "quality", "privacy"]
    for steps in (summary["clean"]["steps"], summary["pack"]["steps"]):
        for name, (before, _, after, _) in steps.items():
            lost = {**summary["clean"]["dropped"], **summary["pack"]["dropped"]}.get(name, {})
            if name != "read":
                assert before - after == sum(row[0] for row in lost.values()), name
    kept = [d for shard in store.shard_numbers(result) for d in store.read_kept(result, shard)]
    assert not any(SECRET in d.text for d in kept)
    assert {d.metadata["source"] for d in kept} == {"all"}
    assert all(re.fullmatch("[0-9a-f]{32}", d.metadata["hash"]) for d in kept)
    tokenizer = load_tokenizer(str(result / "tokenizer"))
    shards = open_shards(result / "tokens")
    assert shards.num_documents == len(kept)
    assert shards.provenance["recipe"]["seed"] == 0
    first = shards.read(0, shards.document_end(0))[0].tolist()
    assert first[-1] == tokenizer.eos_token_ids[0]
    assert tokenizer.decode(first[:-1]) == kept[0].text
    rejects = [json.loads(line) for path in (result / "rejects").iterdir() for _, line, _ in read_lines(path)]
    assert sorted((row["line"], row["step"]) for row in rejects) == [(91, "read"), (92, "read")]


def read_lines(path):
    from shoal.data.streams import read_lines

    return read_lines(path, limit=1 << 20)


def test_workers_change_no_byte(source, result, tmp_path):
    prepare(recipe(source), tmp_path / "out", Machine(workers=2))
    assert content(tmp_path / "out") == content(result)


def test_what_workers_share_is_there():
    """The server passes over what it cannot import: each worker would import it for itself."""
    assert all(importlib.import_module(name) for name in PRELOADED)


def test_a_killed_run_goes_on_and_ends_the_same(source, result, tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, os, signal; from pathlib import Path\n"
        "from shoal.data import run, prepare, recipe; from shoal.data.plan import Source\n"
        "def notice(stage, done, total):\n"
        "    if stage == 'clean' and done == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sources = (Source(path=Path({str(source)!r}), name='all'),)\n"
        "r = recipe.Recipe(sources=sources, vocab_size=600, shard_bytes=60_000)\n"
        f"prepare.prepare(r, {str(out)!r}, run.Machine(workers=1), notice=notice)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    markers = sorted((out / "done/clean").iterdir())
    assert len(markers) == 2
    (out / "documents/.00002.jsonl.zst.0123abcd.partial").write_text("what a killed worker leaves")
    before = markers[0].stat().st_mtime_ns
    prepare(recipe(source), out, ALONE)
    assert markers[0].stat().st_mtime_ns == before
    assert content(out) == content(result)
    stages: list[str] = []
    prepare(recipe(source), out, ALONE, notice=lambda stage, *_: stages.append(stage))
    assert stages == ["report"]  # nothing is done twice
    assert content(out) == content(result)


def test_later_fields_may_change_others_not(source, result, tmp_path):
    out = tmp_path / "out"
    prepare(recipe(source, vocab_size=None), out, ALONE)
    assert not (out / "tokens").exists()
    stages: list[str] = []
    prepare(recipe(source, band=(0.1, 0.9)), out, ALONE, notice=lambda stage, *_: stages.append(stage))
    assert "clean" not in stages
    banded = open_shards(out / "tokens").num_documents
    assert banded < open_shards(result / "tokens").num_documents
    prepare(recipe(source), out, ALONE)
    assert content(out / "tokens") == content(result / "tokens")
    assert content(out)["summary.json"] == content(result)["summary.json"]  # nothing of the band is left in it
    prepare(recipe(source, band=(0.1, 0.9)), out, ALONE)
    assert open_shards(out / "tokens").num_documents == banded
    with pytest.raises(FileError, match=r"another recipe \(rules differ\)"):
        prepare(recipe(source, rules=("c4",)), out, ALONE)
    (source / "new.txt").write_text("new")
    try:
        with pytest.raises(FileError, match="files were added or removed"):
            prepare(recipe(source), out, ALONE)
    finally:
        (source / "new.txt").unlink()


def test_a_new_verdict_packs_less(source, result, tmp_path):
    out = tmp_path / "out"
    prepare(recipe(source), out, ALONE)
    for shard in store.shard_numbers(out):
        rows = list(store.read_shard(out, shard))
        store.write_verdict(out, "select", shard, [None if i % 2 else "select: not chosen" for i in range(len(rows))])
    again = pack_folder(out, ALONE)
    assert 0 < again.kept < open_shards(result / "tokens").num_documents
    assert open_shards(out / "tokens").num_documents == again.kept


def test_a_pipeline_of_ones_own(source, tmp_path):
    prepare(recipe(source, vocab_size=None), tmp_path / "out", Machine(workers=2), steps=only_short)
    kept = list(store.read_folder(tmp_path / "out"))
    assert kept
    assert max(len(d.text) for d in kept) < 2000
    summary = json.loads((tmp_path / "out/summary.json").read_bytes())
    assert "long" in summary["clean"]["dropped"]["short"]


def only_short(recipe: Recipe):
    return [
        *standard_steps(recipe)[:1],
        ("short", filtering("short", lambda d: "long" if len(d.text) >= 2000 else None)),
    ]


def test_rejects_on_demand_and_permissive_licences(source, tmp_path):
    prepare(recipe(source, vocab_size=None, keep_rejects=True, licences="permissive"), tmp_path / "out", ALONE)
    rejects = [
        Reject(**json.loads(line)) for path in (tmp_path / "out/rejects").iterdir() for _, line, _ in read_lines(path)
    ]
    assert {r.reason for r in rejects if r.step == "licence"} == {"licence: unknown"}
    assert all(r.text for r in rejects if r.step == "licence")


@pytest.mark.parametrize("workers", [1, 2])
def test_strict_stops_at_the_first_bad_line(source, tmp_path, workers):
    with pytest.raises(FileError, match=r"a\.jsonl: line 91: the line is not JSON") as found:
        prepare(recipe(source, strict=True), tmp_path / "out", Machine(workers=workers))
    assert (found.value.path.name, found.value.item) == ("a.jsonl", "line 91")


def test_a_stage_cut_off_under_other_settings_is_done_again(source, result, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(recipe(source), out, ALONE)
    writing = store.write_verdict

    def half(folder, name, shard, *rest):
        if shard == store.shard_numbers(folder)[-1]:
            raise KeyboardInterrupt
        writing(folder, name, shard, *rest)

    monkeypatch.setattr(store, "write_verdict", half)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe(source, near_duplicates=0), out, ALONE)
    monkeypatch.undo()
    prepare(recipe(source), out, ALONE)
    assert content(out) == content(result)


@pytest.mark.parametrize(
    "lost", ["documents/00001.jsonl.zst", "attributes/duplicates", "tokens", "signatures/00000.npy"]
)
def test_what_was_removed_is_made_again(source, result, tmp_path, lost):
    out = tmp_path / "out"
    shutil.copytree(result, out)
    shutil.rmtree(out / lost) if (out / lost).is_dir() else (out / lost).unlink()
    if "." in lost:
        with pytest.raises(FileError, match=rf"{lost}: is missing"):
            pack_folder(out, ALONE)
    prepare(recipe(source), out, ALONE)
    assert content(out) == content(result)


def test_a_folder_left_by_a_killed_writer_is_removed(source, result, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(result, out)
    shutil.rmtree(out / "tokens")
    (out / ".tokenizer.0123abcd.partial").mkdir()
    (out / ".tokenizer.0123abcd.partial/tokenizer.json").write_text("{")
    prepare(recipe(source), out, ALONE)
    assert content(out) == content(result)


def test_one_run_a_folder(source, result, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(result, out)
    with sole_user(out):
        for attempt in (lambda: prepare(recipe(source), out, ALONE), lambda: pack_folder(out, ALONE)):
            with pytest.raises(FileError, match="another run is at work here"):
                attempt()
    prepare(recipe(source), out, ALONE)


def test_a_refused_run_leaves_nothing(source, tmp_path):
    out = tmp_path / "out"
    for wrong in (
        Recipe(sources=(Source(path=tmp_path / "none"),)),
        recipe(source, evaluations=(tmp_path / "none.jsonl",)),
    ):
        with pytest.raises(FileError, match="no such file"):
            prepare(wrong, out, ALONE)
    with pytest.raises(ConfigError, match=r"out: .* lies inside"):
        prepare(recipe(source), source / "out", ALONE)
    assert not out.exists()
    assert not (source / "out").exists()


def test_evaluation_sets_may_not_change_between_runs(source, tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"question": texts.english()[30]}))
    given = recipe(source, vocab_size=None, evaluations=(items,))
    prepare(given, tmp_path / "out", ALONE)
    items.write_text(json.dumps({"question": texts.english()[31]}))
    with pytest.raises(FileError, match="the content of evaluation sets differ"):
        prepare(given, tmp_path / "out", ALONE)


def test_an_input_file_may_not_change_between_runs_even_at_equal_size_and_time(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    path = source / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.english()[:3]))
    given = recipe(source, vocab_size=None)
    prepare(given, out, ALONE)
    old, before = path.read_text(), path.stat()
    path.write_text(old.replace("e", "o", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FileError, match=r"other input: .*a\.jsonl has changed since"):
        prepare(given, out, ALONE)
    path.write_text(old)  # the same content at another time is the same
    prepare(given, out, ALONE)
    (source / "b.jsonl").write_text(old)
    with pytest.raises(FileError, match="files were added or removed"):
        prepare(given, out, ALONE)


def test_another_tokenizer_in_the_same_place_is_seen(source, result, tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine"
    shutil.copytree(result, out)
    shutil.copytree(result / "tokenizer", mine)
    pack_folder(out, ALONE, tokenizer=str(mine))
    shutil.rmtree(mine)
    train_tokenizer(texts.english(), mine, vocab_size=300)
    pack_folder(out, ALONE, tokenizer=str(mine))
    assert open_shards(out / "tokens").vocab_size == 300


def test_a_result_is_a_source(source, result, tmp_path):
    """Its documents are read again, not its rejects or attributes, and say where they came from first."""
    again = Recipe(sources=(Source(path=result, name="again"),), rules=("none",), near_duplicates=0)
    found = prepare(again, tmp_path / "out", ALONE)
    before = list(store.read_folder(result))
    assert (found.read, found.unreadable) == (len(before), 0)
    after = list(store.read_folder(tmp_path / "out"))
    assert {d.metadata["source"] for d in after} == {"all"}
    assert {d.id for d in after} == {d.id for d in before}


def test_memory_is_checked_and_holds(tmp_path):
    with pytest.raises(ConfigError, match="memory: must be at least"):
        Machine(memory=100 << 20).share(48 << 20)
    assert Machine(workers=8, memory=1 << 30).share(48 << 20)[0] == 2
    text = "\n".join(json.dumps({"text": f"{i} " + texts.english()[i % 100] * 3}) for i in range(700))
    (tmp_path / "big.jsonl").write_text(text)
    code = (
        "from pathlib import Path\n"
        "from shoal.data import run, prepare, recipe; from shoal.data.plan import Source\n"
        "if __name__ == '__main__':\n"
        f"    r = recipe.Recipe(sources=(Source(path=Path({str(tmp_path / 'big.jsonl')!r})),), max_document=1 << 20,\n"
        "        shard_bytes=1 << 19, rules=('gopher',))\n"
        f"    prepare.prepare(r, {str(tmp_path / 'out')!r}, run.Machine(workers=2, memory=900 << 20))\n"
    )
    (tmp_path / "go.py").write_text(code)
    process = subprocess.Popen([sys.executable, str(tmp_path / "go.py")])
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0
    assert 0 < peak < 900 << 20


def test_one_giant_document_is_packed_within_the_memory_or_refused(result, tmp_path):
    """Tokenizing costs more than cleaning: how much is told before a worker is killed for it."""
    text = " ".join(str(i) for i in range(170_000))
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}))
    given = Recipe(
        sources=(Source(path=tmp_path / "one.jsonl"),), rules=("none",), tokenizer=str(result / "tokenizer"),
        max_document=1 << 21,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"memory: must be at least \d+ MiB, \d+ of them for the largest document"):
        prepare(given, tmp_path / "out", Machine(workers=1, memory=600 << 20))
    least = 384 + 640 * len(text) // (1 << 20) + 1
    assert prepare(given, tmp_path / "out", Machine(workers=1, memory=least << 20)).tokens > 170_000


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its children, shared pages counted once."""
    import psutil

    try:
        every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(one.memory_full_info().pss for one in every)
    except psutil.Error:
        return 0


def test_a_worker_out_of_memory_is_named(source, tmp_path):
    with pytest.raises(WorkerError, match="memory"):
        prepare(recipe(source), tmp_path / "out", Machine(workers=1, memory=800 << 20), steps=greedy)


def greedy(recipe: Recipe):
    def take(document: Document) -> None:
        document.attributes["much"] = bytearray(2 << 30)

    return [("greedy", filtering("greedy", take))]


def test_a_killed_worker_is_named(source, tmp_path):
    with pytest.raises(WorkerError, match="was killed"):
        prepare(recipe(source), tmp_path / "out", Machine(workers=2), steps=deadly)


def deadly(recipe: Recipe):
    return [("deadly", filtering("deadly", lambda document: os.kill(os.getpid(), 9)))]


def test_recipe_files(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'rules = ["gopher", "code"]\nnear-duplicates = 0.8\nband = [0.1, 0.9]\n'
        '[[sources]]\npath = "texts"\nlicence = "CC0-1.0"\nversion = "2"\n[[sources]]\npath = "more.jsonl"\n'
    )
    found = load_recipe(path)
    assert found.sources[0] == Source(path=tmp_path / "texts", licence="CC0-1.0", version="2")
    assert (found.rules, found.near_duplicates, found.band) == (("gopher", "code"), 0.8, (0.1, 0.9))
    for text, message in (
        ('rulez = ["c4"]', "rulez: unknown field, did you mean rules"),
        ('sources = ["a"]\nrules = ["x"]', "rules: must be of"),
        ("sources = [1]", "each of sources must be a path"),
        ("sources = []", "sources: must name at least one"),
        ('sources = ["a", "b/a"]', "two are called 'a'"),
        ('sources = ["a"]\nband = [0.9, 0.1]', "band: must be two rising numbers"),
        ('sources = ["a"]\nseed = ', "is not valid TOML"),
        ('sources = ["a"]\nnear_duplicates = "x"', "wrong type"),
        ("sources = 5", "wrong type"),
        ('sources = "a"\nlanguages = 5', "wrong type"),
        ('sources = "a"\nstrict = "false"', "strict: must be a bool, got 'false'"),
        ('sources = "a"\nseed = -1', "seed: must be at least 0"),
    ):
        path.write_text(text)
        with pytest.raises((FileError, ConfigError), match=message):
            load_recipe(path)


def test_the_folder_remembers_its_recipe(source, result, tmp_path):
    assert read_recipe(result) == recipe(source)
    with pytest.raises(FileError, match=r"holds no recipe\.json"):
        read_recipe(source)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileError, match="not empty"):
        prepare(recipe(source), tmp_path, ALONE)
