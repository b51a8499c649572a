"""What operators rely on: metrics, deadlines, keys, origins, logs, costs, limits on connections."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tests.server.conftest import FakeLLM, Running, running, wait_for
from typer.main import get_command

from shoal import settings
from shoal.cli import serve as cli
from shoal.errors import ConfigError, FileError
from shoal.server.app import Policy, create_app
from shoal.server.keys import Keys, read_keys
from shoal.server.metrics import Histogram
from shoal.server.page.routes import OPEN_PATHS
from shoal.server.protocol_http import PatientProtocol
from shoal.server.run import is_loopback
from shoal.server.service import Service
from shoal.server.worker import EngineWorker

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def samples(server: Running) -> dict[str, float]:
    text = server.http.get("/metrics").text
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happened() -> None:
    llm = FakeLLM()
    with running(lambda: llm, price_per_hour=3.6) as server:
        for stream in (False, True):
            assert server.http.post(CHAT, json={**ASK, "stream": stream}).status_code == 200
        server.http.post(CHAT, json={**ASK, "temperature": -1})
        server.http.post(CHAT, json={**ASK, "model": "other"})
        server.http.post(CHAT, json=ASK, headers={"origin": "https://other.example"})
        llm.before_token = lambda produced: 1 // 0
        for stream in (False, True):
            server.http.post(CHAT, json={**ASK, "stream": stream})
        found = samples(server)
    assert found["shoal_answers_total[stop]"] == 2
    assert found["shoal_requests_refused_total[invalid_value]"] == 1
    assert found["shoal_requests_refused_total[model_not_found]"] == 1
    assert found["shoal_requests_refused_total[cross_origin]"] == 1
    assert found["shoal_requests_refused_total[internal_error]"] == 2, "one whole, one in mid-stream"
    assert found["shoal_generation_tokens_total"] == 26
    assert found["shoal_prompt_tokens_total"] == found["shoal_prefix_cache_queries_total"] == 4
    assert found["shoal_prefix_cache_hits_total"] == 0
    assert found["shoal_requests_running"] == found["shoal_requests_waiting"] == 0
    for name in ("queue", "first_token", "request"):
        assert found[f"shoal_{name}_seconds_count"] == found[f"shoal_{name}_seconds_bucket[+Inf]"] == 2
    assert found["shoal_inter_token_seconds_count"] == 24
    assert found["shoal_cache_usage_ratio"] == 0.25
    assert found["process_resident_memory_bytes"] > 1e6
    assert "shoal_cost_usd_total" in found


def test_the_speed_of_an_answer_of_one_token_is_none() -> None:
    with running(FakeLLM) as server:
        for count, speed in ((1, 0.0), (3, 20.0)):  # the fake decodes for a tenth of a second
            timings = server.http.post(CHAT, json={**ASK, "max_tokens": count}).json()["timings"]
            assert (timings["predicted_n"], timings["predicted_per_second"]) == (count, speed)


def test_a_bucket_holds_its_own_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.1, 0.5, 1.0, 7.0):
        histogram.add(value)
    histogram.add(0.2, times=3)
    assert histogram.buckets() == [("0.1", 1), ("1.0", 6), ("+Inf", 7)]
    assert histogram.total == pytest.approx(9.2)


@pytest.fixture
def held() -> Iterator[tuple[Running, threading.Event]]:
    """A server whose engine stands still until the event, a tenth of a second a step at most."""
    llm, gate = FakeLLM(), threading.Event()
    llm.before_token = lambda produced: (gate.wait(0.1), None)[1]
    llm.reply = "x" * 90
    with running(lambda: llm, parallel=1, max_queue=4, seconds=20.0) as server:
        yield server, gate
        gate.set()


def test_a_deadline_ends_running_and_waiting_requests(held: tuple[Running, threading.Event]) -> None:
    server, _ = held
    with server.http.stream("POST", CHAT, json={**ASK, "stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        late = server.http.post(CHAT, json={**ASK, "timeout": 0.3})
        assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
    wait_for(lambda: server.worker.num_running == 0)
    text = server.http.post(CHAT, json={**ASK, "timeout": 0.35, "stream": True}).text.strip().split("\n\n")
    assert json.loads(text[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert text[-1] == "data: [DONE]"
    wait_for(lambda: server.llm.running == [])
    assert samples(server)["shoal_requests_cancelled_total"] == 1


def test_a_client_may_not_lengthen_the_deadline() -> None:
    llm = FakeLLM()
    llm.before_token = lambda produced: time.sleep(0.02)
    llm.reply = "x" * 90
    with running(lambda: llm, seconds=0.2) as server:
        assert server.http.post(CHAT, json={**ASK, "timeout": 60}).status_code == 408
        assert server.http.post(CHAT, json={**ASK, "timeout": 0}).json()["error"]["param"] == "timeout"


def test_a_reader_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.server.sse.SEND_SECONDS", 0.2)
    llm = FakeLLM()
    llm.max_context = 1 << 30
    llm.reply = "x" * 200_000
    with running(lambda: llm) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({**ASK, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            wait_for(lambda: server.worker.num_running == 1)
            wait_for(lambda: server.llm.running == [], seconds=30)
            assert llm.finished == 0
        assert server.http.post(CHAT, json={**ASK, "max_tokens": 1}).status_code == 200


def test_idle_and_trickling_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.server.protocol_http.IDLE_SECONDS", 0.2)
    with running(FakeLLM) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for opening in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow"):
            with socket.create_connection((host, int(port)), timeout=10) as sock:
                sock.sendall(opening)
                assert sock.recv(100) == b""
        assert server.http.get("/health").status_code == 200


def test_a_connection_that_is_kept_for_the_next_request_outlives_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    real = PatientProtocol._look_around
    monkeypatch.setattr("shoal.server.protocol_http.IDLE_SECONDS", 0.2)
    monkeypatch.setattr(PatientProtocol, "_look_around", lambda self: (looks.append(self), real(self))[1])
    with running(FakeLLM) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            for _ in range(2):
                sock.sendall(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                answer = sock.recv(1000)
                while b"}" not in answer:  # head and body may come apart
                    answer += sock.recv(1000)
                assert answer.startswith(b"HTTP/1.1 200")
                looks.clear()
                wait_for(lambda: len(looks) > 2)
            sock.sendall(b"GET /version HTTP/1.1\r\nX-Slow")  # a head that never ends does not, even there
            assert sock.recv(100) == b""


def test_heads_have_bounds() -> None:
    with running(FakeLLM) as server:
        host, port = server.url.removeprefix("http://").split(":")
        many = b"".join(b"X-%d: 1\r\n" % index for index in range(10_000))
        for fields in (b"X-Large: " + b"a" * (1 << 20) + b"\r\n", many):
            with socket.create_connection((host, int(port)), timeout=10) as sock:
                try:
                    sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + fields + b"\r\n")
                    answer = sock.recv(100)
                except ConnectionError:
                    answer = b""
                assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        assert server.http.get("/health").status_code == 200


def app_with(policy: Policy) -> TestClient:
    service = Service(name="fake", worker=EngineWorker(FakeLLM))  # type: ignore[arg-type]
    return TestClient(create_app(service, policy), base_url="http://127.0.0.1")


def test_several_keys_open_and_the_admin_key_alone_opens_metrics() -> None:
    keys, admin = Keys(["first-key-1", "second-key-2"]), Keys(["admin-key-3"])

    def bearer(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    with app_with(Policy(keys=keys, admin_keys=admin)) as client:
        for key in ("first-key-1", "second-key-2"):
            assert client.get("/v1/models", headers=bearer(key)).status_code == 200
            assert client.get("/metrics", headers=bearer(key)).status_code == 401
        assert client.get("/metrics", headers=bearer("admin-key-3")).status_code == 200
        assert client.get("/v1/models", headers=bearer("admin-key-3")).status_code == 401
        for key in ("", "first-key-", "first-key-1 ", "x" * 50_000, "FIRST-KEY-1"):
            assert client.get("/v1/models", headers=bearer(key)).status_code == 401
    with app_with(Policy(keys=keys)) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=bearer("first-key-1")).status_code == 200
    assert not any("first-key-1" in str(value) for value in vars(keys).values())


def test_keys_come_from_files_and_bad_ones_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\n\n  first-key-1  \nsecond-key-2\n")
    assert read_keys(file) == ["first-key-1", "second-key-2"]
    file.write_text("# none\n")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(FileError):
            read_keys(path)
    for bad in ("", "short", "has a space", "x" * 600, "line\nbreak!"):
        with pytest.raises(ConfigError) as error:
            Keys([bad])
        assert not bad or bad not in str(error.value)


def test_only_named_origins_may_ask_from_elsewhere() -> None:
    friend, stranger = "https://friend.example", "https://stranger.example"
    wanted = "authorization,content-type,x-stainless-arch,x-stainless-os"  # what OpenAI's client sends from a browser
    asking = {"access-control-request-method": "POST", "access-control-request-headers": wanted}
    with app_with(Policy(origins=frozenset([friend]), keys=Keys(["first-key-1"]))) as client:
        allowed = client.options(CHAT, headers={"origin": friend, **asking})
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, friend)
        refused = client.options(CHAT, headers={"origin": stranger, **asking})
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
        key = {"authorization": "Bearer first-key-1"}
        assert client.get("/v1/models", headers={"origin": friend, **key}).status_code == 200
        assert client.get("/v1/models", headers={"origin": friend}).status_code == 401
        assert client.get("/v1/models", headers={"origin": stranger, **key}).status_code == 403


@pytest.mark.parametrize("kind", ["json", "text"])
def test_each_request_leaves_one_line_without_its_text(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    with running(FakeLLM, policy=Policy(log=kind)) as server:
        ask = {"messages": [{"role": "user", "content": "a secret"}]}
        answer = server.http.post(CHAT, json=ask, headers={"x-request-id": "my-1.id"})
        assert answer.headers["x-request-id"] == "my-1.id"
        forged = server.http.get("/nowhere%0Ashoal:%20forged%1b[31m", headers={"x-request-id": "a b"})
        assert re.fullmatch("[0-9a-f]{32}", forged.headers["x-request-id"])
        server.http.get("/health")
    lines = [line for line in capfd.readouterr().err.splitlines() if "request" in line]
    assert len(lines) == 2
    assert "secret" not in "".join(lines) and "\x1b" not in "".join(lines)
    if kind == "json":
        first, second = map(json.loads, lines)
        assert (first["id"], first["status"], first["path"], first["completion_tokens"]) == ("my-1.id", 200, CHAT, 13)
        assert second["status"] == 404


def test_prompts_are_logged_only_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    with running(FakeLLM, policy=Policy(log="json", log_prompts=True)) as server:
        server.http.post(CHAT, json=ASK)
    assert '"content":"Hi"' in capfd.readouterr().err


def test_an_answer_tells_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    llm.machine_seconds = 2.0
    with running(lambda: llm, price_per_hour=1.8) as server:
        usage = server.http.post(CHAT, json=ASK).json()["usage"]
    assert usage["cost_usd"] == pytest.approx(0.001)


def test_every_flag_has_a_twin_in_the_environment() -> None:
    import typer

    app = typer.Typer()
    app.command()(cli.run)
    params = [param for param in get_command(app).params if "completion" not in str(param.name)]
    flags = [param for param in params if param.param_type_name == "option" and param.name != "help"]
    found = {str(param.name).replace("_", "-"): param.envvar for param in flags}
    assert found == settings.SERVE_FLAGS
    assert len(set(found.values())) == len(found)


def test_an_open_address_needs_a_key() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="api-key"):
            cli._policy(host, cli._Keys([], None, [], False), [], cli.LogKind.none, False)
    assert cli._policy("0.0.0.0", cli._Keys([], None, [], True), [], cli.LogKind.none, False).keys is not None


def test_the_document_describes_every_route() -> None:
    with running(FakeLLM) as server:
        document = server.http.get("/openapi.json").json()
    worker = EngineWorker(FakeLLM)  # type: ignore[arg-type]
    app = create_app(Service(name="fake", worker=worker))
    routes = {route.path.replace(":path", "") for route in app.routes}  # type: ignore[attr-defined]
    assert routes - OPEN_PATHS - {"/openapi.json", "/v1/shoal"} == set(document["paths"])


def test_a_health_check_is_refused_while_stopping() -> None:
    with running(FakeLLM) as server:
        server.worker.stop()
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 503
        assert not server.worker.metrics.refused, "nobody asked for an answer"
