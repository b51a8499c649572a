#!/usr/bin/env python3
"""Training beside transformers: the same small DeepSeek-V3 model, weights, tokens, precision and optimiser.

Every side is a process that waits; one step of one side runs at a time, turn by turn, so that what the machine does
meanwhile meets all of them. A ratio is taken inside a round; the table shows medians with the least and the greatest.

    make bench-train                             about ten minutes, two of which transformers compiles; 15 GB of memory
    make bench-train ARGS="--sides shoal,eager,kept"
                                                 without compiling; transformers with Shoal's allocator setting, too
    make bench-train ARGS="--quick"              shows that everything runs; the numbers mean nothing

transformers runs its `grouped_mm` experts and, compiled, `torch.compile`: the fastest of its settings on this model.
`shoal train` has the C library keep freed memory for the next step; the side `kept` is transformers with that setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers_report import commit, slug
from random_gguf import tiny

from shoal.cli.machine import describe_machine
from shoal.config import ModelConfig
from shoal.cost.model_cost import params_by_part
from shoal.cost.train_flops import train_flops
from shoal.formats.atomic import atomic_file
from shoal.formats.hf_folder import save_folder
from shoal.model import as_checkpoint, random_model
from shoal.train.measure import matrix_rate

ROOT = Path(__file__).resolve().parents[1]
SIDES = {
    "shoal": "Shoal",
    "eager": "transformers",
    "kept": "transformers, freed memory kept",
    "compiled": "transformers, compiled",
}
# All four at once would take 22 GB.
DEFAULT = ["shoal", "eager", "compiled"]
SEED = 0
# AdamW reads weight, gradient and two moments and writes all but the gradient, in float32; the forward pass reads the
# weight once more and writes it in bfloat16.
OPTIMISER_BYTES = 7 * 4 + 6
LOSS_BOUND = 1e-2


class Side:
    """A running process of `train_sides.py`."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace) -> None:
        self.name = name
        script = Path(__file__).with_name("train_sides.py")
        command = [sys.executable, script, name, folder, args.rows, args.length, args.precision, args.threads]
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answers: list[dict[str, Any]] = []
        self._answer()

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.answers.append(self._answer())
        return self.answers[-1]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"train.py: the side {self.name} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(args: argparse.Namespace, config: ModelConfig) -> dict[str, Any]:
    """Run all sides; what each answered to each step, and the machine's limits in every round."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no tokenizer
        save_folder(as_checkpoint(random_model(config, SEED)), Path(folder))
        sides = [Side(name, Path(folder), args) for name in args.sides]
        limits = []
        for index in range(args.rounds + 1):  # the first compiles, allocates, and makes the optimiser's state
            for side in sides:
                answer = side.step()
                say(f"step {index}, {SIDES[side.name]}: loss {answer['loss']:.4f}, {answer['seconds']:.2f} s")
            limits.append(
                {"flops": matrix_rate(getattr(torch, args.precision), torch.device("cpu")), "bytes": copies()}
            )
        for side in sides:
            side.close()
    return {"answers": {side.name: side.answers for side in sides}, "limits": limits}


def copies() -> float:
    """Bytes a second of plain copying, reading and writing counted: the best of three."""
    source = torch.ones(1 << 26)
    target, best = torch.empty_like(source), 0.0
    for _ in range(3):
        started = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.numel() * 4 / (time.perf_counter() - started))
    return best


def summary(args: argparse.Namespace, config: ModelConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """Speeds, ratios, agreement of the losses, and how far Shoal is above what the machine's limits allow."""
    tokens = args.rows * args.length
    answers = measured["answers"]
    rates = {name: [tokens / one["seconds"] for one in rows[1:]] for name, rows in answers.items()}
    flops = train_flops(config, args.length).model * tokens
    size = sum(params_by_part(config).values()) * OPTIMISER_BYTES
    floors = [flops / limit["flops"] + size / limit["bytes"] for limit in measured["limits"][1:]]
    sides = {}
    for name, rows in answers.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["shoal"], rates[name], strict=True)]
        sides[name] = {
            "tok_s": statistics.median(rates[name]),
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            "first_step_seconds": rows[0]["seconds"],
            "cpu_seconds": statistics.median(one["cpu_seconds"] for one in rows[1:]),
            "peak_rss_bytes": max(one["peak_rss_bytes"] for one in rows),
            "worst_loss_difference": max(
                abs(mine["loss"] - one["loss"]) for mine, one in zip(answers["shoal"], rows, strict=True)
            ),
        }
    above = [one["seconds"] / floor for one, floor in zip(answers["shoal"][1:], floors, strict=True)]
    return {
        "sides": sides,
        "flops_per_step": flops,
        "optimiser_bytes_per_step": size,
        "floor_seconds": statistics.median(floors),
        "matrix_rate": statistics.median(limit["flops"] for limit in measured["limits"][1:]),
        "copy_rate": statistics.median(limit["bytes"] for limit in measured["limits"][1:]),
        "above_floor": statistics.median(above),
    }


def report(facts: dict[str, Any]) -> str:
    machine, result, answers = facts["machine"], facts["summary"], facts["answers"]
    lines = [f"# Training in Shoal and transformers, {facts['date']}", ""]
    if facts["quick"]:
        lines += ["A trial of the script with a small model: **these numbers mean nothing.**", ""]
    lines += [
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        f"{facts['threads']} threads, {facts['precision']}, {facts['rows']} × {facts['length']} tokens a step, "
        f"{facts['parameters'] / 1e6:.1f}M parameters",
        f"- PyTorch {machine['packages'].get('torch')}, transformers {machine['packages'].get('transformers')} "
        f"with grouped_mm experts, Shoal {machine['shoal']} ({facts['commit']})",
        f"- `{facts['command']}`",
        "",
        "| | tokens/s | Shoal is faster by | first step | processor time of a step | peak memory | loss differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side in result["sides"].items():
        ratio = "" if name == "shoal" else "{:.2f} × ({:.2f}–{:.2f})".format(*side["ratio"])
        differs = "" if name == "shoal" else f"{side['worst_loss_difference']:.4f}"
        lines.append(
            f"| {SIDES[name]} | {side['tok_s']:.0f} | {ratio} | {side['first_step_seconds']:.1f} s "
            f"| {side['cpu_seconds']:.2f} s | {side['peak_rss_bytes'] / 1e9:.2f} GB | {differs} |"
        )
    lines += [
        "",
        f"Medians of {len(facts['limits']) - 1} rounds, in brackets the least and the greatest. Losses should "
        f"differ by less than {LOSS_BOUND} in every step.",
        "",
        f"The floor: {result['flops_per_step'] / 1e9:.0f} billion operations at {result['matrix_rate'] / 1e9:.0f} a "
        f"nanosecond (a product of 1024 × 1024 matrices), and {result['optimiser_bytes_per_step'] / 1e9:.2f} GB of "
        f"optimiser state at {result['copy_rate'] / 1e9:.0f} GB/s: {result['floor_seconds']:.2f} s a step. "
        f"Shoal takes {result['above_floor']:.2f} times that.",
        "",
        "| step | " + " | ".join(f"loss, {SIDES[name]}" for name in answers) + " |",
        "|---" * (len(answers) + 1) + "|",
        *(
            f"| {step} | " + " | ".join(f"{one['loss']:.4f}" for one in row) + " |"
            for step, row in enumerate(zip(*answers.values(), strict=True))
        ),
        "",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quick_model(config: ModelConfig) -> ModelConfig:
    return replace(config, vocab_size=512, num_hidden_layers=2)


def main() -> None:
    args = arguments()
    unknown = sorted(set(args.sides) - set(SIDES))
    if unknown or "shoal" not in args.sides:
        sys.exit(f"train.py: --sides are shoal and any of {', '.join(SIDES)}, got {','.join(args.sides)}")
    config = quick_model(tiny()) if args.quick else tiny()
    if os.getloadavg()[0] > 0.5:
        say(f"warning: something else is running here (load average {os.getloadavg()[0]:.1f})")
    torch.set_num_threads(args.threads)
    started = time.localtime()
    measured = measure(args, config)
    machine = describe_machine()
    facts = {
        "date": time.strftime("%Y-%m-%d", started),
        "command": f"python benchmarks/train.py {' '.join(sys.argv[1:])}".rstrip(),
        "quick": args.quick, "threads": args.threads, "precision": args.precision, "rows": args.rows,
        "length": args.length, "parameters": sum(params_by_part(config).values()), "machine": machine,
        "commit": commit(), "summary": summary(args, config, measured), **measured,
    }  # fmt: skip
    stem = f"train_{slug(machine['cpu'])}_{facts['date']}{'_quick' if args.quick else ''}"
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in ((f"{stem}.json", json.dumps(facts, indent=1) + "\n"), (f"{stem}.md", report(facts))):
        with atomic_file(args.out / name) as stream:
            stream.write(text.encode())
    print(report(facts))
    worst = max(side["worst_loss_difference"] for side in facts["summary"]["sides"].values())
    if worst > LOSS_BOUND:
        sys.exit(f"train.py: losses differ by {worst:.4f}, more than {LOSS_BOUND}: the sides do not compute the same")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure training beside transformers.")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=DEFAULT, help=", ".join(SIDES))
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each side, after the first (7)")
    parser.add_argument("--rows", type=int, default=8, help="sequences a step (8)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of products")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on every side")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="a smaller model, two rounds, nothing compiled")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.rows, args.length = 2, 2, 64
        args.sides = [side for side in args.sides if side != "compiled"]
    return args


if __name__ == "__main__":
    main()
