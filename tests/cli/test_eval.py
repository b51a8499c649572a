"""`shoal eval` from end to end on a user's own small task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Result

pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from tests.cli.test_reshape import model  # noqa: F401

Shoal = Callable[..., Result]


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "items.jsonl").write_text('{"q": "2 + 2 =", "c": [" 4", " 5"], "a": 0}\n' * 4)
    path = tmp_path / "sums.yaml"
    path.write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return str(path)


def test_scores_with_intervals(shoal: Shoal, model: str, task: str) -> None:  # noqa: F811
    result = shoal("eval", model, "--tasks", task, "--limit", "3", "--threads", "1", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    (score,) = facts["scores"]
    assert (score["task"], score["metric"], score["items"]) == ("sums", "acc", 3)
    assert score["value"] in (0.0, 1.0)
    assert score["low"] <= score["value"] <= score["high"]
    table = shoal("eval", model, "--tasks", task, "--threads", "1").out.splitlines()
    assert table[0].split() == ["TASK", "METRIC", "VALUE", "95%", "INTERVAL", "ITEMS"]
    assert table[1].split()[:2] == ["sums", "acc"]


@pytest.mark.parametrize(("tasks", "problem"), [
    ("hellaswig", "did you mean hellaswag"), (",", "tasks: names no task"), ("none.yaml", "none.yaml: cannot be read"),
])  # fmt: skip
def test_wrong_tasks_end_with_one_line(shoal: Shoal, model: str, tasks: str, problem: str) -> None:  # noqa: F811
    result = shoal("eval", model, "--tasks", tasks)
    assert result.code == 2
    assert problem in result.err
    assert result.out == ""
