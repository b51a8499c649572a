"""Queueing, cancelling, loading, stopping: what happens around the generations."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.server.conftest import FakeLLM, Running, running, wait_for

from shoal.engine import SamplingParams
from shoal.errors import RequestError
from shoal.server.errors import ApiError
from shoal.server.worker import EngineWorker

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def slow() -> Iterator[tuple[Running, threading.Event]]:
    """A server whose engine waits at every token until the event is set (10 s at most, so that no test hangs)."""
    llm, gate = FakeLLM(), threading.Event()
    llm.before_token = lambda produced: (gate.wait(10), None)[1]
    with running(lambda: llm, parallel=1, max_queue=2) as box:
        yield box, gate
        gate.set()


def test_a_full_queue_refuses_and_says_when_to_come_back(slow: tuple[Running, threading.Event]) -> None:
    server, gate = slow
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.http.post, CHAT, json=ASK) for _ in range(3)]
        wait_for(lambda: server.worker.num_running == 1 and server.worker.num_waiting == 2)
        refused = server.http.post(CHAT, json=ASK)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        health = server.http.get("/health")  # still answers
        assert (health.status_code, health.json()) == (200, {"status": "ok", "running": 1, "waiting": 2})
        gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
    assert server.http.post(CHAT, json=ASK).status_code == 200


def test_a_request_that_was_late_before_it_ran_does_not_count_as_a_long_one() -> None:
    llm = FakeLLM()
    llm.before_token = lambda produced: time.sleep(0.02)
    llm.reply = "x" * 50
    with running(lambda: llm, parallel=1, max_queue=1) as server, ThreadPoolExecutor(3) as pool:
        answer = pool.submit(server.http.post, CHAT, json=ASK)
        wait_for(lambda: server.worker.num_running == 1)
        assert server.http.post(CHAT, json={**ASK, "timeout": 0.05}).status_code == 408
        assert int(server.worker.busy().headers["retry-after"]) < 10
        assert answer.result().status_code == 200


def test_without_a_queue_one_request_at_a_time_is_served() -> None:
    llm, gate = FakeLLM(), threading.Event()
    llm.before_token = lambda produced: (gate.wait(10), None)[1]
    with running(lambda: llm, parallel=1, max_queue=0) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.http.post, CHAT, json=ASK)
        wait_for(lambda: server.worker.num_running == 1)
        assert server.http.post(CHAT, json=ASK).status_code == 429
        gate.set()
        assert answer.result().status_code == 200


def test_a_client_that_leaves_a_stream_frees_the_engine(slow: tuple[Running, threading.Event]) -> None:
    server, _ = slow
    server.llm.before_token = lambda produced: time.sleep(0.02)
    server.llm.reply = "x" * 90
    with server.http.stream("POST", CHAT, json={**ASK, "stream": True}) as response:
        lines = response.iter_lines()  # kept: the client leaves with it
        next(lines)
        wait_for(lambda: len(server.llm.running) == 1)
    wait_for(lambda: server.llm.running == [], seconds=1)
    assert server.llm.finished == 0
    assert server.http.post(CHAT, json={**ASK, "max_tokens": 1}).status_code == 200


def test_a_client_that_leaves_before_the_whole_answer_frees_the_engine(slow: tuple[Running, threading.Event]) -> None:
    server, _ = slow
    server.llm.before_token = lambda produced: time.sleep(0.02)
    server.llm.reply = "x" * 90
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(CHAT, json=ASK, timeout=0.3)
    wait_for(lambda: server.llm.running == [], seconds=1)
    assert server.llm.finished == 0


def test_a_client_that_leaves_the_queue_gives_its_place_up(slow: tuple[Running, threading.Event]) -> None:
    server, gate = slow
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.http.post, CHAT, json=ASK)
        wait_for(lambda: server.worker.num_running == 1)
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(CHAT, json=ASK, timeout=0.3)
        wait_for(lambda: server.worker.num_waiting == 0, seconds=1)
        gate.set()
        assert answer.result().status_code == 200
    assert server.llm.finished == 1


def test_a_cancelled_neighbour_changes_nothing(slow: tuple[Running, threading.Event]) -> None:
    server, gate = slow
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.http.post, CHAT, json={**ASK, "stream": True}, timeout=0.3)
        wait_for(lambda: server.worker.num_running == 1)
        second = pool.submit(server.http.post, CHAT, json=ASK)
        with pytest.raises(httpx.ReadTimeout):
            first.result()
        gate.set()
        assert second.result().json()["choices"][0]["message"]["content"] == "Hello, wörld"


def test_a_silent_stream_is_kept_alive(slow: tuple[Running, threading.Event], monkeypatch: pytest.MonkeyPatch) -> None:
    server, gate = slow
    monkeypatch.setattr("shoal.server.sse.PING_SECONDS", 0.05)
    with server.http.stream("POST", CHAT, json={**ASK, "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ping"
        gate.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_the_server_answers_while_the_model_loads() -> None:
    go = threading.Event()

    def load() -> FakeLLM:
        assert go.wait(10)
        return FakeLLM()

    with running(load, ready=False) as server:
        for response in (server.http.get("/health"), server.http.post(CHAT, json=ASK)):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "model_loading"
            assert "retry-after" in response.headers
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "fake"
        assert server.http.get("/version").status_code == 200
        go.set()
        wait_for(lambda: server.http.get("/health").status_code == 200)
        assert server.http.post(CHAT, json=ASK).status_code == 200


def test_a_model_that_does_not_load_is_reported() -> None:
    def load() -> FakeLLM:
        raise OSError("no such file")

    told = threading.Event()
    with running(load, ready=False, on_failure=told.set) as server:
        assert told.wait(5)
        response = server.http.get("/health")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "model_failed"
        assert isinstance(server.worker.error, OSError)


def test_stopping_ends_a_running_generation() -> None:
    llm = FakeLLM()
    llm.before_token = lambda produced: time.sleep(0.02)
    llm.reply = "x" * 90
    with running(lambda: llm) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.http.post, CHAT, json=ASK)
        wait_for(lambda: len(llm.running) == 1)
        server.worker.stop()
        wait_for(lambda: llm.running == [], seconds=1)
        assert llm.finished == 0
        assert server.http.get("/health").json()["error"]["code"] == "model_stopping"
        answer.result()


def test_answers_are_written_side_by_side_up_to_the_limit() -> None:
    llm, gate = FakeLLM(), threading.Event()
    llm.before_token = lambda produced: (gate.wait(10), None)[1]
    with running(lambda: llm, parallel=3, max_queue=2) as server, ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(server.http.post, CHAT, json=ASK) for _ in range(5)]
        wait_for(lambda: server.worker.num_waiting + server.worker.num_running == 5)
        assert server.http.post(CHAT, json=ASK).status_code == 429
        gate.set()
        texts = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == ["Hello, wörld"] * 5
    assert llm.most_running == 3


def test_the_choices_of_one_request_grow_together_and_usage_comes_last() -> None:
    llm = FakeLLM()
    with running(lambda: llm, parallel=4) as server:
        body = {**ASK, "n": 4, "stream": True, "stream_options": {"include_usage": True}}
        with server.http.stream("POST", CHAT, json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        text = {**{key: value for key, value in body.items() if key != "messages"}, "prompt": ["a", "b"], "n": 2}
        with server.http.stream("POST", "/v1/completions", json=text) as response:
            text_lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert llm.most_running == 4
    for kept in (lines, text_lines):
        assert kept[-1] == "[DONE]"
        events = [json.loads(line) for line in kept[:-1]]
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 4 * 13
        assert all(event["usage"] is None for event in events[:-1])
        order = [event["choices"][0]["index"] for event in events[:-1]]
        assert set(order[: len(order) // 3]) == {0, 1, 2, 3}, "one after the other"


def test_a_request_with_more_choices_than_places_is_served_alone() -> None:
    llm = FakeLLM()
    with running(lambda: llm, parallel=2) as server:
        answer = server.http.post(CHAT, json={**ASK, "n": 8})
    assert len(answer.json()["choices"]) == 8


def test_one_failing_answer_leaves_its_neighbours_alone() -> None:
    llm, gate = FakeLLM(), threading.Event()
    calls = iter(range(1000))

    def step(produced: int) -> None:
        gate.wait(10)
        if next(calls) == 4:
            raise RequestError("logit_bias", "leaves no token to choose")

    llm.before_token = step
    with running(lambda: llm, parallel=3) as server, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.http.post, CHAT, json=ASK) for _ in range(3)]
        wait_for(lambda: server.worker.num_waiting + server.worker.num_running == 3)
        gate.set()
        statuses = sorted(answer.result().status_code for answer in answers)
        assert statuses == [200, 200, 400]
        assert llm.running == []


def test_a_fault_of_the_engine_itself_is_told_to_all_and_survived() -> None:
    llm = FakeLLM()
    llm.step_error = ZeroDivisionError("a secret of the server")
    with running(lambda: llm) as server:
        answer = server.http.post(CHAT, json=ASK)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        llm.step_error = None
        assert server.http.post(CHAT, json=ASK).status_code == 200


def test_a_fault_of_the_worker_itself_ends_the_server_and_tells_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: EngineWorker) -> None:
        raise ZeroDivisionError

    told = threading.Event()
    with running(FakeLLM, on_failure=told.set) as server:
        monkeypatch.setattr(EngineWorker, "_step", broken)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.http.post, CHAT, json=ASK)
            assert told.wait(5)
            assert answer.result().status_code == 503
        assert server.http.get("/health").json()["error"]["code"] == "model_failed"
        assert isinstance(server.worker.error, ZeroDivisionError)
        assert server.http.post(CHAT, json=ASK).status_code == 503


def test_a_client_that_leaves_gives_its_place_up_in_the_middle_of_a_step(
    slow: tuple[Running, threading.Event],
) -> None:
    server, gate = slow
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(CHAT, json=ASK, timeout=0.3)
    wait_for(lambda: server.llm.running == [], seconds=1)
    assert not gate.is_set()  # the engine is still inside its first step


def test_generations_start_on_the_engine_s_thread_and_end_for_their_reader_when_cancelled() -> None:
    llm = FakeLLM()
    llm.reply = "x" * 90
    llm.before_token = lambda produced: time.sleep(0.01)

    async def use() -> None:
        worker = EngineWorker(lambda: llm)  # type: ignore[arg-type,return-value]
        worker.start()
        generation = llm.prepare([1], SamplingParams())
        results = worker.submit([generation])  # type: ignore[list-item]
        assert (await results.next(10))[0] == 0  # type: ignore[index]
        assert generation.started_by == "shoal-engine"
        results.cancel()
        assert llm.running == []
        assert len([piece async for piece in results]) < 80
        worker.stop()
        assert not worker.alive

    asyncio.run(asyncio.wait_for(use(), 10))


def test_what_a_generation_raises_reaches_its_reader_and_ends_there() -> None:
    llm = FakeLLM()

    def fail(produced: int) -> None:
        if produced == 2:
            raise ValueError("no more")

    async def use() -> None:
        worker = EngineWorker(lambda: llm)  # type: ignore[arg-type,return-value]
        worker.start()
        llm.before_token = fail
        results = worker.submit([llm.prepare([1], SamplingParams())])  # type: ignore[list-item]
        assert [(await results.next())[1].text for _ in range(2)] == ["H", "e"]  # type: ignore[index]
        with pytest.raises(ValueError, match="no more"):
            await results.next()
        assert [item async for item in results] == []
        llm.before_token = lambda produced: None
        again = worker.submit([llm.prepare([1], SamplingParams())])  # type: ignore[list-item]
        assert "".join([chunk.text async for _, chunk in again]) == "Hello, wörld"
        worker.stop()
        with pytest.raises(ApiError):
            worker.submit([llm.prepare([1], SamplingParams())])  # type: ignore[list-item]

    asyncio.run(asyncio.wait_for(use(), 10))


def test_stopping_tells_who_runs_and_who_waits() -> None:
    llm = FakeLLM()
    llm.reply = "x" * 90
    llm.before_token = lambda produced: time.sleep(0.01)

    async def use() -> None:
        worker = EngineWorker(lambda: llm, parallel=1)  # type: ignore[arg-type,return-value]
        worker.start()
        both = [worker.submit([llm.prepare([1], SamplingParams())]) for _ in range(2)]  # type: ignore[list-item]
        await both[0].next()
        worker.stop()
        for results in both:
            with pytest.raises(ApiError) as stopped:
                async for _ in results:
                    pass
            assert stopped.value.status == 503

    asyncio.run(asyncio.wait_for(use(), 10))
