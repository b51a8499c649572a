"""The page of a selection: what was kept by source, the weights, the rounds, samples of what stayed and what went."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data import charts, store
from shoal.data.charts import Point, number
from shoal.data.page import Section, excerpt, folded, page, table
from shoal.data.select.run import VERDICT, Choice, Ground
from shoal.formats.atomic import atomic_file

SAMPLES, EXCERPT, BINS = 3, 900, 40


def write_page(ground: Ground, choice: Choice, data: dict[str, Any]) -> Path:
    """Write `selection.html` beside `selection.json`, whose content `data` is. Returns its path."""
    path = ground.folder / "selection.html"
    facts = {
        "tokens in the pool": number(data["pool"]["tokens"]),
        "budget": number(data["budget"]),
        "tokens kept": number(data["tokens"]),
        "documents kept": f"{number(data['documents'])} of {number(data['pool']['documents'])}",
        "target sample": f"{data['target']['learn']} + {data['target']['judge']} documents",
    }
    rounds = data["facts"].get("rounds", [])
    names = {one["example"] for round_ in rounds for one in round_["strata"] if one["example"] is not None}
    titles = {n: document.id for n, document in enumerate(store.read_folder(ground.folder)) if n in names}
    sections = [
        _sources(data), _scores(ground, choice), *([_rounds(rounds, data), _strata(rounds, titles)] if rounds else []),
        _samples(ground), _settings(data),
    ]  # fmt: skip
    html = page(
        "What was selected", f"A share of {choice.share:.3g} of the tokens by {choice.method}.", facts, sections,
        "Written by shoal data select. This page is one file and loads nothing.",
    )  # fmt: skip
    with atomic_file(path) as file:
        file.write(html.encode("utf-8", "replace"))
    return path


def _sources(data: dict[str, Any]) -> Section:
    rows = [(name, sides) for name, sides in sorted(data["sources"].items(), key=lambda item: -item[1][0])]
    body = charts.legend(["pool", "kept"]) + charts.bars(rows)
    return Section("Where it came from", body, "Tokens by source. The method is not told the sources.")


def _scores(ground: Ground, choice: Choice) -> Section:
    values = choice.scores.values_N
    known = np.isfinite(values) & ground.pool.alive_N
    if not known.any():
        return Section("Scores", "")
    low, high = (float(end) for end in np.quantile(values[known], (0.01, 0.99)))
    high = high if high > low else low + 1
    clipped = np.clip(values, low, high)
    rows = {
        name: np.histogram(clipped[side], BINS, (low, high))[0].tolist()
        for name, side in (("pool", known), ("kept", known & choice.picked_N))
    }
    chart = charts.histogram(rows, low=low, high=high, x_label="score: log weight, log-odds or rank, by the method")
    return Section("Scores", charts.legend(list(rows)) + chart, "Documents by what the method thought of them.")


def _rounds(rounds: list[dict[str, Any]], data: dict[str, Any]) -> Section:
    line = {"proxy": [Point(at, one["loss"]) for at, one in enumerate(rounds)]}
    rows = [
        [str(at), f"{one['loss']:.4f}", f"{one['told_apart']:.0%}",
         f"{one['effective']:.0f}", number(one["documents"]), "kept" if at == data["facts"]["best"] else ""]
        for at, one in enumerate(rounds)
    ]  # fmt: skip
    columns = (
        "round",
        "loss on the judging half",
        "told apart by the discriminator",
        "effective documents",
        "picked",
        "",
    )
    chart = (
        charts.line_chart(line, x_label="round", y_label="loss, nats a token", height=220) if len(rounds) > 1 else ""
    )
    hint = "Effective: how many documents of equal weight would be as uneven as the weights are."
    return Section("Rounds", chart + table(columns, rows, (1, 3, 4)), hint)


def _strata(rounds: list[dict[str, Any]], titles: dict[int, str]) -> Section:
    parts = []
    for at, one in enumerate(rounds):
        rows = [
            [titles.get(s["example"], "–"), number(s["documents"]), number(s["tokens"]), f"{s['weight']:.1%}",
             number(s["budget"]), "–" if s["gain"] is None else f"{s['gain']:+.2f}", f"{np.exp(s['factor']):.2f}"]
            for s in sorted(one["strata"], key=lambda s: -s["budget"]) if s["documents"]
        ]  # fmt: skip
        columns = ("heaviest document", "documents", "tokens", "weight", "budget", "gain", "factor after")
        body = table(columns, rows, range(1, 7))
        parts.append(folded(f"Round {at}", "", body, unfolded=at == len(rounds) - 1))
    hint = "Gain: nats that a million tokens of the stratum would take off the judging half's loss, by a short probe."
    return Section("Strata", "".join(parts), hint)


def _samples(ground: Ground) -> Section:
    """Documents with the smallest keyed hashes of their names, for what was kept and each reason to go."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    counts: dict[str, int] = {}
    for document in store.read_folder(ground.folder, [*store.verdict_names(ground.folder)]):
        reason = store.reason_of(document, store_order(document.attributes))
        name = "kept" if reason is None else reason[1]
        counts[name] = counts.get(name, 0) + 1
        key = hashlib.blake2b(document.id.encode("utf-8", "replace"), digest_size=8).hexdigest()
        rows = found.setdefault(name, [])
        rows.append((key, document.id, document.text[:EXCERPT]))
        rows.sort()
        del rows[SAMPLES:]
    parts = [
        folded(name, f"{counts[name]:,} documents", "".join(excerpt(where, text) for _, where, text in found[name]),
               unfolded=name == "kept")
        for name in sorted(found, key=lambda one: (one != "kept", -counts[one]))
    ]  # fmt: skip
    return Section("Samples", "".join(parts), "Drawn by a hash of their names: nobody chose them.")


def store_order(attributes: dict[str, Any]) -> list[str]:
    """Verdicts that a document carries, the selection's last."""
    names = [name.removesuffix("_reason") for name in attributes if name.endswith("_reason")]
    return sorted(names, key=lambda name: name == VERDICT)


def _settings(data: dict[str, Any]) -> Section:
    rows = [[key, json.dumps(value, ensure_ascii=False)] for key, value in data["settings"].items()]
    rows += [
        ["method", data["method"]],
        ["share", f"{data['share']}"],
        ["left the pool: holds what judges", f"{data['overlap']}"],
    ]
    return Section("How to do it again", table(("field", "value"), rows))
