"""Held-out loss of the two runs by operations and by processor time, and what the twin needs for the same loss.

    python recipes/code/curves.py --code RUN --twin RUN --out recipes/code/results

writes code.csv and twin.csv (a line a step), and curves.svg. Operations are those of the mathematics (`flops` in the
log), MTP included while it learns. Time is the processor's: the clock also counts what else a machine did.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from shoal.data.charts import Point, line_chart, text

COLUMNS = ("step", "tokens", "flops", "cpu_seconds", "loss", "val_loss", "mtp", "lr", "max_vio", "dead_experts")
STYLE = (
    "<style>text{font:12px sans-serif;fill:#555}.grid{stroke:#ddd}.line{fill:none;stroke-width:2}"
    ".stroke0{stroke:#0b6e99}.fill0{fill:#0b6e99}.stroke1{stroke:#c2571a}.fill1{fill:#c2571a}</style>"
    '<rect width="100%" height="100%" fill="#fff"/>'
)


class At(NamedTuple):
    """A held-out loss and what it had cost."""

    flops: float
    seconds: float
    loss: float


Curve = list[At]


def read_log(run: Path) -> list[dict[str, Any]]:
    """The steps of a run, `flops` and `cpu_seconds` added up."""
    flops = seconds = 0.0
    records = []
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        flops, seconds = flops + record["flops"], seconds + record["cpu_seconds"]
        records.append(record | {"flops": flops, "cpu_seconds": round(seconds, 1)})
    return records


def curve(records: list[dict[str, Any]]) -> Curve:
    return [At(r["flops"], r["cpu_seconds"], r["val_loss"]) for r in records if r.get("val_loss") is not None]


def cost_of(curve: Curve, loss: float) -> At | None:
    """What it took to come down to a loss, in a straight line between two measurements; None outside of them."""
    for before, after in itertools.pairwise(curve):
        if after.loss <= loss < before.loss:
            part = (before.loss - loss) / (before.loss - after.loss)
            return At(*(a + part * (b - a) for a, b in zip(before, after, strict=True)))
    return None


def ratios(ours: Curve, twins: Curve) -> list[dict[str, float]]:
    """For each of our held-out losses that the twin passed: how many times our operations and seconds it took."""
    out = []
    for at in ours:
        cost = cost_of(twins, at.loss)
        if cost is not None:
            out.append(
                {
                    "val_loss": at.loss,
                    "flops": at.flops,
                    "twin_flops_ratio": cost.flops / at.flops,
                    "twin_seconds_ratio": cost.seconds / at.seconds,
                }
            )
    return out


def at_the_end(ours: Curve, twins: Curve) -> dict[str, float | None]:
    """The last losses, and what share of the twin's whole cost we needed for its last loss, if we passed it."""
    cost = cost_of(ours, twins[-1].loss)
    return {
        "val_loss": ours[-1].loss,
        "twin_val_loss": twins[-1].loss,
        "flops": ours[-1].flops,
        "twin_flops": twins[-1].flops,
        "share_of_twins_flops": None if cost is None else cost.flops / twins[-1].flops,
        "share_of_twins_seconds": None if cost is None else cost.seconds / twins[-1].seconds,
    }


def draw(curves: dict[str, Curve]) -> str:
    """Held-out loss by operations, as an SVG file."""
    series = {name: [Point(at.flops / 1e12, at.loss) for at in curve] for name, curve in curves.items()}
    chart = line_chart(series, x_label="training operations, 10¹²", y_label="held-out loss, nats a token")
    drawing = chart[chart.index("<svg") : -len("</svg>")].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    head, body = drawing.split(">", 1)
    names = "".join(text(560, 30 + 18 * i, f"● {name}", f"fill{i}") for i, name in enumerate(series))
    return f"{head}>{STYLE}{body}{names}</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--twin", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, Curve] = {}
    for name, run in (("code", options.code), ("twin", options.twin)):
        if run is None:
            continue
        records = read_log(run)
        curves[name] = curve(records)
        with (options.out / f"{name}.csv").open("w", newline="") as file:
            rows = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            rows.writeheader()
            rows.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in records)
    (options.out / "curves.svg").write_text(draw(curves))
    if "twin" in curves:
        print(json.dumps(at_the_end(curves["code"], curves["twin"]), indent=2))


if __name__ == "__main__":
    main()
