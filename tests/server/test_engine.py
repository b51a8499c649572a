"""The server over the real engine with a tiny random model: together as alone, and what is left when clients leave."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.engine.conftest import V2, Checkpoint, Gate, assert_idle, open_tiny, set_steps, tiny
from tests.server.conftest import Running, running, wait_for

from shoal import LLM

URL = "/v1/completions"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return tiny(V2)[1]


@pytest.fixture
def served(checkpoint: Checkpoint) -> Iterator[tuple[Running, LLM]]:
    llm = open_tiny(checkpoint, cache_tokens=1024, speculate=2)
    with running(lambda: llm, parallel=8) as box:
        yield box, llm
    assert_idle(llm)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


def ask(box: Running, **body: Any) -> dict[str, Any]:
    answer = box.http.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_answers_written_together_are_those_written_alone(served: tuple[Running, LLM]) -> None:
    box, _ = served
    bodies = [
        {"prompt": prompt(3 + 17 * index, index % 3), "max_tokens": 30, "seed": index, "logprobs": 2}
        for index in range(16)
    ]
    alone = [ask(box, **body)["choices"] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: ask(box, **body)["choices"], bodies))
    assert together == alone


def test_choices_written_together_are_those_of_their_seeds(served: tuple[Running, LLM]) -> None:
    box, _ = served
    body = {"prompt": [prompt(150), prompt(5)], "max_tokens": 12, "seed": 7}
    together = [choice["text"] for choice in ask(box, **body, n=4)["choices"]]
    alone = [
        ask(box, **{**body, "prompt": one, "seed": 7 + k})["choices"][0]["text"]
        for one in body["prompt"]
        for k in range(4)
    ]
    assert together == alone
    assert len(set(together)) == 8


def test_scores_of_a_prompt_do_not_depend_on_neighbours(served: tuple[Running, LLM]) -> None:
    box, llm = served
    ids = prompt(300)
    body = {"prompt": ids, "echo": True, "logprobs": 3, "max_tokens": 0}
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(ask, box, prompt=prompt(50, k), max_tokens=40) for k in range(3)]
        scored = ask(box, **body)["choices"][0]["logprobs"]
        for other in others:
            other.result()
    assert scored["token_logprobs"][0] is None
    assert scored["token_logprobs"][1:] == [entry.logprob for entry in llm.score(ids)[1:]]
    assert all(len(top) in (3, 4) for top in scored["top_logprobs"][1:])
    longer = ask(box, **{**body, "max_tokens": 5, "temperature": 0})["choices"][0]
    assert len(longer["logprobs"]["tokens"]) == 305
    assert longer["logprobs"]["token_logprobs"][:300] == scored["token_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_pages(
    served: tuple[Running, LLM], stream: bool
) -> None:
    box, llm = served
    set_steps(llm, step=100)
    gate = Gate(llm)
    gate.hold_from = 4
    gate.open.clear()
    with pytest.raises(httpx.ReadTimeout):
        box.http.post(URL, json={"prompt": prompt(900), "max_tokens": 60, "stream": stream}, timeout=1)
    wait_for(lambda: llm.load.pages_in_use == 0, seconds=1)
    assert (llm.load.running, llm.load.waiting) == (0, 0)
    assert gate.steps == 4 and not gate.open.is_set()  # still inside a step of the prompt
    gate.open.set()
    wait_for(lambda: box.worker.num_running == 0, seconds=1)


def test_a_client_that_leaves_a_stream_frees_its_pages_and_disturbs_nobody(served: tuple[Running, LLM]) -> None:
    box, llm = served
    body = {"prompt": prompt(200), "max_tokens": 200, "seed": 1}
    expected = ask(box, **body)["choices"]
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(ask, box, **body)
        for _ in range(5):
            with box.http.stream("POST", URL, json={**body, "stream": True, "max_tokens": 800}) as response:
                lines = response.iter_lines()
                for _ in range(3):
                    next(lines)
        assert kept.result()["choices"] == expected
    wait_for(lambda: llm.load.pages_in_use == 0, seconds=1)


def test_a_request_that_fails_late_is_an_event_of_its_own_stream_only(served: tuple[Running, LLM]) -> None:
    box, llm = served
    choose = llm._core._choose

    def failing(sequence: Any, draft: Any, rows: Any, best: list[int]) -> int:
        if sequence.max_tokens == 77 and sequence.produced >= 3:
            raise MemoryError
        return choose(sequence, draft, rows, best)

    llm._core._choose = failing  # type: ignore[method-assign]
    body = {"prompt": prompt(20), "stream": True, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(box.http.post, URL, json={**body, "max_tokens": 76})
        bad = pool.submit(box.http.post, URL, json={**body, "max_tokens": 77})
        ends = [answer.result().text.strip().split("\n\n")[-2:] for answer in (good, bad)]
    assert json.loads(ends[0][0].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert json.loads(ends[1][0].removeprefix("data: "))["error"]["code"] == "out_of_memory"
    assert [end[1] for end in ends] == ["data: [DONE]"] * 2


def test_a_bias_that_forbids_everything_is_refused_by_name(served: tuple[Running, LLM]) -> None:
    box, _ = served
    bias = {str(token): -100 for token in range(97)}
    error = box.http.post(URL, json={"prompt": [1], "logit_bias": bias})
    assert (error.status_code, error.json()["error"]["param"]) == (400, "logit_bias")
