"""The proof's cells: one small model each, on one arm's text, in one regime, from one seed; one file each when done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.select.run import METHODS, ROUNDS, Choice, Ground, choose, describe
from shoal.errors import ConfigError
from shoal.formats.atomic import atomic_file
from shoal.prove.completion import Cases, bleu, complete, exact_match
from shoal.prove.proxy import Makers, Size, Student

WHOLE, SELECTED = "whole", "adversarial"
BASELINES = ("random", "heuristics", "dsir", "perplexity", "classifier", "preselect")
TOKENS, EPOCHS = REGIMES = ("equal tokens", "equal epochs")
POINTS = 8  # of a learning curve


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared and how.

    Attributes:
        methods: arms beside the whole pool; every one keeps `share` of its tokens.
        tokens: what a model reads in the regime of equal tokens; None: as many as the pool holds.
        epochs: how often it reads its text in the regime of equal epochs.
        proxy_tokens: what a proxy reads while a method selects; None: as many as are selected.
        cases: lines of code to complete.
    """

    methods: tuple[str, ...] = (*BASELINES, SELECTED)
    share: float = 0.1
    seeds: int = 3
    tokens: int | None = None
    epochs: float = 1.0
    proxy_tokens: int | None = None
    rounds: int = ROUNDS
    cases: int = 200
    size: Size = field(default_factory=Size)

    def __post_init__(self) -> None:
        for name, low in (("seeds", 1), ("rounds", 1), ("cases", 0), ("tokens", 1), ("proxy_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(name, f"must be at least {low}, got {value}")
        wrong = next((one for one in self.methods if one not in METHODS or self.methods.count(one) > 1), None)
        if wrong is not None:
            raise ConfigError("methods", f"must be of {', '.join(METHODS)}, each once, got {wrong!r}")
        if not 0 < self.epochs <= 100:
            raise ConfigError("epochs", f"must lie between 0 and 100, got {self.epochs}")


@dataclass(frozen=True, order=True)
class Cell:
    """One model to train: the arm whose text it reads, for how many tokens, from which seed."""

    seed: int
    arm: str
    regime: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.arm}_{self.regime.replace(' ', '-')}_{self.seed}"


def make_cells(plan: Plan, pool_tokens: int) -> list[Cell]:
    """All cells, seed by seed, so that a run that is cut off has whole seeds."""
    tokens, kept = plan.tokens or pool_tokens, int(plan.share * pool_tokens)
    cells = []
    for seed in range(plan.seeds):
        for arm in (WHOLE, *plan.methods):
            own = pool_tokens if arm == WHOLE else kept
            cells += [Cell(seed, arm, TOKENS, tokens), Cell(seed, arm, EPOCHS, max(1, round(plan.epochs * own)))]
    return cells


def select_for(ground: Ground, plan: Plan, arm: str, seed: int) -> Choice | None:
    """What an arm keeps with a seed; None: everything. Selections are journalled in the pool's folder."""
    if arm == WHOLE:
        return None
    tokens = plan.proxy_tokens or int(plan.share * ground.pool.tokens)
    makers = Makers(plan.size, tokens, ground)
    return choose(ground, arm, plan.share, seed=seed, rounds=plan.rounds, proxies=makers)


def run_cell(
    ground: Ground, plan: Plan, cell: Cell, picked_N: NDArray[np.bool_] | None, cases: Cases | None
) -> dict[str, Any]:
    """Train one model and measure it. Every seed begins all its arms from the same weights."""
    assert ground.held_out is not None
    started, processor = time.perf_counter(), time.process_time()
    tokenizer, size = ground.tokenizer, plan.size
    documents = np.flatnonzero(ground.pool.alive_N if picked_N is None else picked_N)
    text_tokens = int(ground.pool.lengths_N[documents].sum())
    # A method may find less than its share; its model goes over that as often as the others over theirs.
    tokens = cell.tokens if cell.regime == TOKENS else min(cell.tokens, round(plan.epochs * text_tokens))
    steps = max(1, tokens // size.step_tokens)
    student = Student(
        size, ground.pool, ground.held_out, tokenizer.vocab_size, tokenizer.eos_token_ids[0], cell.seed, steps
    )
    curve: list[tuple[int, float]] = []

    def watch(step: int) -> None:
        if step == steps or step % max(1, steps // POINTS) == 0:
            curve.append((step * size.step_tokens, student.loss()))

    student.read(documents, tokens, watch)
    result: dict[str, Any] = {
        **asdict(cell), "documents": len(documents), "text_tokens": text_tokens,
        "read": student.step * size.step_tokens, "loss": curve[-1][1], "curve": curve, "exact": None, "bleu": None,
    }  # fmt: skip
    result["passes"] = result["read"] / result["text_tokens"]
    if cases is not None:
        answers = complete(student.model, tokenizer, cases.prompts_BP)
        result |= {"exact": exact_match(answers, cases.lines), "bleu": bleu(answers, cases.lines)}
        result["samples"] = list(zip(cases.lines, answers, strict=True))[:5]
    return result | {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - processor}


class Results:
    """`DIR/cells/`: a file for each finished cell and each selection, whole or not there; another key's count not."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def get(self, name: str) -> dict[str, Any] | None:
        path = self.folder / "cells" / f"{name}.json"
        if not path.is_file():
            return None
        data = json.loads(path.read_bytes())
        return data["result"] if data["key"] == self.key else None

    def put(self, name: str, result: dict[str, Any]) -> None:
        path = self.folder / "cells" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as out:
            out.write(json.dumps({"key": self.key, "result": result}, ensure_ascii=False).encode())


def describe_choice(ground: Ground, choice: Choice, seconds: float) -> dict[str, Any]:
    """What a selection kept, and what it took."""
    facts = {key: value for key, value in choice.scores.facts.items() if key != "rounds"}
    rounds = choice.scores.facts.get("rounds", [])
    brief = [{"loss": one["loss"], "told_apart": one["told_apart"], "effective": one["effective"],
              "budgets": [s["budget"] for s in one["strata"]], "gains": [s["gain"] for s in one["strata"]]}
             for one in rounds]  # fmt: skip
    return {**describe(ground, choice), "facts": facts, "rounds": brief, "cpu_seconds": seconds}


def predicted_tokens(plan: Plan, cells: Sequence[Cell], pool_tokens: int, documents: int) -> tuple[int, int]:
    """(tokens that the cells read, tokens that selecting reads forward or backward)."""
    kept = plan.proxy_tokens or int(plan.share * pool_tokens)
    judged = plan.size.windows * plan.size.context // 3  # a forward pass is a third of a step
    scored = documents * plan.size.context // 3
    costs = {
        "perplexity": kept + scored,
        "preselect": 5 * (kept + judged + min(scored, 2000 * plan.size.context // 3)),
        "adversarial": plan.rounds * (kept + judged + 8 * (int(0.06 * kept) + judged)),
    }
    return sum(cell.tokens for cell in cells), plan.seeds * sum(costs.get(method, 0) for method in plan.methods)
