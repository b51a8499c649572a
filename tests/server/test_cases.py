"""One named test for each of the 28 ways in which requests go wrong, on a running server: what is refused names its
field, nothing hangs, and after every case (where it says so, during it) other requests are answered as ever. The long
tables of values stand in test_bad_requests, test_structured and test_operation."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.server.conftest import FakeLLM, Running, running, wait_for

from shoal.errors import FileError
from shoal.formats.chat import chat_from_template
from shoal.server.app import Policy
from shoal.server.keys import Keys

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REPLY = "Hello, wörld"
USER = {"role": "user", "content": "Hi"}


def speak(server: Running, **body: Any) -> dict[str, Any]:
    answer = server.http.post(CHAT, json={"messages": [USER], **body})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def box() -> Iterator[Running]:
    llm = FakeLLM()
    with running(lambda: llm, max_queue=4) as server:
        yield server


@pytest.fixture
def server(box: Running) -> Iterator[Running]:
    """A neighbour's answer is being written all the while, and comes out whole."""
    box.llm.__init__()  # type: ignore[misc]
    box.llm.before_token = lambda produced: time.sleep(0.002)
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(speak, box)
        yield box
        assert neighbour.result()["choices"][0]["message"]["content"] == REPLY
    box.llm.before_token = lambda produced: None
    assert speak(box)["choices"][0]["message"]["content"] == REPLY
    wait_for(lambda: box.http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0})
    assert box.llm.running == []


def refused(server: Running, path: str = CHAT, status: int = 400, **body: Any) -> tuple[str | None, str | None]:
    """Param and code of the error; sends `messages` and `prompt` unless told otherwise."""
    answer = server.http.post(path, content=json.dumps({"messages": [USER], "prompt": "Hi", **body}))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert "Traceback" not in answer.text and "/src/" not in answer.text and len(error["message"]) < 600
    return error["param"], error["code"]


def raw(server: Running, sent: bytes, seconds: float = 10) -> bytes:
    """What comes back over a plain socket; empty if the server hangs up."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(sent)
        return sock.recv(2000)
    return b""


def test_case_01_a_body_that_is_no_json_object(server: Running) -> None:
    for body in (b"", b"{", b"[]", b"3", b"null", b"{'a': 1}"):
        answer = server.http.post(TEXT, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_case_02_a_body_too_large_compressed_or_lying_about_its_length(server: Running) -> None:
    assert server.http.post(CHAT, content=b" " * (33 << 20)).status_code == 413
    bomb = gzip.compress(b" " * (64 << 20))
    assert server.http.post(CHAT, content=bomb, headers={"content-encoding": "gzip"}).status_code == 415
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: "
    assert b" 413 " in raw(server, f"{head}{1 << 50}\r\n\r\n".encode())
    assert b" 400 " in raw(server, f"{head}-5\r\n\r\n".encode())
    assert b" 400 " in raw(server, f"{head}1\r\nContent-Length: 2\r\n\r\nab".encode())


def test_case_03_heads_too_large_or_too_many(server: Running) -> None:
    start = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    for fields in (b"X: " + b"a" * (1 << 20), b"\r\n".join(b"X-%d: 1" % index for index in range(10_000))):
        answer = raw(server, start + fields + b"\r\n\r\n")
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))


def test_case_04_json_that_is_deep_wide_or_not_finite(server: Running) -> None:
    for body in (b'{"a":' * 100_000, b'{"temperature": NaN}', b'{"temperature": -Infinity}', b'{"top_p": 1e400}'):
        assert server.http.post(TEXT, content=body).status_code == 400
    wide = {f"k{index}": 0 for index in range(100_000)}
    assert server.http.post(TEXT, content=json.dumps({"prompt": "Hi", **wide})).status_code == 200  # unknown fields
    assert server.http.post(TEXT, content=b'{"prompt": 5, "prompt": "Hi"}').status_code == 200  # the last one counts


def test_case_05_odd_text_stays_text_and_what_comes_out_is_utf8(server: Running) -> None:
    text = "\x00 \u202e \ufeff <｜end▁of▁sentence｜> <|im_end|> e" + "\u0301" * 20
    assert server.http.post(TEXT, json={"prompt": text, "max_tokens": 1}).status_code == 200
    assert (list(text.encode())) in [ids for ids, _ in server.llm.asked]
    for body in (b'{"prompt": "\\ud800"}', b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xc0\xaf"}'):
        assert server.http.post(TEXT, content=body).status_code == 400
    streamed = server.http.post(TEXT, json={"prompt": "Hi", "stream": True}).content.decode()  # "ö" is two tokens
    assert "\ufffd" not in streamed


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "top_k", "presence_penalty", "seed"])
def test_case_06_sampling_fields_out_of_bounds(server: Running, field: str) -> None:
    for value in (-(2**70), 1e30, "hot", True, 2**70):
        assert refused(server, **{field: value})[0] == field


def test_case_07_counts_out_of_bounds_are_refused_before_anything_is_allocated(server: Running) -> None:
    began = time.monotonic()
    for fields in ({"max_tokens": 10**18}, {"max_tokens": 1.5}, {"n": 10**9}, {"best_of": 3}):
        assert refused(server, **fields)[0] == next(iter(fields))
    assert refused(server, TEXT, logprobs=10**6)[0] == "logprobs"
    assert refused(server, top_logprobs=3)[0] == "top_logprobs"
    assert time.monotonic() - began < 5


def test_case_08_another_engine_s_extras_do_nothing(server: Running) -> None:
    extras = {"n_discard": -1, "n_keep": -(2**40), "id_slot": 10**9, "cache_prompt": "x"}
    assert speak(server, **extras)["choices"][0]["message"]["content"] == REPLY


def test_case_09_a_prompt_beyond_the_context_and_an_answer_that_reaches_its_end(server: Running) -> None:
    assert refused(server, TEXT, prompt="x" * 120)[1] == "context_length_exceeded"
    answer = server.http.post(TEXT, json={"prompt": "x" * 95, "max_tokens": 50}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


def test_case_10_messages_that_are_none(server: Running) -> None:
    assert refused(server, TEXT, prompt=[])[0] == "prompt"
    for messages in ([], "Hi", [{"role": "wizard", "content": "x"}], [{"role": "user", "content": None}]):
        assert str(refused(server, messages=messages)[0]).startswith("messages")
    speak(server, messages=[{"role": "system", "content": "only"}])
    speak(server, messages=[USER, {"role": "assistant", "content": "He"}])
    assert refused(server, messages=[USER] * 30_000)[1] == "context_length_exceeded"


def test_case_11_token_ids_that_are_none(server: Running) -> None:
    for prompt in ([-1], [256], [1.5], [10**30], [[1], [-1]]):
        assert refused(server, TEXT, prompt=prompt)[0] == "prompt"


def test_case_12_stop_strings(server: Running) -> None:
    for stop in ("", ["a"] * 1000, "x" * (1 << 20), [""]):
        assert refused(server, stop=stop)[0] == "stop"


def test_case_13_logit_bias(server: Running) -> None:
    for bias in ({"99999999999": 1}, {"x": 1}, {"1": 101}, {"1": "x"}):
        assert refused(server, logit_bias=bias)[0] == "logit_bias"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "#/missing"},
        {"type": "string", "pattern": "(?<=a)b"},
        {"type": "string", "pattern": "(" * 60_000},
        False,
    ],
    ids=lambda schema: str(schema)[:30],
)
def test_case_14_schemas_that_cannot_be_met(server: Running, schema: Any) -> None:
    began = time.monotonic()
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    param, code = refused(server, response_format=form)
    assert str(param).startswith("response_format") and code == "invalid_grammar"
    assert time.monotonic() - began < 5


def test_case_15_a_grammar_longer_than_the_answer_may_be(server: Running) -> None:
    for schema in ({"type": "string", "minLength": 50}, {"type": "array", "minItems": 10**9}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert speak(server, response_format=form, max_tokens=3)["choices"][0]["finish_reason"] == "length"


def test_case_16_tools(server: Running) -> None:
    def tool(name: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name}}

    for name in ('a"b', "a\nb", "", "x" * 65, 5):
        assert refused(server, tools=[tool(name)])[0] == "tools.0.function.name"
    assert refused(server, tools=[tool("f"), tool("f")])[0] == "tools.1.function.name"
    assert refused(server, tools=[tool("f")], tool_choice="sometimes")[0] == "tool_choice"
    assert refused(server, tools=[tool("f")], tool_choice=tool("g"))[0] == "tool_choice"


def test_case_17_variables_of_the_template(server: Running) -> None:
    own = {"messages": [], "bos_token": "<evil>", "add_generation_prompt": False, "chat_template": "{{ 1 }}"}
    speak(server, chat_template_kwargs=own, chat_template="{{ messages.__class__ }}")
    assert (server.llm.options, server.llm.messages[0]["content"]) == ({}, "Hi")
    assert refused(server, chat_template_kwargs={"thinking": "x"})[0] == "chat_template_kwargs.thinking"


HOSTILE = {
    "escape": "{{ messages.__class__.__mro__ }}",
    "endless": "{% for i in range(10**9) %}x{% endfor %}",
    "huge": "{{ 'a' * 10**9 }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=list(HOSTILE))
def test_case_18_a_hostile_template_in_the_model(server: Running, source: str) -> None:
    """It is refused when the model is loaded; one that waits for its cue fails that request and no other."""
    with pytest.raises(FileError, match="template"):
        chat_from_template(source)
    waiting = chat_from_template("{% if messages[0].content == 'now' %}" + source + "{% endif %}x")
    server.llm.encode_chat = lambda messages, **_: list(waiting.render(messages).encode())  # type: ignore[method-assign]
    began = time.monotonic()
    answer = server.http.post(CHAT, json={"messages": [{"role": "user", "content": "now"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "template" not in answer.text and time.monotonic() - began < 15
    assert speak(server)["choices"][0]["message"]["content"] == REPLY


def test_case_19_models_that_are_not_served(server: Running) -> None:
    for name in ("gpt-9", "../../etc/passwd", "http://127.0.0.1:1/x", "fake/../fake", "a\nb", "x" * 100_000):
        assert refused(server, status=404, model=name) == ("model", "model_not_found")


def test_case_20_pictures_are_not_fetched(server: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)
        for url in (
            f"http://127.0.0.1:{trap.getsockname()[1]}/a.png",
            "file:///etc/passwd",
            "data:image/png;base64,AA",
        ):
            part = {"type": "image_url", "image_url": {"url": url}}
            param, _ = refused(server, messages=[{"role": "user", "content": [part]}])
            assert str(param).startswith("messages.0.content")
        with pytest.raises(TimeoutError):
            trap.accept()


def test_case_21_keys() -> None:
    with running(FakeLLM, policy=Policy(keys=Keys(["right-key"]))) as server:
        for header in ("", "Bearer wrong-key", "Bearer " + "x" * 50_000, "Basic right-key", "Bearer RIGHT-KEY"):
            answer = server.http.post(CHAT, json={"messages": [USER]}, headers={"authorization": header})
            assert answer.status_code == 401
        for path in ("//v1/models", "/v1/models/", "/V1/models", "/v1/models?api_key=right-key"):
            assert server.http.get(path).status_code == 401
        override = {"authorization": "Bearer right-key", "x-http-method-override": "DELETE"}
        assert server.http.get("/v1/models", headers=override).status_code == 200
        split = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer\r\n\tright-key\r\n\r\n"
        assert raw(server, split).startswith((b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 401"))
        assert server.http.get("/health").status_code == 200


def test_case_22_pages_of_other_sites_and_other_names_of_this_machine(server: Running) -> None:
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"host": "evil.example"}):
        assert server.http.post(CHAT, json={"messages": [USER]}, headers=headers).status_code == 403
    asked = server.http.options(
        CHAT, headers={"origin": "https://evil.example", "access-control-request-method": "POST"}
    )
    assert asked.status_code == 403
    assert not [name for name in asked.headers if name.startswith("access-control")]


@pytest.mark.parametrize("when", ["before the first token", "in mid-stream", "half closed"])
def test_case_23_a_client_that_leaves(server: Running, when: str) -> None:
    """While a prompt is read, and what becomes of the cache's pages: test_engine."""
    server.llm.before_token = lambda produced: time.sleep(0.02)
    before = server.worker.metrics.cancelled
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"messages": [USER], "stream": when != "before the first token"}).encode()
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        asked = len(server.llm.asked)
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: len(server.llm.asked) > asked)
        if when == "in mid-stream":
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        if when == "half closed":
            sock.shutdown(socket.SHUT_WR)
            wait_for(lambda: server.worker.metrics.cancelled == before + 1)
    wait_for(lambda: server.worker.metrics.cancelled == before + 1, seconds=5)


def test_case_24_a_reader_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.server.sse.SEND_SECONDS", 0.2)
    llm = FakeLLM()
    llm.max_context, llm.reply = 1 << 30, "x" * 200_000
    with running(lambda: llm) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"messages": [USER], "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: server.worker.num_running == 1)
            wait_for(lambda: server.llm.running == [], seconds=30)
            assert llm.finished == 0


def test_case_25_ten_times_what_runs_at_once() -> None:
    llm, gate = FakeLLM(), threading.Event()
    llm.before_token = lambda produced: (gate.wait(10), None)[1]
    with running(lambda: llm, parallel=2, max_queue=2) as server, ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(server.http.post, CHAT, json={"messages": [USER]}) for _ in range(20)]
        wait_for(lambda: sum(answer.done() for answer in answers) == 16)
        health = server.http.get("/health").json()
        assert (health["status"], health["running"] + health["waiting"]) == ("ok", 4)
        gate.set()
        found = [answer.result() for answer in answers]
    assert sorted(answer.status_code for answer in found) == [200] * 4 + [429] * 16
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in found if answer.status_code == 429)


def test_case_26_equal_request_ids_and_a_cancel_that_meets_the_end(server: Running) -> None:
    """The id names a line of the log and nothing else: equal requests are answered each for itself. A client may leave
    in the very moment in which its answer ends."""
    headers = {"x-request-id": "the-same"}
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(server.http.post, CHAT, json={"messages": [USER]}, headers=headers) for _ in range(4)]
        answers = [job.result() for job in jobs]
    assert {answer.headers["x-request-id"] for answer in answers} == {"the-same"}
    assert len({answer.json()["id"] for answer in answers}) == 4
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"messages": [USER], "stream": True}).encode()
    sent = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    for pause in range(12):  # an answer takes some 25 ms: some leave before its end, some after, some just then
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(sent)
            time.sleep(0.02 + pause * 0.002)
    wait_for(lambda: server.worker.num_running + server.worker.num_waiting == 0)


def test_case_27_a_neighbour_with_the_same_beginning_leaves(server: Running) -> None:
    """The real engine's shared pages under this are in test_engine."""
    server.llm.before_token = lambda produced: time.sleep(0.003)
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(speak, server)
        with server.http.stream("POST", CHAT, json={"messages": [USER], "stream": True}) as leaves:
            next(leaves.iter_lines())
        assert stays.result()["choices"][0]["message"]["content"] == REPLY


def test_case_28_what_a_client_sends_forges_no_line_of_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    """What a model writes forges no page either: page/test_browser."""
    hostile = "x\nshoal: request forged\x1b[31m<img src=x onerror=alert(1)>"
    with running(FakeLLM, policy=Policy(log="text")) as server:
        assert refused(server, status=404, model=hostile)[0] == "model"
        server.http.get("/a%0Ashoal:%20request%20forged%1b[31m")
        speak(server, messages=[{"role": "user", "content": hostile}])
    lines = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("shoal: request") for line in lines) == 3
    assert "\x1b" not in "".join(lines) and "onerror" not in "".join(lines)
