"""Quality of SmolLM2-135M-Instruct with latent attention, against what its cache takes: `make bench-reshape`.

Every point is measured as it comes out of the closed form, and again after healing where steps were asked for. Results
are kept point by point in the work folder, and a healing run that was killed goes on, so the command can be repeated
until it is done.

    python benchmarks/reshape.py --points 194+192,192+96,104+44 --heal 104+44 --steps 4000
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from shoal import LLM, hub
from shoal.cli.machine import describe_machine
from shoal.cost.model_cost import full_cache_bytes_per_token, model_cost
from shoal.engine.memory import cache_bytes
from shoal.evaluate import evaluate
from shoal.formats.checkpoint import Checkpoint, open_checkpoint
from shoal.formats.hf_save import save_folder
from shoal.model import load_model
from shoal.quant.texts import BUILTIN, load_texts, windows
from shoal.tune.reshape import HealSettings, HealStep, Shape, heal, measure, reshape

MODEL = "smollm2-135m"
TASKS = {"english": 4, "code": 4, "continuation": 120, "hellaswag": 100}
METRICS = (
    ("english", "word_perplexity"),
    ("code", "word_perplexity"),
    ("continuation", "acc"),
    ("hellaswag", "acc_norm"),
)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="194+192,192+96,184+92,128+64,104+44,84+32", help="latent+rope, …")
    parser.add_argument("--heal", default="", help="the points that are healed, too")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--int8", default="", help="the points that are measured with an int8 cache, too")
    parser.add_argument("--work", type=Path, default=Path("build/reshape"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--limit", type=int, default=1000, help="most items of a task")
    parser.add_argument("--only-heal", action="store_true", help="no measuring")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    source = open_checkpoint(hub.resolve(MODEL))
    rows = [] if args.only_heal else [measured(args, "source", source), measured(args, "source", source, cache="int8")]
    moments = None
    for point in args.points.split(","):
        shape = shape_of(point)
        if moments is None:
            moments = calibrated(source)
        made = reshape(source, shape, None if shape == Shape.full(source.config) else moments)
        if not args.only_heal:
            rows.append(measured(args, point, made))
            if point in args.int8.split(","):
                rows.append(measured(args, point, made, cache="int8"))
        if point in args.heal.split(","):
            healed = healed_point(args, source, made, point)
            name = f"{point} healed {args.steps * args.batch * args.window} tokens"
            if not args.only_heal:
                rows.append(measured(args, name, healed))
                if point in args.int8.split(","):
                    rows.append(measured(args, name, healed, cache="int8"))
    if rows:
        write(rows)


def shape_of(point: str) -> Shape:
    latent, rope = point.split("+")
    return Shape(latent=int(latent), rope=int(rope))


def calibrated(source: Checkpoint) -> Any:
    ids = source.load_tokenizer().encode(load_texts(BUILTIN).calibration)
    return measure(
        load_model(source), windows(ids, 512, 8192), lambda done, total: say(f"calibrated {done} of {total}")
    )


def healed_point(args: argparse.Namespace, source: Checkpoint, made: Checkpoint, point: str) -> Checkpoint:
    """The healed checkpoint, from its folder if it is already there."""
    folder = args.work / f"healed-{point}-{args.steps}"
    if not folder.exists():
        ids = source.load_tokenizer().encode(load_texts(BUILTIN).calibration)
        settings = HealSettings(steps=args.steps, batch=args.batch, lr=args.lr, bfloat16=True)
        started = time.perf_counter()

        def report(step: HealStep) -> None:
            if step.step % 5 == 0:
                say(f"{point}: step {step.step}, {step.kl:.4f} nats, {time.perf_counter() - started:.0f} s")

        pieces = windows(ids, args.window, len(ids))
        state = args.work / f"state-{point}-{args.steps}"
        save_folder(
            heal(load_model(source), made, pieces, settings, state=state, report=report), folder, dtype="float32"
        )
    return open_checkpoint(folder)


def measured(args: argparse.Namespace, name: str, checkpoint: Checkpoint, cache: str = "bf16") -> dict[str, Any]:
    """Scores of one model, from the work folder if they are already there."""
    source = open_checkpoint(hub.resolve(MODEL)).config
    path = args.work / f"{name.replace(' ', '-')}-{cache}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    say(f"measuring {name} with a cache in {cache}")
    llm = LLM(checkpoint, weights="f32", cache=cache, threads=args.threads, cache_tokens=8192)
    scores = [one for task, limit in TASKS.items() for one in evaluate(llm, [task], limit=min(limit, args.limit))]
    config, tokens = checkpoint.config, 1 << 16
    cost = model_cost(config)
    row = {
        "name": name, "cache": cache, "values": config.attention.cache_width,
        "bytes": cache_bytes(config, cache, tokens) / tokens / config.num_hidden_layers,
        "full_bytes": full_cache_bytes_per_token(source) // config.num_hidden_layers,
        "params": cost.total_params, "scores": [asdict(one) for one in scores],
    }  # fmt: skip
    path.write_text(json.dumps(row))
    return row


def write(rows: list[dict[str, Any]]) -> None:
    """Table and data; every quality beside that of the source with a float cache."""
    machine = describe_machine()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    stem = RESULTS / f"reshape_{slug}_{date.today().isoformat()}"
    base = {key: value_of(rows[0], *key) for key in METRICS}
    lines = [
        "# SmolLM2-135M-Instruct with latent attention",
        "",
        f"`python benchmarks/reshape.py {' '.join(sys.argv[1:])}` on {machine['cpu']}; weights in float32. Cached "
        "values and bytes are a token's in one layer; heads without grouping cache "
        f"{rows[0]['full_bytes'] // 2} values, {rows[0]['full_bytes']} bytes in bfloat16. Perplexities are per "
        "word of held-out text, with the source's divided by them; accuracies have their 95 % interval and their share "
        "of the source's.",
        "",
        "| model | cache | values | bytes | less than full heads | English | code | continuation | HellaSwag (100) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        less = f"{1 - row['bytes'] / row['full_bytes']:.1%}"
        cells = [row["name"], row["cache"], str(row["values"]), f"{row['bytes']:.0f}", less]
        lines.append(f"| {' | '.join([*cells, *(cell(row, key, base[key]) for key in METRICS)])} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    stem.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))


def cell(row: dict[str, Any], key: tuple[str, str], base: float) -> str:
    value = value_of(row, *key)
    if "perplexity" in key[1]:
        return f"{value:.2f} ({base / value:.1%})"
    score = next(one for one in row["scores"] if (one["task"], one["metric"]) == key)
    return f"{value:.1%} [{score['low']:.1%}, {score['high']:.1%}] ({value / base:.1%})"


def value_of(row: dict[str, Any], task: str, metric: str) -> float:
    return float(next(one["value"] for one in row["scores"] if (one["task"], one["metric"]) == (task, metric)))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
