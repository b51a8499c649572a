"""Answers scored by running them, as lm-eval's `process_results`: an item and the model's texts to metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.evaluate.sandbox import Limits, run_program
from shoal.evaluate.sql import same_answer

Metrics = dict[str, float]
_BEGUN = re.compile(r"\s*(select|with)\b", re.I)  # and no column that is called `selected`
PROGRAM_LIMITS = Limits(seconds=10.0, memory=1 << 30)


def program(item: Mapping[str, Any], answers: Sequence[str]) -> Metrics:
    """HumanEval's rule: the prompt, its continuation and the item's tests run to the end without an error."""
    source = f"{item['prompt']}{answers[0]}\n{item['test']}\ncheck({item['entry_point']})\n"
    return {"pass@1": float(run_program(source, PROGRAM_LIMITS).status == "ok")}


def query(item: Mapping[str, Any], answers: Sequence[str]) -> Metrics:
    """Whether the query, begun by the task's SELECT, returns the rows of the reference."""
    text = answers[0] if _BEGUN.match(answers[0]) else f"SELECT {answers[0]}"
    return {"execution_accuracy": float(same_answer(Path(item["database"]), text, item["sql"]))}


SCORES: dict[str, Callable[[Mapping[str, Any], Sequence[str]], Metrics]] = {"program": program, "query": query}
