"""The proof's page, all of it from `proof.json`: every number and every sentence is computed."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from shoal.data import charts
from shoal.data.charts import Point, number
from shoal.data.page import Section, excerpt, folded, page, table
from shoal.formats.atomic import atomic_file
from shoal.prove.statistics import interval

NAMES = {"loss": "held-out loss, nats a token", "exact": "exact lines", "bleu": "BLEU"}


def write_page(data: dict[str, Any], path: Path) -> None:
    with atomic_file(path) as file:
        file.write(render(data).encode("utf-8", "replace"))


def render(data: dict[str, Any]) -> str:
    """The page's HTML."""
    plan, pool = data["plan"], data["pool"]
    size = plan["size"]
    facts = {
        "tokens in the pool": number(pool["tokens"]),
        "tokens kept by each method": number(int(plan["share"] * pool["tokens"])),
        "cells done": f"{data['done']} of {data['of']}",
        "seeds": str(plan["seeds"]),
        "core minutes": f"{data['cpu_minutes']:.1f}",
        "model": f"{size['layers']} × {size['width']}",
    }
    sections = [
        _statements(data),
        *(_table(data, regime) for regime in data["arms"]),
        *(_curves(data, regime) for regime in data["arms"]),
        _kept(data),
        _rounds(data),
        _samples(data),
        Section("How to do it again", table(("field", "value"), _settings(data))),
    ]
    return page(
        "What the selection bought",
        f"Small models on {number(pool['documents'])} documents, {plan['share']:.0%} of it by each method, judged by "
        f"{data['held_out']['documents']} documents that no method saw.",
        facts,
        sections,
        "Written by shoal data prove. This page is one file and loads nothing.",
    )


def _statements(data: dict[str, Any]) -> Section:
    rows = [[said] for said in data["statements"]] or [["Nothing can be said yet: no seed has both sides."]]
    hint = ("Selected is the adversarial pick. Better and worse are said only where the 95 % interval of the "
            "difference, seed by seed, leaves zero out. Intervals are of each comparison by itself: of many, one in "
            "twenty would leave zero out by chance.")  # fmt: skip
    return Section("What the numbers say", table(("regime, measure: result",), rows), hint)


def _shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{found['mean']:.4f}"
    return f"{found['mean']:.4f} ({found['low']:.4f} to {found['high']:.4f})"


def _table(data: dict[str, Any], regime: str) -> Section:
    rows = []
    for arm, measures in data["arms"][regime].items():
        cells = [one for one in data["cells"] if one["arm"] == arm and one["regime"] == regime]
        if not cells:
            continue
        passes = statistics.mean(one["passes"] for one in cells)
        rows.append([arm, number(cells[0]["read"]), f"{passes:.2f}", *(_shown(measures[name]) for name in NAMES)])
    hint = "Mean over seeds with its 95 % interval. Passes: how often a model went over its text."
    columns = ("arm", "tokens read", "passes", *NAMES.values())
    return Section(f"At {regime}", table(columns, rows, (1, 2, 3, 4, 5)) if rows else "", hint)


def _curves(data: dict[str, Any], regime: str) -> Section:
    series = {}
    for arm in data["arms"][regime]:
        curves = [one["curve"] for one in data["cells"] if one["arm"] == arm and one["regime"] == regime]
        points = []
        for step in zip(*curves, strict=False):
            found = interval([loss for _, loss in step])
            low, high = (found.low, found.high) if found.values > 1 else (None, None)
            points.append(Point(step[0][0], found.mean, low, high))
        if points:
            series[arm] = points[1:] if len(points) > 3 else points  # the first falls too far for the scale
    chart = charts.line_chart(series, x_label="tokens read", y_label="held-out loss", height=360) if series else ""
    return Section(f"Learning curves at {regime}", chart, "Bands are 95 % intervals over seeds.")


def _kept(data: dict[str, Any]) -> Section:
    sources = list(data["pool"]["sources"])
    rows = []
    for arm, every in data["selections"].items():
        found = [one for one in every if one]
        if found:
            mean = [
                statistics.mean(one["sources"].get(name, [0, 0])[1] / one["tokens"] for one in found)
                for name in sources
            ]
            minutes = statistics.mean(one["cpu_seconds"] for one in found) / 60
            documents = statistics.mean(one["documents"] for one in found)
            rows.append([arm, f"{documents:.0f}", *(f"{share:.0%}" for share in mean), f"{minutes:.2f}"])
    total = data["pool"]["tokens"]
    shares = [f"{tokens / total:.0%}" for tokens in data["pool"]["sources"].values()]
    rows.append([
        "the pool", f"{data['pool']['documents']}", *shares,
        "",
    ])  # fmt: skip
    columns = ("arm", "documents", *sources, "core minutes to select")
    hint = "Shares of the kept tokens by source; means over seeds. No method is told the sources."
    return Section("What each method kept", table(columns, rows, range(1, len(columns))), hint)


def _rounds(data: dict[str, Any]) -> Section:
    parts = []
    for seed, one in enumerate(data["selections"].get("adversarial", [])):
        if not one or not one["rounds"]:
            continue
        rows = [
            [str(at), f"{r['loss']:.4f}", f"{r['told_apart']:.0%}", f"{r['effective']:.0f}",
             " ".join(number(b) for b in r["budgets"]),
             " ".join("–" if g is None else f"{g:+.2f}" for g in r["gains"])]
            for at, r in enumerate(one["rounds"])
        ]  # fmt: skip
        columns = ("round", "loss on the judging half", "told apart", "effective documents", "budgets", "gains")
        parts.append(f"<h3>Seed {seed}: round {one['facts']['best']} was kept</h3>" + table(columns, rows))
    hint = "Budgets are tokens of each stratum, gains nats that a million of its tokens would take off the loss."
    return Section("Rounds of the adversarial selection", "".join(parts), hint)


def _samples(data: dict[str, Any]) -> Section:
    parts = []
    for arm in ("whole", "adversarial"):
        cells = [one for one in data["cells"] if one["arm"] == arm and one.get("samples")]
        if cells:
            shown = "".join(excerpt(f"wanted: {line.strip()}", answer) for line, answer in cells[0]["samples"])
            parts.append(folded(f"{arm}, {cells[0]['regime']}, seed {cells[0]['seed']}", "", shown))
    return Section("Lines that were written", "".join(parts), "The first cases, whatever came of them.")


def _settings(data: dict[str, Any]) -> list[list[str]]:
    rows = [["command", data["command"]], ["plan", json.dumps(data["plan"])], ["target", json.dumps(data["target"])]]
    return [*rows, ["held out", json.dumps(data["held_out"])]]
