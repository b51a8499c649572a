"""Queueing, cancelling, loading, stopping: what happens around the generations."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.server.conftest import FakeLLM, Running, running, wait_for

from shoal.server.errors import ApiError
from shoal.server.worker import EngineWorker

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def slow() -> Iterator[tuple[Running, threading.Event]]:
    """A server whose engine waits at every token until the event is set (10 s at most, so that no test hangs)."""
    llm, gate = FakeLLM(), threading.Event()
    llm.step = lambda produced: (gate.wait(10), None)[1]
    with running(lambda: llm, max_queue=2) as box:
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


def test_a_client_that_leaves_a_stream_frees_the_engine(slow: tuple[Running, threading.Event]) -> None:
    server, _ = slow
    server.llm.step = lambda produced: time.sleep(0.02)
    server.llm.reply = "x" * 90
    with server.http.stream("POST", CHAT, json={**ASK, "stream": True}) as response:
        next(response.iter_lines())
        wait_for(lambda: server.llm.open_streams == 1)
    wait_for(lambda: server.llm.open_streams == 0, seconds=1)
    assert server.llm.finished == 0
    assert server.http.post(CHAT, json={**ASK, "max_tokens": 1}).status_code == 200


def test_a_client_that_leaves_before_the_whole_answer_frees_the_engine(slow: tuple[Running, threading.Event]) -> None:
    server, _ = slow
    server.llm.step = lambda produced: time.sleep(0.02)
    server.llm.reply = "x" * 90
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(CHAT, json=ASK, timeout=0.3)
    wait_for(lambda: server.llm.open_streams == 0, seconds=1)
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
    llm.step = lambda produced: time.sleep(0.02)
    llm.reply = "x" * 90
    with running(lambda: llm) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.http.post, CHAT, json=ASK)
        wait_for(lambda: llm.open_streams == 1)
        server.worker.stop()
        wait_for(lambda: llm.open_streams == 0, seconds=1)
        assert llm.finished == 0
        assert server.http.get("/health").json()["error"]["code"] == "model_stopping"
        answer.result()


def test_a_cancelled_job_is_closed_on_the_engine_s_thread_while_others_still_hold_it() -> None:
    closed_by: list[str] = []

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed_by.append(threading.current_thread().name)

    async def use() -> None:
        worker = EngineWorker(FakeLLM)  # type: ignore[arg-type]
        worker.start()
        source = endless()
        results = worker.submit(source)
        assert await results.next(10) == 1
        results.cancel()
        while not closed_by:
            await asyncio.sleep(0.01)
        assert source.gi_frame is None
        worker.stop()
        assert not worker.alive

    asyncio.run(asyncio.wait_for(use(), 10))
    assert closed_by == ["shoal-engine"]


def test_what_a_job_raises_reaches_its_reader_and_ends_there() -> None:
    def broken() -> Generator[int, None, None]:
        yield 1
        raise ValueError("no more")

    async def use() -> None:
        worker = EngineWorker(FakeLLM)  # type: ignore[arg-type]
        worker.start()
        results = worker.submit(broken())
        assert await results.next() == 1
        with pytest.raises(ValueError, match="no more"):
            await results.next()
        assert [item async for item in results] == []
        assert [item async for item in worker.submit(n for n in range(3))] == [0, 1, 2]
        worker.stop()
        with pytest.raises(ApiError):
            worker.submit(broken())

    asyncio.run(asyncio.wait_for(use(), 10))
