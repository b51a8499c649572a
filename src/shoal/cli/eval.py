"""`shoal eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.console import DEFAULT_MODEL, Meter, print_table, write_json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.evaluate import Score


def run(
    model: Annotated[str, typer.Argument(help="Short name, Hugging Face folder or GGUF file.")] = DEFAULT_MODEL,
    tasks: Annotated[
        str, typer.Option(metavar="NAME,…", help="Shipped tasks, sql:FILE.jsonl, or YAML files of lm-eval's own kind.")
    ] = "english,code,continuation,hellaswag",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items of each task.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Worked items before each question.")] = None,
    chat: Annotated[bool, typer.Option(help="Ask in the model's chat format.")] = False,
    weights: Annotated[str, typer.Option(help="auto, f32, bf16, q8, q4 or q4m.")] = "auto",
    cache: Annotated[str, typer.Option(help="bf16, int8 or f32.")] = "bf16",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a model on tasks, with 95% intervals.

    lm-eval asks the questions, Shoal's engine answers them. Shipped tasks: english and code (perplexity of held-out
    text), continuation (which of four texts goes on), hellaswag, truthfulqa, gsm8k, humaneval (programs are run), sql
    (queries are run). Items come from installed packages or from Python itself; nothing is fetched.

    humaneval runs what the model wrote, in a process with limits on time, memory, files and network. That keeps
    accidents harmless, not attacks.

    [bold]Examples[/bold]
      shoal eval smollm2-135m
      shoal eval ./model --tasks humaneval,gsm8k --limit 50 --chat --json
      shoal eval ./model --tasks sql:questions.jsonl
    """
    from shoal.engine import LLM
    from shoal.evaluate import evaluate
    from shoal.evaluate.run import read_task

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("tasks", "names no task")
    for name in names:
        read_task(name)
    llm = LLM(model, weights=weights, cache=cache, threads=threads)
    with Meter("evaluating") as meter:
        scores = evaluate(llm, names, limit=limit, num_fewshot=fewshot, chat=chat, progress=meter)
    if as_json:
        write_json(
            {"model": str(llm.path), "weights": weights, "cache": cache, "scores": [asdict(one) for one in scores]}
        )
    else:
        print_table([_row(one) for one in scores], ("task", "metric", "value", "95% interval", "items"))


def _row(score: Score) -> dict[str, str]:
    interval = "" if score.low is None else f"{score.low:.4f} – {score.high:.4f}"
    arrow = "↑" if score.higher_is_better else "↓"
    return {
        "task": score.task, "metric": f"{score.metric} {arrow}", "value": f"{score.value:.4f}",
        "95% interval": interval, "items": str(score.items),
    }  # fmt: skip
