"""A whole proof in miniature: cells, files, resuming, what is said; and the small models under it."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from tests.data.test_select import _pieces, _rows, texts

from shoal.cli.main import main
from shoal.data.plan import Source
from shoal.data.prepare import prepare
from shoal.data.recipe import Recipe
from shoal.data.run import Machine
from shoal.data.select import run
from shoal.errors import ConfigError
from shoal.prove import run as proof
from shoal.prove.cells import EPOCHS, Plan, Results, make_cells, run_cell
from shoal.prove.completion import bleu, complete, exact_match, make_cases
from shoal.prove.page import render
from shoal.prove.proxy import Makers, Size, Student, blocks

SMALL = Size(layers=1, width=32, context=32, batch=4, warmup=2, windows=16)
PLAN = Plan(
    methods=("random", "perplexity", "preselect", "adversarial"), seeds=2, tokens=1024, epochs=0.1, proxy_tokens=512,
    rounds=2, cases=12, size=SMALL,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("prove")
    english = [{"id": f"en{i}", "text": text} for i, text in enumerate(texts.english()[:60])]
    sources = (
        Source(path=_rows(home / "english.jsonl", english)), Source(path=_rows(home / "python.jsonl", _pieces(12)))
    )  # fmt: skip
    recipe = Recipe(sources=sources, vocab_size=400, rules=("none",), mask_pii=False, identify_language=False)
    prepare(recipe, home / "folder", Machine(workers=1))
    _rows(home / "target.jsonl", _pieces(12, start=30))
    _rows(home / "held_out.jsonl", _pieces(8, start=60))
    return home


@pytest.fixture(scope="module")
def ground(home):
    return run.open_ground(home / "folder", [home / "target.jsonl"], [home / "held_out.jsonl"])


@pytest.fixture(scope="module")
def proven(ground, tmp_path_factory):
    out = tmp_path_factory.mktemp("proof")
    return out, proof.prove(ground, PLAN, out, "shoal data prove …")


def _student(ground, seed=0, steps=0):
    end = ground.tokenizer.eos_token_ids[0]
    return Student(SMALL, ground.pool, ground.judge, ground.tokenizer.vocab_size, end, seed, steps)


def test_blocks_read_every_token_once_a_pass(ground):
    numbers = np.array([3, 5, 8])
    whole = ground.pool.lengths_N[numbers].sum()
    size = Size(layers=1, width=32, context=16, batch=1)
    rows = np.concatenate(list(blocks(ground.pool, numbers, int(whole), size, seed=1)))
    assert rows.shape[1] == 17 and len(rows) == whole // 16
    seen = np.bincount(rows[:, 1:].ravel(), minlength=400)
    wanted = np.bincount(np.concatenate([ground.pool.ids(n) for n in numbers]), minlength=400)
    assert np.abs(seen - wanted).sum() <= 2 * 17  # but for the first token and what does not fill a row
    steps = list(blocks(ground.pool, numbers, 3 * int(whole), size, seed=1))
    assert len(steps) == 3 * whole // 16


def test_students_learn_fork_and_repeat(ground):
    python = np.flatnonzero(ground.pool.sources_N == "python.jsonl")
    one, two = _student(ground), _student(ground)
    before = one.loss()
    for student in (one, two):
        student.read(python, 25 * SMALL.step_tokens)
    assert one.loss() < before - 0.3 and one.loss() == two.loss()
    twin = one.fork()
    loss = one.loss()
    twin.read(python, 5 * SMALL.step_tokens)
    assert one.loss() == loss != twin.loss()
    one.read(python, 5 * SMALL.step_tokens)  # what was forked goes the same way
    assert one.loss() == twin.loss()


def test_surprise_is_bits_a_byte_of_the_beginning(ground):
    student = _student(ground)
    numbers = np.array([0, 1, 2])
    found = student.surprise(numbers)
    for number, bits in zip(numbers.tolist(), found.tolist(), strict=True):
        ids = torch.from_numpy(ground.pool.ids(number)[: SMALL.context + 1])
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            logits = student.model(ids[None, :-1]).float()[0]
        nats = float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        size = ground.pool.sizes_N[number] * SMALL.context / ground.pool.lengths_N[number]
        assert bits == pytest.approx(nats / np.log(2) / size, rel=0.01)


def test_lines_are_cut_where_lines_begin(ground):
    cases = make_cases(ground.held_out, range(len(ground.held_out)), ground.tokenizer, prompt=24, count=10)
    assert cases.prompts_BP.shape == (len(cases.lines), 24) and 1 <= len(cases.lines) <= 10
    everything = [document.text for document in run.read_texts([ground.folder.parent / "held_out.jsonl"])]
    for prompt, line in zip(cases.prompts_BP, cases.lines, strict=True):
        text = ground.tokenizer.decode(prompt.tolist())
        assert text.endswith("\n") and any(text[-20:] + line + "\n" in whole for whole in everything)
    answers = complete(_student(ground).model, ground.tokenizer, cases.prompts_BP, batch=3)
    assert len(answers) == len(cases.lines) and not any("\n" in answer for answer in answers)
    alone = complete(_student(ground).model, ground.tokenizer, cases.prompts_BP[:1])
    assert alone[0] == answers[0]


def test_exact_match_and_bleu():
    lines = ["return self.x + 1", "    for i in range(3):"]
    assert exact_match([" return self.x + 1 ", "for j in range(3):"], lines) == 0.5
    assert bleu(lines, lines) == pytest.approx(100)
    assert bleu(["zzz", "qqq"], lines) < 5 < bleu(["return self.y + 1", "for i in range(4):"], lines) < 100


def test_cells_are_counted_in_tokens():
    cells = make_cells(Plan(methods=("random",), seeds=2, tokens=None), 1000)
    assert [(cell.arm, cell.regime, cell.tokens) for cell in cells[:4]] == [
        ("whole", "equal tokens", 1000), ("whole", "equal epochs", 1000), ("random", "equal tokens", 1000),
        ("random", "equal epochs", 100),
    ]  # fmt: skip
    assert {cell.seed for cell in cells[:4]} == {0} and len(cells) == 8
    assert len({cell.name for cell in cells}) == 8


def test_what_a_proof_holds(proven, ground):
    out, _ = proven
    stored = json.loads((out / "proof.json").read_bytes())
    assert stored["version"] == 1 and stored["done"] == stored["of"] == 20 == len(stored["cells"])
    assert set(stored["arms"]) == {"equal tokens", "equal epochs"} == set(stored["selected_less_other"])
    for regime, arms in stored["arms"].items():
        assert list(arms) == ["whole", *PLAN.methods]
        for arm, measures in arms.items():
            cells = [one for one in stored["cells"] if one["arm"] == arm and one["regime"] == regime]
            assert [one["seed"] for one in cells] == [0, 1]
            assert measures["loss"]["mean"] == pytest.approx(np.mean([one["loss"] for one in cells]))
            assert measures["loss"]["low"] <= measures["loss"]["mean"] <= measures["loss"]["high"]
            assert all(one["read"] <= max(one["tokens"], SMALL.step_tokens) for one in cells)
            assert all(0 <= one["exact"] <= 1 and one["curve"][-1][1] == one["loss"] for one in cells)
    whole = stored["arms"]["equal tokens"]["whole"]["loss"]["mean"]
    mine = stored["arms"]["equal tokens"]["adversarial"]["loss"]["mean"]
    assert stored["selected_less_other"]["equal tokens"]["whole"]["loss"]["mean"] == pytest.approx(mine - whole)
    for method in PLAN.methods:
        for selection in stored["selections"][method]:
            assert selection["tokens"] <= selection["budget"] == int(0.1 * ground.pool.tokens)
    assert len(stored["statements"]) == 2 * 4 * 3
    page = (out / "proof.html").read_text()
    assert all(said.split(": ")[0] in page for said in stored["statements"])
    assert not re.search(r"<script|src=|href=", page)


def test_statements_follow_the_numbers(proven):
    """Sentences turn with the sign of the difference, and claim nothing that the interval does not."""
    base = {"whole": {"loss": {"mean": 2.0}}, "adversarial": {"loss": {"mean": 1.9}}}

    def said(mean, low, high, count=3):
        found = {"mean": mean, "low": low, "high": high, "values": count}
        return proof.statements({"equal tokens": {"whole": {"loss": found}}}, {"equal tokens": base})[0]

    assert "whole 2.0000: better (difference" in said(-0.1, -0.2, -0.05)
    assert ": worse (difference" in said(0.1, 0.05, 0.2)
    assert "not told apart (by the mean better)" in said(-0.1, -0.3, 0.1)
    assert "not told apart (by the mean not better)" in said(0.1, -0.1, 0.3)
    assert "whole 2.0000: the same (" in said(0.0, 0.0, 0.0)
    assert "not better in the only seed" in said(0.1, float("nan"), float("nan"), 1)


def test_a_proof_goes_on_cell_by_cell(proven, ground, tmp_path, monkeypatch):
    out, data = proven
    for path in (out / "cells").iterdir():
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / path.name).write_bytes(path.read_bytes())
    gone = "adversarial_equal-tokens_1"
    (tmp_path / "cells" / f"{gone}.json").unlink()
    ran = []
    monkeypatch.setattr(proof, "run_cell", lambda *args, real=proof.run_cell: ran.append(args[2].name) or real(*args))
    again = proof.prove(ground, PLAN, tmp_path, "shoal data prove …")
    assert ran == [gone]
    assert again["arms"] == data["arms"]  # the cell came out the same to the last bit
    other = Results(tmp_path, "another key")
    assert other.get("whole_equal-tokens_0") is None


def test_an_unfinished_proof_has_a_page(proven, ground, tmp_path):
    cells = make_cells(PLAN, ground.pool.tokens)
    data = proof.summarise(ground, PLAN, cells, Results(tmp_path, "k"), tmp_path, "shoal data prove …")
    assert data["done"] == 0 and data["statements"] == []
    assert "Nothing can be said yet" in render(json.loads((tmp_path / "proof.json").read_bytes()))


def test_proxies_of_another_size_are_another_key(ground):
    assert repr(Makers(SMALL, 10, ground)) != repr(Makers(Size(), 10, ground)) != repr(Makers(Size(), 11, ground))


def test_the_command_line(home, capsys, tmp_path):
    def shoal(*args):
        with pytest.raises(SystemExit) as ended:
            main(["data", *map(str, args)])
        return ended.value.code, *capsys.readouterr()

    target, held = ("--target", home / "target.jsonl"), ("--held-out", home / "held_out.jsonl")
    code, out, _ = shoal("select", home / "folder", *target, *held, "--method", "dsir", "--json")
    found = json.loads(out)
    assert code == 0 and found["method"] == "dsir" and found["tokens"] <= found["budget"]
    assert (home / "folder" / "selection.html").is_file()
    code, out, _ = shoal("prove", home / "folder", *target, *held, "--out", tmp_path / "p", "--width", "32", "--plan")
    assert code == 0 and "48 cells" in out and not (tmp_path / "p").exists()
    code, _, err = shoal("select", home / "folder", *target, "--share", "200%")
    assert code == 2 and "share: must be a share such as 10% or 0.1, got '200%'" in err
    code, _, err = shoal("select", home / "folder", *target, "--method", "magic")
    assert code == 2 and "method: must be one of random" in err
    code, _, err = shoal("prove", home / "folder", *target, *target[:0], "--held-out", home / "target.jsonl", "-o", "p")
    assert code == 2 and "overlap the held-out set (the same text)" in err


def test_impossible_plans(ground):
    with pytest.raises(ConfigError, match="width: must be a multiple of 32"):
        Size(width=33)
    with pytest.raises(ConfigError, match="seeds"):
        Plan(seeds=0)
    with pytest.raises(ConfigError, match="epochs"):
        Plan(epochs=0)
    for methods in (("random", "dsri"), ("whole",), ("dsir", "dsir")):
        with pytest.raises(ConfigError, match=rf"methods: must be of random, .*, each once, got '{methods[-1]}'"):
            Plan(methods=methods)


def test_equal_epochs_are_of_what_was_found(ground):
    """A method that finds less than its share goes over that as often as the others over theirs."""
    plan = dataclasses.replace(PLAN, epochs=1.0)
    cell = next(one for one in make_cells(plan, ground.pool.tokens) if (one.arm, one.regime) == ("random", EPOCHS))
    picked_N = np.zeros(len(ground.pool), bool)
    picked_N[np.flatnonzero(ground.pool.alive_N)[:2]] = True
    found = run_cell(ground, plan, cell, picked_N, None)
    assert found["text_tokens"] < cell.tokens / 2
    assert 0.5 < found["passes"] <= 1
