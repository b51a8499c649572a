"""A proof from plan to page: cells that are missing are run, seed by seed; then everything is summed up again."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.select.run import Ground
from shoal.errors import ConfigError
from shoal.formats.atomic import atomic_file
from shoal.prove.cells import (
    REGIMES,
    SELECTED,
    WHOLE,
    Cell,
    Plan,
    Results,
    describe_choice,
    make_cells,
    predicted_tokens,
    run_cell,
    select_for,
)
from shoal.prove.completion import Cases, bleu_metric, make_cases
from shoal.prove.page import write_page
from shoal.prove.proxy import Student
from shoal.prove.statistics import Interval, interval, paired

VERSION = 1
MEASURES = {"loss": -1, "exact": 1, "bleu": 1}  # which way is better
WARM, TIMED = 3, 6  # steps of the speed trial
Notice = Callable[[str, int, int], None]


def outline(ground: Ground, plan: Plan) -> dict[str, Any]:
    """The cells with predicted minutes, from a trial of some steps on this machine. Trains nothing else."""
    cells = make_cells(plan, ground.pool.tokens)
    rate = _rate(ground, plan)
    trained, selected = predicted_tokens(plan, cells, ground.pool.tokens, int(ground.pool.alive_N.sum()))
    rows = [{**asdict(cell), "minutes": cell.tokens / rate / 60} for cell in cells]
    return {
        "cells": rows, "tokens_a_second": rate, "cell_minutes": trained / rate / 60,
        "selection_minutes": selected / rate / 60, "pool_tokens": ground.pool.tokens,
    }  # fmt: skip


def prove(ground: Ground, plan: Plan, out: Path, command: str, notice: Notice = lambda *_: None) -> dict[str, Any]:
    """Run what is missing of a proof in `out` and write `proof.json` and `proof.html`. Returns what the former holds.

    Raises:
        ConfigError: there is no held-out set, or a method or share is impossible.
    """
    if ground.held_out is None:
        raise ConfigError("held_out", "must be named: a proof is judged by it")
    cells = make_cells(plan, ground.pool.tokens)
    results = Results(out, _key(ground, plan))
    cases = _cases(ground, plan)
    for number, cell in enumerate(cells):
        if results.get(cell.name) is None and (same := _twin(plan, cell, cells, results)) is not None:
            results.put(cell.name, {**same, "regime": cell.regime})
        elif results.get(cell.name) is None:
            results.put(cell.name, run_cell(ground, plan, cell, _picked(ground, plan, cell, results), cases))
            summarise(ground, plan, cells, results, out, command)
        notice("cells", number + 1, len(cells))
    return summarise(ground, plan, cells, results, out, command)


def summarise(
    ground: Ground, plan: Plan, cells: Sequence[Cell], results: Results, out: Path, command: str
) -> dict[str, Any]:
    """Write `proof.json` and the page from the cells that are done."""
    done = [result for cell in cells if (result := results.get(cell.name)) is not None]
    arms = [WHOLE, *plan.methods]
    table = {regime: {arm: _measured(done, arm, regime) for arm in arms} for regime in REGIMES}
    chosen = {arm: [results.get(f"selection_{arm}_{seed}") for seed in range(plan.seeds)] for arm in plan.methods}
    versus = {regime: _versus(done, arms, regime) for regime in REGIMES} if SELECTED in arms else {}
    pool = ground.pool
    data = {
        "version": VERSION,
        "command": command,
        "plan": {**asdict(plan), "tokens": plan.tokens or pool.tokens},
        "pool": {
            "tokens": pool.tokens, "documents": int(pool.alive_N.sum()), "overlap": len(ground.overlap),
            "sources": {
                name: int(pool.lengths_N[pool.alive_N & (pool.sources_N == name)].sum())
                for name in sorted(set(pool.sources_N.tolist()))
            },
        },
        "target": {"learn": len(ground.learn), "judge": len(ground.judge), "left_out": list(ground.target.overlap)},
        "held_out": {
            "documents": len(ground.held_out or ()),
            "tokens": int(ground.held_out.lengths_N.sum()) if ground.held_out else 0,
        },
        "done": len(done),
        "of": len(cells),
        "cpu_minutes": sum(one["cpu_seconds"] for one in done) / 60
        + sum(one["cpu_seconds"] for row in chosen.values() for one in row if one) / 60,
        "arms": table,
        "selected_less_other": versus,
        "statements": statements(versus, table),
        "selections": chosen,
        "cells": done,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "proof.json") as file:
        file.write(json.dumps(_plain(data), indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    write_page(_plain(data), out / "proof.html")
    return data


def statements(versus: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """What the numbers say: better or worse only where the 95 % interval of the difference leaves zero out."""
    out = []
    for regime, others in versus.items():
        for other, measures in others.items():
            for measure, found in measures.items():
                mine, theirs = table[regime][SELECTED][measure]["mean"], table[regime][other][measure]["mean"]
                side = MEASURES[measure] * found["mean"]
                if found["mean"] == 0:
                    said = "the same"
                elif found["values"] < 2:
                    said = f"{'better' if side > 0 else 'not better'} in the only seed"
                elif found["low"] > 0 or found["high"] < 0:
                    said = "better" if side > 0 else "worse"
                else:
                    said = f"not told apart (by the mean {'better' if side > 0 else 'not better'})"
                span = "" if found["values"] < 2 else f", {found['low']:+.4f} to {found['high']:+.4f}"
                out.append(
                    f"{regime}, {measure}: selected {mine:.4f}, {other} {theirs:.4f}: {said} "
                    f"(difference {found['mean']:+.4f}{span}; {found['values']} seeds)"
                )
    return out


def _measured(done: Sequence[dict[str, Any]], arm: str, regime: str) -> dict[str, Any]:
    return {
        measure: _named(interval(list(values.values()))) if (values := _values(done, arm, regime, measure)) else None
        for measure in MEASURES
    }


def _versus(done: Sequence[dict[str, Any]], arms: Sequence[str], regime: str) -> dict[str, dict[str, Any]]:
    """Selected less each other arm, by measure, over the seeds that both have."""
    out: dict[str, dict[str, Any]] = {}
    for other in arms:
        for measure in MEASURES if other != SELECTED else ():
            sides = [_values(done, arm, regime, measure) for arm in (SELECTED, other)]
            difference = paired(*sides)
            if difference is not None:
                out.setdefault(other, {})[measure] = _named(difference)
    return out


def _values(done: Sequence[dict[str, Any]], arm: str, regime: str, measure: str) -> dict[int, float]:
    return {
        one["seed"]: one[measure]
        for one in done
        if one["arm"] == arm and one["regime"] == regime and one[measure] is not None
    }


def _named(found: Interval) -> dict[str, Any]:
    return found._asdict()


def _picked(ground: Ground, plan: Plan, cell: Cell, results: Results) -> NDArray[np.bool_] | None:
    """The documents that a cell's arm keeps; selected now if no earlier cell of the seed did."""
    started = time.process_time()
    choice = select_for(ground, plan, cell.arm, cell.seed)
    if choice is None:
        return None
    name = f"selection_{cell.arm}_{cell.seed}"
    if results.get(name) is None:
        results.put(name, _plain(describe_choice(ground, choice, time.process_time() - started)))
    return choice.picked_N


def _twin(plan: Plan, cell: Cell, cells: Sequence[Cell], results: Results) -> dict[str, Any] | None:
    """What the same arm and seed came to where the other regime reads as many tokens: nothing differs but the name."""
    for other in cells:
        if (other.seed, other.arm, other.tokens) == (cell.seed, cell.arm, cell.tokens) and other != cell:
            found = results.get(other.name)
            short = (
                found is not None and round(plan.epochs * found["text_tokens"]) < cell.tokens - plan.size.step_tokens
            )
            return None if short else found
    return None


def _cases(ground: Ground, plan: Plan) -> Cases | None:
    assert ground.held_out is not None
    code = [number for number, is_code in enumerate(ground.held_out_code) if is_code]
    if not code or not plan.cases:
        return None
    bleu_metric()  # is it there? Asked before anything is trained
    return make_cases(
        ground.held_out,
        code,
        ground.tokenizer,
        prompt=max(plan.size.context - 32, plan.size.context // 2),
        count=plan.cases,
    )


def _rate(ground: Ground, plan: Plan) -> float:
    """Tokens that a step of this size reads in a second, here and now."""
    tokenizer, size = ground.tokenizer, plan.size
    student = Student(size, ground.pool, ground.judge, tokenizer.vocab_size, tokenizer.eos_token_ids[0], 0)
    alive = np.flatnonzero(ground.pool.alive_N)
    student.read(alive, WARM * size.step_tokens)
    started = time.perf_counter()
    student.read(alive, TIMED * size.step_tokens)
    return TIMED * size.step_tokens / (time.perf_counter() - started)


def _key(ground: Ground, plan: Plan) -> str:
    """Of everything that decides a cell, but how many seeds there are."""
    settings = {key: value for key, value in asdict(plan).items() if key not in ("seeds", "methods")}
    return hashlib.blake2b(f"{ground.key} {sorted(settings.items())}".encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    """JSON knows no NaN: an interval that a single seed cannot have is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
