"""Tuning beside transformers + PEFT, and adapters placed by the data beside plain LoRA and full tuning.

    python benchmarks/tune.py speed      # tokens/s and peak memory on the same model, adapter, examples and precision
    python benchmarks/tune.py quality    # held-out loss: placed adapters, LoRA of the same size, all weights; 3 seeds;
                                         # with --chinook FIXTURE on the SQL questions of recipes/sql

Both sides of `speed` run in processes of their own, turn by turn. The peer is what its documentation shows: a padded
batch with labels of -100 on prompts and padding, `get_peft_model`, AdamW. Tokens are those of the examples, without
padding. Results go to benchmarks/results/tune_<hardware>_<date>.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"


# ---- examples: questions about a made-up shop, answered in a form of its own, so that there is something to learn


def write_examples(path: Path, count: int, seed: int = 0) -> None:
    import random

    rng = random.Random(seed)
    goods = ["lamp", "chair", "kettle", "rope", "anchor", "net", "oar", "sail", "compass", "lantern"]
    places = ["Bergen", "Porto", "Aarhus", "Cork", "Nantes", "Turku", "Genoa", "Split"]
    with path.open("w") as file:
        for _ in range(count):
            lines = [(rng.choice(goods), rng.randint(1, 40), rng.randint(2, 99)) for _ in range(rng.randint(1, 6))]
            asked = ", ".join(f"{n} {good}s at {price} crowns" for good, n, price in lines)
            place = rng.choice(places)
            total = sum(n * price for _, n, price in lines)
            body = "; ".join(f"{good.upper()}×{n}={n * price}" for good, n, price in sorted(lines))
            talk = [
                {"role": "user", "content": f"Please write the order slip for {place}: {asked}."},
                {"role": "assistant", "content": f"[{place[:3].upper()}] {body} | sum {total}"},
            ]
            file.write(json.dumps({"messages": talk}) + "\n")


class Quiet:
    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def step(self, record: dict[str, Any], until: int) -> None:
        pass


# ---- speed


def ours(model: str, data: Path, steps: int, batch: int, length: int, rank: int) -> dict[str, float]:
    from shoal import hub
    from shoal.formats.checkpoint import open_checkpoint
    from shoal.train.log import read_log
    from shoal.train.recipe import ValidationSettings
    from shoal.tune.adapters import targets
    from shoal.tune.recipe import TuneSettings
    from shoal.tune.sft import Data, TuneRun, default_recipe, settle

    checkpoint = open_checkpoint(hub.resolve(model))
    settings = TuneSettings(model=model, data=str(data), method="lora", budget="49%", held_out=0.0)
    recipe = default_recipe(checkpoint, settings)
    recipe = replace(recipe, sequence_length=length, validation=ValidationSettings(every=0))
    found = Data(recipe, checkpoint)
    # As many examples a step as the peer has, packed.
    used = float((found.rows.documents >= 0).mean())
    rows = max(1, round(batch * found.report.tokens / found.report.sequences / (used * length)))
    shapes = targets(_empty(checkpoint))
    budget = sum(rank * (o + i) for t, (_, o, i) in shapes.items() if t.endswith(("q_proj", "v_proj")))
    tuning = replace(settings, budget=str(budget))
    recipe = settle(replace(recipe, batch=rows, micro_batch=rows, tune=tuning), found, steps=steps, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        run = TuneRun(recipe, Path(folder), found, Quiet())
        run.go(steps)
        run.close()
        log = read_log(Path(folder) / "log.jsonl")
    seconds = statistics.median(record["seconds"] for record in log[1:])
    return {"tok_s": rows * length * used / seconds, "loss": log[-1]["loss"], "peak_mb": _peak(), "trained": budget}


def _empty(checkpoint: Any) -> Any:
    import torch

    from shoal.model import Model

    with torch.device("meta"):
        return Model(checkpoint.config)


def theirs(folder: str, data: Path, steps: int, batch: int, rank: int) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"]))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    talks = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    seconds, tokens, loss = [], 0, 0.0
    for step in range(steps):
        started = time.perf_counter()
        chosen = [talks[(step * batch + i) % len(talks)] for i in range(batch)]
        prompts = [tokenizer.apply_chat_template(t[:1], add_generation_prompt=True, return_dict=False) for t in chosen]
        wholes = [tokenizer.apply_chat_template(t, return_dict=False) for t in chosen]
        width = max(map(len, wholes))
        ids = torch.full((batch, width), tokenizer.pad_token_id or 0)
        labels, mask = torch.full((batch, width), -100), torch.zeros((batch, width), dtype=torch.long)
        for row, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
            ids[row, : len(whole)] = torch.tensor(whole)
            labels[row, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
            mask[row, : len(whole)] = 1
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss = float(out.loss)
        if step:
            seconds.append(time.perf_counter() - started)
            tokens += int(mask.sum())
    return {
        "tok_s": tokens / sum(seconds), "loss": loss, "peak_mb": _peak(),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speed(args: argparse.Namespace) -> dict[str, Any]:
    from shoal import hub
    from shoal.formats.convert import convert

    with tempfile.TemporaryDirectory() as work:
        folder, data = Path(work) / "model", Path(work) / "data.jsonl"
        convert(hub.resolve(args.model), folder, dtype="bfloat16")
        write_examples(data, 400)
        found: dict[str, list[dict[str, float]]] = {"shoal": [], "peft": []}
        for _ in range(args.pairs):
            for side in found:
                command = [sys.executable, __file__, "one", side, str(folder), str(data), "--steps", str(args.steps)]
                command += ["--batch", str(args.batch), "--length", str(args.length), "--rank", str(args.rank)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(side, found[side][-1], file=sys.stderr)
    ratios = sorted(a["tok_s"] / b["tok_s"] for a, b in zip(found["shoal"], found["peft"], strict=True))
    return {"speed": found, "ratio": statistics.median(ratios), "least": ratios[0], "greatest": ratios[-1]}


# ---- quality


METHODS = {  # name: method, the matrices of plain LoRA
    "placed": ("adapters", ("q_proj", "v_proj")),
    "lora all": ("lora", ("_proj",)),
    "full": ("full", ("q_proj", "v_proj")),
    "lora qv": ("lora", ("q_proj", "v_proj")),
}


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss after the same steps on the same data. The first seed tries every learning rate; the others run at
    each method's best. Every run is a file in the work folder, so the command goes on where it was stopped."""
    args.work.mkdir(parents=True, exist_ok=True)
    data, held_out = args.data, args.held_out
    if args.chinook is not None:
        data, held_out = sql_examples(args.chinook, args.work)
    elif data is None:
        data, held_out = args.work / "data.jsonl", args.work / "held_out.jsonl"
        write_examples(data, args.examples, seed=1)
        write_examples(held_out, 60, seed=2)
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in args.methods.split(",")}
    for name in out:
        for lr in args.full_lr if name == "full" else args.lr:
            out[name].append(_cell(args, data, held_out, name, lr, 0))
    for seed in range(1, args.seeds):
        for name in out:
            best = min((run for run in out[name] if "val_loss" in run), key=lambda run: run["val_loss"], default=None)
            if best is not None:
                out[name].append(_cell(args, data, held_out, name, best["lr"], seed))
    best_of = {name: _best(runs) for name, runs in out.items()}
    return {"quality": out, "best": best_of, "steps": args.steps, "row_tokens": args.rows * args.length}


def sql_examples(chinook: Path, work: Path) -> tuple[Path, Path]:
    """The training questions of `recipes/sql`, and every 20th of those about unseen names."""
    sys.path.insert(0, str(ROOT.parent / "recipes" / "sql"))
    import task

    database = work / "chinook.sqlite"
    task.build(chinook, database)
    found = task.questions(database)
    data, held_out = work / "data.jsonl", work / "held_out.jsonl"
    for path, examples in ((data, found["train"]), (held_out, found["values"][::20] + found["phrasings"][::20])):
        path.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
    return data, held_out


def _cell(args: argparse.Namespace, data: Path, held_out: Path, name: str, lr: float, seed: int) -> dict[str, Any]:
    """One run in a process of its own, or what it left behind."""
    path = args.work / f"{name.replace(' ', '-')}_{lr:g}_{seed}_{args.steps}x{args.rows}x{args.length}.json"
    if not path.exists() and args.report:
        return {"lr": lr, "seed": seed, "refused": "not run yet"}
    if not path.exists():
        command = [sys.executable, __file__, "one", "quality", str(data), str(held_out), name, str(lr), str(seed)]
        command += ["--model", args.model, "--steps", str(args.steps), "--rows", str(args.rows)]
        command += ["--length", str(args.length), "--budget", args.budget, "--work", str(args.work)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        path.write_text(done.stdout.splitlines()[-1])
    entry: dict[str, Any] = json.loads(path.read_text())
    print(name, entry, file=sys.stderr, flush=True)
    return entry


def _tuned(args: argparse.Namespace, data: str, held_out: str, name: str, lr: float, seed: int) -> dict[str, Any]:
    from shoal import hub
    from shoal.errors import ConfigError
    from shoal.formats.checkpoint import open_checkpoint
    from shoal.train.evaluate import evaluating, validation_loss
    from shoal.train.log import read_log
    from shoal.train.recipe import CheckpointSettings, ValidationSettings
    from shoal.tune.recipe import TuneSettings
    from shoal.tune.sft import Data, TuneRun, default_recipe, settle

    method, targets = METHODS[name]
    checkpoint = open_checkpoint(hub.resolve(args.model))
    tuning = TuneSettings(
        model=args.model, data=data, validation=held_out, method=method, budget=args.budget, targets=targets,
        keep_best=False,
    )  # fmt: skip
    recipe = default_recipe(checkpoint, tuning)
    recipe = replace(
        recipe, seed=seed, sequence_length=args.length, batch=args.rows, micro_batch=min(2, args.rows),
        optimiser=replace(recipe.optimiser, lr=lr), validation=ValidationSettings(every=args.steps),
        checkpoint=CheckpointSettings(every=1 << 30),
    )  # fmt: skip
    found = Data(recipe, checkpoint)
    assert found.held_out is not None
    started = time.process_time()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        try:
            run = TuneRun(settle(recipe, found, steps=args.steps, epochs=1), Path(folder), found, Quiet())
        except ConfigError as error:
            return {"lr": lr, "seed": seed, "refused": str(error)}
        placed = time.process_time()
        with evaluating(run.model):  # B is zero: the model as it came
            before = validation_loss(run.model, found.held_out, run.recipe, run.process)
        begun = time.process_time()
        run.go(args.steps)
        run.close()
        log = read_log(Path(folder) / "log.jsonl")
    return {
        "lr": lr, "seed": seed, "trained": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "before": before, "val_loss": log[-1]["val_loss"], "tokens": args.steps * args.rows * args.length,
        "place_seconds": placed - started, "cpu_seconds": time.process_time() - begun, "peak_mb": _peak(),
    }  # fmt: skip


def _best(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The learning rate of the lowest loss at the first seed, over all of its seeds."""
    runs = [run for run in runs if "val_loss" in run]
    if not runs:
        return None
    lr = min((run for run in runs if run["seed"] == 0), key=lambda run: run["val_loss"])["lr"]
    losses = [run["val_loss"] for run in runs if run["lr"] == lr]
    first = next(run for run in runs if run["lr"] == lr)
    tried = {f"{run['lr']:g}": round(run["val_loss"], 4) for run in runs if run["seed"] == 0}
    return {
        "lr": lr, "tried": tried, "trained": first["trained"], "before": first["before"], "seeds": len(losses),
        "mean": statistics.mean(losses), "least": min(losses), "greatest": max(losses),
        "place_seconds": statistics.mean(run["place_seconds"] for run in runs if run["lr"] == lr),
        "cpu_seconds": statistics.mean(run["cpu_seconds"] for run in runs if run["lr"] == lr),
        "peak_mb": max(run["peak_mb"] for run in runs if run["lr"] == lr),
    }  # fmt: skip


# ---- results


def write_results(what: str, result: dict[str, Any]) -> None:
    from peers_report import slug

    from shoal.cli.machine import describe_machine

    hardware = slug(describe_machine()["cpu"])
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"tune_{what}_{hardware}_{date.today().isoformat()}"
    command = " ".join(["python", "benchmarks/tune.py", *(word for word in sys.argv[1:] if word != "--report")])
    stem.with_suffix(".json").write_text(json.dumps({"command": command, **result}, indent=1) + "\n")
    lines = [f"# Tuning: {what}", "", f"`{command}`", ""]
    if what == "speed":
        lines += ["| side | tokens/s, median | peak MB | trained |", "|---|---|---|---|"]
        for side, runs in result["speed"].items():
            rate, peak = (statistics.median(run[key] for run in runs) for key in ("tok_s", "peak_mb"))
            lines.append(f"| {side} | {rate:.0f} | {peak:.0f} | {runs[0]['trained']:.0f} |")
        lines += ["", f"Ratio {result['ratio']:.2f} ({result['least']:.2f}–{result['greatest']:.2f})."]
    else:
        lines += [f"{result['steps']} steps of {result['row_tokens']} packed tokens.", ""]
        lines += _quality_table(result["best"])
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(stem.with_suffix(".md").read_text())


def _quality_table(best_of: dict[str, dict[str, Any] | None]) -> list[str]:
    full = best_of.get("full")
    lines = [
        "| method | trained | learning rate | seeds | held-out loss, mean (least–greatest) | share of full's gain "
        "| CPU s: placing, steps | peak MB | loss of the first seed by learning rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, best in best_of.items():
        if best is None:
            continue
        span = f"{best['mean']:.4f} ({best['least']:.4f}–{best['greatest']:.4f})"
        gain = (best["before"] - best["mean"]) / (full["before"] - full["mean"]) if full else float("nan")
        lines.append(
            f"| {name} | {best['trained']:.0f} | {best['lr']:g} | {best['seeds']} | {span} | {gain:.1%} "
            f"| {best['place_seconds']:.0f}, {best['cpu_seconds']:.0f} | {best['peak_mb']:.0f} "
            f"| {', '.join(f'{rate}: {loss}' for rate, loss in best['tried'].items())} |"
        )
    before = next((best["before"] for best in best_of.values() if best), float("nan"))
    return [*lines, "", f"Before tuning: {before:.4f}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "quality", "one"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="examples of a step (speed)")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--data", type=Path, help="examples to tune on (quality); else made-up order slips")
    parser.add_argument("--chinook", type=Path, help="or the fixture that recipes/sql makes its questions from")
    parser.add_argument("--held-out", type=Path, help="examples to judge by, with --data")
    parser.add_argument("--rows", type=int, default=2, help="packed rows of a step (quality)")
    parser.add_argument("--methods", default="placed,lora all,full,lora qv", help="which to compare (quality)")
    parser.add_argument("--report", action="store_true", help="run nothing, show what there is (quality)")
    parser.add_argument("--work", type=Path, default=Path("build/tune"), help="where finished runs are kept (quality)")
    parser.add_argument("--budget", default="0.3%")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--full-lr", type=float, nargs="+", default=[1e-4, 2e-4])
    args = parser.parse_args()
    if (args.data is None) != (args.held_out is None):
        parser.error("--data and --held-out go together")
    if args.what == "one" and args.rest[0] == "quality":
        _, data, held_out, name, lr, seed = args.rest
        print(json.dumps(_tuned(args, data, held_out, name, float(lr), int(seed))))
        return
    if args.what == "one":
        side, folder, data = args.rest
        if side == "shoal":
            result = ours(folder, Path(data), args.steps, args.batch, args.length, args.rank)
        else:
            result = theirs(folder, Path(data), args.steps, args.batch, args.rank)
        print(json.dumps(result))
        return
    write_results(args.what, speed(args) if args.what == "speed" else quality(args))


if __name__ == "__main__":
    main()
