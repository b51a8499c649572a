"""`shoal cost train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli.main import main

ROOT = Path(__file__).parents[2]
STEPS = 1500  # of recipes/code
V3 = str(ROOT / "recipes" / "deepseek-v3")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["cost", "train", *arguments])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_a_published_model(capsys):
    code, out, _ = run(capsys, V3, "--tokens", "14.8T@4096", "--machine", "h800", "--devices", "2048", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["phases"][0]["tokens"] == 14.8e12
    assert facts["device_hours"] == pytest.approx(2.664e6, rel=0.1)
    assert facts["days"] * 24 * 2048 == pytest.approx(facts["device_hours"])
    assert facts["machine"]["sources"]["utilisation"] and facts["params"] > 671e9


def test_two_phases_and_other_assumptions_for_people(capsys):
    more = ["--tokens", "1T", "--tokens", "2B@131072", "--machine", "h800", "--utilisation", "0.5", "--price", "3"]
    code, out, _ = run(capsys, V3, *more)
    assert code == 0
    assert "131072" in out and "50.0% of 989.4 TFLOPS in bf16: as given" in out and "NVIDIA H800" in out


def test_a_recipe_and_its_run(capsys, tmp_path):
    pytest.importorskip("torch")
    recipe = str(ROOT / "recipes" / "code")
    records = [{"step": n, "loss": 5.0, "tok_s": 644.0, "seconds": 12.72} for n in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, _ = run(capsys, recipe, "--run", str(tmp_path), "--json")
    facts = json.loads(out)
    assert code == 0
    early, late = facts["phases"]
    assert (early["tokens"], late["tokens"]) == (0.75 * STEPS * 4096, 0.25 * STEPS * 4096)
    assert "mtp_head" in late["flops_per_token"] and "mtp_head" not in early["flops_per_token"]
    assert facts["actual"]["tokens"] == 5 * 4096
    ratio = facts["actual"]["tok_s"] / facts["tokens_per_second"]
    assert facts["actual"]["utilisation"] == pytest.approx(facts["utilisation"] * ratio)
    # These five steps are of the early phase, whose tokens cost less; a log that counts operations says so.
    assert facts["actual"]["predicted_tok_s"] > 1.1 * facts["tokens_per_second"]
    flops = 4096 * early["total_flops_per_token"]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({**record, "flops": flops}) + "\n" for record in records))
    actual = json.loads(run(capsys, recipe, "--run", str(tmp_path), "--json")[1])["actual"]
    assert actual["utilisation"] == pytest.approx(flops / 12.72 / (facts["machine"]["bf16_tflops"] * 1e12))
    wide = json.loads(run(capsys, recipe, f"steps={2 * STEPS}", "--json")[1])
    assert wide["flops"] == pytest.approx(2 * facts["flops"])


def test_the_list_of_machines(capsys):
    code, out, _ = run(capsys, "any", "--machine", "?")
    assert code == 0 and "h800" in out and "zen4-2" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([V3], "tokens"),
        ([V3, "--tokens", "lots"], "tokens"),
        ([V3, "--tokens", "1T", "--machine", "h80"], "did you mean h800"),
        ([V3, "--tokens", "1T", "--utilisation", "2"], "utilisation"),
        ([V3, "steps=3", "--tokens", "1T"], "steps=3"),
        ([str(ROOT / "recipes" / "code"), "stepz=3"], "steps"),
        ([str(ROOT / "recipes" / "code"), "--run", "nowhere"], "nowhere"),
        (["no-such-recipe"], "no-such-recipe"),
    ],
)
def test_what_cannot_be_counted_is_one_line(capsys, arguments, problem):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and problem in err and len(err.splitlines()) == 1


def test_without_a_verb_there_is_help_and_no_empty_error(capsys):
    with pytest.raises(SystemExit) as end:
        main(["cost"])
    said = capsys.readouterr()
    assert end.value.code == 2 and "train" in said.out and said.err == ""
