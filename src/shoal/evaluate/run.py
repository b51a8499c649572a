"""Run tasks on a model: ours by name, a user's own lm-eval task by its YAML file."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import FileError, MissingExtraError, ShoalError
from shoal.evaluate import scoring, sources
from shoal.evaluate.report import Score, scores_of

if TYPE_CHECKING:
    from shoal.engine import LLM

TASKS = Path(__file__).parent / "tasks"
Progress = Callable[[int, int], None]


def task_names() -> list[str]:
    """The shipped tasks."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def evaluate(
    llm: LLM,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores of a model, every metric of every task.

    Args:
        tasks: names of shipped tasks (`task_names`), `sql:FILE.jsonl`, or paths of YAML files in lm-eval's format.
        limit: only the first so many items of each task.
        num_fewshot: worked items before each question; the task's own number if None.
        chat: put every question into the model's chat format.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ShoalError: a task is unknown, its file wrong, its items not on this machine.
    """
    configs = [read_task(name) for name in tasks]
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        from shoal.evaluate.harness import EngineLM
    except ImportError as error:
        raise MissingExtraError("eval", "shoal eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = simple_evaluate(
        model=EngineLM(llm, progress), tasks=configs, limit=limit, num_fewshot=num_fewshot, apply_chat_template=chat,
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=1000,
        confirm_run_unsafe_code=True,
    )  # fmt: skip
    assert found is not None
    return scores_of(found)


def read_task(name: str) -> dict[str, Any]:
    """A task in lm-eval's form, its items attached if it is one of ours."""
    stem, _, file = name.partition(":")
    path = TASKS / f"{stem}.yaml"
    if name.endswith((".yaml", ".yml")):
        return _read_yaml(Path(name))
    if "/" in stem or not path.exists():
        close = difflib.get_close_matches(stem, task_names(), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ShoalError(f"tasks: {name!r} is neither one of {', '.join(task_names())} nor a YAML file{hint}")
    config = _read_yaml(path)
    data, score = config.pop("data"), config.pop("score", None)
    if file and data.get("source") != "sql":
        raise ShoalError(f"tasks: {stem} takes no file, got {file!r}")
    items = sources.load(data, Path(file) if file else None)
    if score is not None:
        config["process_results"] = scoring.SCORES[score]
    return {"test_split": "test", "num_fewshot": 0, **config, "custom_dataset": _dataset(items)}


def _dataset(items: list[dict[str, Any]]) -> Callable[..., Mapping[str, Any]]:
    def make(**_: object) -> Mapping[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(items)}

    return make


def _read_yaml(path: Path) -> dict[str, Any]:
    """YAML without tags: no objects, no functions named by a file."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("eval", "shoal eval") from error
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise FileError(path, f"is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise FileError(path, "must be a mapping with the name of the task", item="task")
    return config
