"""The page of a run: where the text went, what changed, and what it looked like; all of it from `summary.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data import charts, entropy, store
from shoal.data.charts import number
from shoal.data.ledger import BINS, SCALES
from shoal.data.page import Markup, Section, excerpt, folded, page, table
from shoal.errors import FileError
from shoal.formats.atomic import atomic_file

MOST_ROWS = 40
MOST_GROUPS = 8
EXPLAINED = {
    "compressibility: repeats itself": "Low tail: a compressor finds nearly everything said before. Boilerplate, "
    "tables, lists of one pattern. Learned after a few of them, and dear in tokens.",
    "compressibility: noise": "High tail: nothing repeats, not even the language. Keys, encoded data, word lists, "
    "fragments. No model predicts it, so it teaches none.",
    "surprise: already known": "Low tail: the reference model predicts it nearly word for word. Licences, famous "
    "texts, generated pages: read often enough already.",
    "surprise: noise": "High tail: the reference model is lost at each token. Broken encodings, other scripts, tables "
    "of numbers. Loss spent here is not won back.",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` from a folder's `summary.json` and attribute files, and return its path.

    Raises:
        FileError: the folder was not prepared.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise FileError(folder, "holds no summary.json; `shoal data prepare` makes one")
    out = folder / "report.html"
    with atomic_file(out) as file:
        file.write(render(json.loads(path.read_bytes()), _scores(folder)).encode("utf-8", "replace"))
    return out


def render(summary: dict[str, Any], scores: list[float] | None = None) -> str:
    """The page's HTML. `scores`: bits a byte of the scored documents."""
    clean, pack = summary["clean"], summary["pack"]
    read = clean["steps"].get("read", [0, 0, 0, 0])
    kept = [sum(row[at] for row in pack["groups"]["after"].get("kind", {}).values()) for at in (0, 1)]
    tokens = pack.get("tokens", 0)
    rate = tokens / kept[1] if tokens and kept[1] else 0.0
    facts = {
        "documents read": number(read[0]),
        "documents kept": number(kept[0]),
        "characters kept": number(kept[1]),
        "tokens packed": number(tokens) if tokens else "none",
        "characters a token": f"{1 / rate:.2f}" if rate else "–",
        "personal data masked": number(sum(clean["masked"].values())),
    }
    share = kept[1] / read[1] if read[1] else 0.0
    sections = [
        _flow(clean, pack, rate),
        _reasons(clean, pack, read, rate),
        _distributions(clean, pack, summary.get("band"), scores),
        _groups(clean, pack),
        *_tails(pack),
        _samples(clean, pack),
        _provenance(summary),
    ]
    names = ", ".join(one["name"] or Path(one["path"]).name for one in summary["recipe"]["sources"])
    return page(
        "What became of the text", f"{names}: {share:.0%} of the characters were kept.", facts, sections,
        "Written by shoal data. This page is one file and loads nothing.",
    )  # fmt: skip


def _dropped(ledgers: tuple[dict[str, Any], ...]) -> dict[str, dict[str, list[int]]]:
    """Reasons by step, in the order of the steps."""
    return {
        step: ledger["dropped"][step] for ledger in ledgers for step in ledger["steps"] if step in ledger["dropped"]
    }


def _flow(clean: dict[str, Any], pack: dict[str, Any], rate: float) -> Section:
    dropped = _dropped((clean, pack))
    steps = {**clean["steps"], **pack["steps"]}
    start = steps.get("read", [0, 0, 0, 0])
    stages = []
    for name, row in steps.items():
        drops = dropped.get(name, {})
        if name == "read" or (row[0] == row[2] and not drops):
            continue
        by_size = sorted(drops.items(), key=lambda item: -item[1][1])
        note = f"{number(row[2])} documents"
        stages.append(charts.Stage(name, row[3], {reason: counts[1] for reason, counts in by_size}, note))
    body = charts.flow(("read", start[1]), stages, unit="characters")
    masked = clean["masked"]
    extra = []
    if rate:
        extra.append(f"One character is {rate:.3f} tokens here, so {number(start[1] * rate)} tokens were read")
    if masked:
        what = ", ".join(f"{number(count)} × {kind}" for kind, count in sorted(masked.items(), key=lambda i: -i[1]))
        extra.append(f"Masked: {what}")
    hint = "Widths are characters. Each arm is what a step let go, with its foremost reason; hover for the others."
    return Section("The flow", body + (f'<p class="hint">{". ".join(extra)}.</p>' if extra else ""), hint)


def _reasons(clean: dict[str, Any], pack: dict[str, Any], read: list[int], rate: float) -> Section:
    rows = [
        (step, reason, counts)
        for step, reasons in _dropped((clean, pack)).items()
        for reason, counts in sorted(reasons.items(), key=lambda item: -item[1][0])
    ]
    most = max((counts[1] for _, _, counts in rows), default=1) or 1
    cells = [
        (step, reason, f"{counts[0]:,}", f"{counts[0] / max(read[0], 1):.2%}", number(counts[1]),
         number(counts[1] * rate) if rate else "–", _bar(counts[1] / most))
        for step, reason, counts in rows[:MOST_ROWS]
    ]  # fmt: skip
    columns = ("step", "reason", "documents", "of all", "characters", "≈ tokens", "")
    left = f'<p class="hint">and {len(rows) - MOST_ROWS} rarer reasons</p>' if len(rows) > MOST_ROWS else ""
    hint = "The first rule that objects is the reason that counts." if rows else "Nothing was dropped."
    return Section("Why text was dropped", table(columns, cells, (2, 3, 4, 5)) + left if rows else "", hint)


def _bar(share: float) -> Markup:
    return Markup(f'<span class="bar" style="width:{share * 130:.0f}px"></span>')


def _distributions(
    clean: dict[str, Any], pack: dict[str, Any], band: dict[str, Any] | None, scores: list[float] | None
) -> Section:
    parts = []
    labels = {"characters": "characters of a document", "compression": "compressed size to size"}
    for name, label in labels.items():
        counts = {
            "read": clean["histograms"]["before"].get(name, []), "kept": pack["histograms"]["after"].get(name, [])
        }  # fmt: skip
        low, high = _used(counts["read"], *SCALES[name])
        trimmed = {key: _trim(row, *SCALES[name], low, high) for key, row in counts.items()}
        chart = charts.histogram(trimmed, low=low, high=high, x_label=label, log=name == "characters", width=520)
        parts.append(f"<div><h3>{label.capitalize()}</h3>{charts.legend(['read', 'kept'])}{chart}</div>")
    if scores:
        low, high = 0.0, float(np.quantile(scores, 0.995)) * 1.05
        rows = np.histogram(np.clip(scores, low, high), BINS, (low, high))[0].tolist()
        limits = [
            limit for one in (band or {}).get("bits_per_byte", {}).values() for limit in (one["low"], one["high"])
        ]
        chart = charts.histogram(
            {"scored": rows},
            low=low,
            high=high,
            x_label="bits a byte, by the reference model",
            limits=limits,
            width=520,
        )
        parts.append(f"<div><h3>Surprise of the reference model</h3>{charts.legend(['scored'])}{chart}</div>")
    return Section(
        "Before and after", f'<div class="two">{"".join(parts)}</div>', "Documents by size and by how they compress."
    )


def _used(counts: list[int], low: float, high: float) -> tuple[float, float]:
    """The part of a scale that holds anything."""
    filled = [at for at, count in enumerate(counts) if count]
    if not filled:
        return low, high
    step = (high - low) / BINS
    return low + max(filled[0] - 1, 0) * step, low + min(filled[-1] + 2, BINS) * step


def _trim(counts: list[int], low: float, high: float, first: float, last: float) -> list[int]:
    step = (high - low) / BINS
    return counts[round((first - low) / step) : round((last - low) / step)]


def _groups(clean: dict[str, Any], pack: dict[str, Any]) -> Section:
    parts = []
    for name in ("kind", "language", "licence", "source"):
        # Language and licence are found out on the way, so that they compare what was clean with what was kept.
        first = "read" if name in ("kind", "source") else "clean"
        before = clean["groups"]["before" if first == "read" else "after"].get(name, {})
        after = pack["groups"]["after"].get(name, {})
        names = sorted({*before, *after}, key=lambda one: -_size(before, one))
        rows = [(one, [_size(before, one), _size(after, one)]) for one in names[:MOST_GROUPS]]
        rest = names[MOST_GROUPS:]
        if rest:
            rows.append((f"{len(rest)} others", [sum(_size(side, one) for one in rest) for side in (before, after)]))
        chart = charts.bars(rows, width=520)
        parts.append(f"<div><h3>{name.capitalize()}</h3>{charts.legend([first, 'kept'])}{chart}</div>")
    return Section("What it is made of", f'<div class="two">{"".join(parts)}</div>', "In characters.")


def _size(side: dict[str, list[int]], name: str) -> int:
    return side.get(name, [0, 0])[1]


def _tails(pack: dict[str, Any]) -> list[Section]:
    found = [reason for reason in EXPLAINED if reason in pack["dropped"].get(entropy.VERDICT, {})]
    if not found:
        return []
    parts = []
    for reason in found:
        documents, characters = pack["dropped"][entropy.VERDICT][reason]
        rows = "".join(excerpt(where, content[:600]) for _, where, content in pack["samples"].get(reason, [])[:2])
        parts.append(f"<div><h3>{reason} · {number(documents)} documents, {number(characters)} characters</h3>"
                     f"<p class=hint>{EXPLAINED[reason]}</p>{rows}</div>")  # fmt: skip
    return [
        Section("The two tails", f'<div class="two">{"".join(parts)}</div>', "What lay outside the informative band.")
    ]


def _samples(clean: dict[str, Any], pack: dict[str, Any]) -> Section:
    dropped = _dropped((clean, pack))
    counts = {reason: row[0] for reasons in dropped.values() for reason, row in reasons.items()}
    samples = {**clean["samples"], **pack["samples"]}
    kept = "".join(excerpt(where, content) for _, where, content in samples.get("kept", []))
    parts = [folded("kept", "", kept, unfolded=True)] if kept else []
    for reason in sorted(counts, key=lambda one: -counts[one]):
        rows = "".join(excerpt(where, content) for _, where, content in samples.get(reason, []))
        parts.append(folded(reason, f"{counts[reason]:,} documents", rows))
    return Section("Samples", "".join(parts), "Drawn by a hash of their names: nobody chose them.")


def _provenance(summary: dict[str, Any]) -> Section:
    recipe = {key: value for key, value in summary["recipe"].items() if value not in (None, [], "")}
    rows = [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in recipe.items()
    ]
    passed = summary.get("passed_over") or {}
    if passed:
        top = sorted(passed.items(), key=lambda item: -item[1])
        rows.append(("files passed over", ", ".join(f"{count} × {suffix}" for suffix, count in top[:12])))
    if summary.get("duplicates"):
        rows.append(("duplicates", "{exact} exact and {near} near of {of}".format(**summary["duplicates"])))
    return Section(
        "How to do it again", table(("field", "value"), rows), "The recipe decides every byte of the result."
    )


def _scores(folder: Path) -> list[float] | None:
    if entropy.SCORES not in store.attribute_names(folder):
        return None
    found = (
        store.read_attributes(folder, entropy.SCORES, shard)["bits_per_byte"] for shard in store.shard_numbers(folder)
    )
    return [value for column in found for value in column if value is not None and math.isfinite(value)]
