"""The report of `peers.py`: a Markdown table and the raw numbers as JSON."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.cli.machine import describe_machine
from shoal.formats.atomic import atomic_file

ROOT = Path(__file__).resolve().parents[1]
HEAD = ("model", "weights", "measured", "Shoal", "llama.cpp", "ratio", "memory read", "Shoal's share",
        "llama.cpp's", "peak memory")  # fmt: skip

NOTES = """\
Speeds are tokens a second, all sequences together: medians. A ratio is taken inside a pair of neighbouring runs; shown
is the median of {pairs} with the least and the greatest. The share sets the bytes that a decoding step must read, the
same on both sides, beside plain reading by as many threads; models that fit the caches can pass 100%. Shoal's speed
includes scheduling and choosing tokens; llama.cpp's programs choose none. Tokens are random on both sides."""


def write(
    out: Path, *, results: Sequence[dict[str, Any]], skipped: Sequence[str], peer: str, threads: int, started: float,
    command: str, quick: bool,
) -> None:  # fmt: skip
    """Write `peers_<cpu>_<date>.md` and `.json` into the folder `out`; an earlier report of the day is replaced."""
    machine = describe_machine()
    day = time.strftime("%Y-%m-%d", time.localtime(started))
    stem = f"peers_{slug(machine['cpu'])}_{day}{'_quick' if quick else ''}"
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": day,
        "command": command,
        "threads": threads,
        "machine": machine,
        "commit": commit(),
        "llama_cpp": peer,
        "skipped": list(skipped),
        "results": list(results),
    }
    for name, text in ((f"{stem}.json", json.dumps(facts, indent=1) + "\n"), (f"{stem}.md", markdown(facts, quick))):
        with atomic_file(out / name) as stream:
            stream.write(text.encode())
    print(out / f"{stem}.md", flush=True)


def markdown(facts: dict[str, Any], quick: bool) -> str:
    machine, results = facts["machine"], facts["results"]
    lines = [f"# Shoal and llama.cpp, {facts['date']}", ""]
    if quick:
        lines += ["A trial of the script with small cells: **these numbers mean nothing.**", ""]
    lines += [
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']};"
        f" {facts['threads']} threads on both sides",
        f"- Shoal {machine['shoal']} ({facts['commit']}), kernels {machine['isa']}, Python {machine['python']},"
        f" NumPy {machine['packages'].get('numpy', '?')}",
        f"- llama.cpp {facts['llama_cpp']}, native build, flash attention on",
        f"- `{facts['command']}`",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *("| " + " | ".join(_row(result)) + " |" for result in results),
        "",
        NOTES.format(pairs=_pairs(results)),
        "",
    ]
    if facts["skipped"]:
        lines += ["Not measured:", "", *(f"- {line}" for line in facts["skipped"]), ""]
    lines += ["Each measurement, with one run a process:", "", "```"]
    for result in results:
        lines += [*result["commands"], ""]
    return "\n".join([*lines[:-1], "```", ""])


def _row(result: dict[str, Any]) -> list[str]:
    pairs = result["pairs"]
    ours, theirs = ([pair[side] for pair in pairs] for side in ("ours", "theirs"))
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    read = [pair["row"]["read_gb_s"] for pair in pairs]
    row = [
        result["model"],
        result["dtype"],
        result["title"],
        _number(statistics.median(ours)),
        _number(statistics.median(theirs)),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
        f"{statistics.median(read):.1f} GB/s",
    ]
    peaks = max(pair["row"]["peak_rss_bytes"] for pair in pairs), max(pair["their_peak_rss_bytes"] for pair in pairs)
    memory = " and ".join(f"{peak / 1e9:.2f}" for peak in peaks) + " GB"
    if result["metric"] != "decode_tok_s" or result["batch"] > 1:
        return [*row, "", "", memory]
    step = [sum(pair["row"]["step_bytes"].values()) for pair in pairs]
    shares = []
    for speeds in (ours, theirs):
        used = [speed * size / rate / 1e9 for speed, size, rate in zip(speeds, step, read, strict=True)]
        shares.append(f"{100 * statistics.median(used):.0f}%")
    return [*row, *shares, memory]


def _pairs(results: Sequence[dict[str, Any]]) -> str:
    counts = sorted({len(result["pairs"]) for result in results})
    return " or ".join(map(str, counts)) + (" pairs" if counts != [1] else " pair")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit known"
