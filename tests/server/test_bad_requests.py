"""Every fault of a client is a 4xx with the OpenAI error body that names the field; the server goes on."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from tests.server.conftest import Running, wait_for

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "Hi"}


def _tool(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": [',
        b"nul",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_body_that_is_no_json_object(server: Running, path: str, body: bytes) -> None:
    assert error_of(server.http.post(path, content=body), 400)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-1, 1e30, "hot", True, [], {})],
        *[("top_p", value) for value in (0, 1.5, -0.1, "1")],
        *[("top_k", value) for value in (-5, 2**63 - 1, 1.5)],
        *[("min_p", value) for value in (-0.1, 1.1)],
        *[("presence_penalty", value) for value in (1e9, -2.1)],
        *[("frequency_penalty", value) for value in (1e9, "a")],
        *[("repetition_penalty", value) for value in (0, 1e9)],
        *[("seed", value) for value in (2**70, 1.5, "1", 2**63)],
        *[("max_tokens", value) for value in (0, -1, 10**18, 1.5, "7", True)],
        *[("n", value) for value in (0, 9, 10**9, "1", 1.5)],
        *[("stop", value) for value in ("", ["a", ""], ["x"] * 1000, "x" * 1_000_000, [1], 3, {})],
        *[("logit_bias", value) for value in ({"a": 1}, {"1": 1000}, {"1": "x"}, [1], {"-1": 1})],
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", {"include_usage": True}),
        ("best_of", 5),
        ("model", 7),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_field_out_of_bounds(server: Running, path: str, field: str, value: Any) -> None:
    body = {"messages": [USER], "prompt": "Hi", field: value}
    error = error_of(server.http.post(path, json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == field
    assert field in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": "Hi"}),
        ("messages.0", {"messages": ["Hi"]}),
        ("messages.0.role", {"messages": [{"role": "wizard", "content": "Hi"}]}),
        ("messages.0.role", {"messages": [{"content": "Hi"}]}),
        ("messages.0", {"messages": [{"role": "user"}]}),
        ("messages.0", {"messages": [{"role": "user", "content": None}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": ["Hi"]}]}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
        ("logprobs", {"logprobs": 1}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("tools", {"tools": "f"}),
        ("tools.0", {"tools": ["f"]}),
        ("tools.0.type", {"tools": [{"type": "magic", "function": {"name": "f"}}]}),
        ("tools.0.function", {"tools": [{"type": "function"}]}),
        *(("tools.0.function.name", {"tools": [_tool(name)]}) for name in ("", "a b", 'a"b', "a\nb", "x" * 65, 5)),
        ("tools.0.function.parameters", {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}),
        ("tools.1.function.name", {"tools": [_tool("f"), _tool("f")]}),
        ("tools", {"tools": [_tool(f"f{i}") for i in range(129)]}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("tool_choice", {"tool_choice": "sometimes", "tools": [_tool("f")]}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [_tool("f")]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("response_format", {"response_format": "json"}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format", {"response_format": {"type": "regex"}}),
        ("structured_outputs", {"structured_outputs": {}}),
        ("structured_outputs", {"structured_outputs": {"regex": "a", "grammar": "b"}}),
        ("structured_outputs.json", {"structured_outputs": {"json": "{"}}),
        ("structured_outputs", {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
        ("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": "x"}}),
    ],
)
def test_a_bad_chat_field(server: Running, param: str, fields: dict[str, Any]) -> None:
    assert error_of(server.http.post(CHAT, json={"messages": [USER], **fields}), 400)["param"] == param


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["a", 1]}),
        ("prompt", {"prompt": [1.5]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": [256]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [10**30]}),
        ("prompt", {"prompt": {"a": 1}}),
        ("prompt", {"prompt": ["a"] * 300}),
        ("prompt", {"prompt": ["a"] * 100, "n": 8}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": True}),
        ("logprobs", {"logprobs": 10**6}),
        ("echo", {"echo": "yes"}),
        ("suffix", {"suffix": "end"}),
    ],
)
def test_a_bad_completion_field(server: Running, param: str, fields: dict[str, Any]) -> None:
    error = error_of(server.http.post(TEXT, content=json.dumps({"prompt": "Hi", **fields})), 400)
    assert error["param"] == param


def test_a_missing_field_is_named(server: Running) -> None:
    for path, param in ((CHAT, "messages"), (TEXT, "prompt")):
        error = error_of(server.http.post(path, json={}), 400)
        assert (error["param"], error["code"]) == (param, "missing_required_parameter")


def test_nulls_mean_left_out(server: Running) -> None:
    body = {"messages": [USER], "temperature": None, "stop": None, "n": None, "logit_bias": None, "stream": None}
    assert server.http.post(CHAT, json=body).status_code == 200


def test_a_prompt_that_is_too_long_says_so_with_numbers(server: Running) -> None:
    error = error_of(server.http.post(TEXT, json={"prompt": "x" * 120}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "120" in error["message"]
    assert "100" in error["message"]


def test_an_unknown_model_is_404_even_with_a_hostile_name(server: Running) -> None:
    for name in ("gpt-9", "../../etc/passwd", "http://127.0.0.1/", "x" * 100_000, "a\nb"):
        error = error_of(server.http.post(CHAT, json={"messages": [USER], "model": name}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert len(error["message"]) < 500
    assert error_of(server.http.get("/v1/models/nope"), 404)["code"] == "model_not_found"


def test_unknown_routes_and_methods_answer_in_json(server: Running) -> None:
    for path in (
        "/page",
        "/page/",
        "/page/../app.py",
        "/v2",
        "//v1/models",
        "/v1/chat/completions/",
        "/v1/chat/../../etc/passwd",
    ):
        assert error_of(server.http.get(path), 404)["code"] == "not_found"
    response = server.http.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    error_of(server.http.delete("/v1/models/fake"), 405)


def test_a_large_body_is_refused_by_its_length_and_by_its_bytes(server: Running) -> None:
    def pieces() -> Any:
        for _ in range(33):
            yield b" " * (1 << 20)

    for body in (pieces(), b" " * (33 << 20)):
        assert error_of(server.http.post(CHAT, content=body), 413)["code"] == "request_too_large"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {1 << 40}\r\n\r\n".encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_compressed_body_is_refused(server: Running) -> None:
    error_of(server.http.post(CHAT, content=b"x", headers={"content-encoding": "gzip"}), 415)


def test_a_body_that_never_ends_does_not_hold_others_up(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert server.http.post(CHAT, json={"messages": [USER]}).status_code == 200


def test_other_sites_are_kept_out(server: Running) -> None:
    ask = {"messages": [USER]}
    assert error_of(server.http.post(CHAT, json=ask, headers={"origin": "https://evil.example"}), 403)["code"] == (
        "cross_origin"
    )
    assert error_of(server.http.post(CHAT, json=ask, headers={"origin": "null"}), 403)
    assert error_of(server.http.post(CHAT, json=ask, headers={"host": "evil.example"}), 403)["code"] == "foreign_host"
    assert server.http.post(CHAT, json=ask, headers={"origin": server.url}).status_code == 200
    preflight = server.http.options(CHAT, headers={"origin": server.url, "access-control-request-method": "POST"})
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_an_engine_fault_is_500_without_its_details_and_the_next_request_works(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(produced: int) -> None:
        raise RuntimeError("secret path /srv/models")

    server.llm.before_token = fail
    error = error_of(server.http.post(CHAT, json={"messages": [USER]}), 500)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    wait_for(lambda: "secret" in caplog.text)
    server.llm.before_token = lambda produced: None
    assert server.http.post(CHAT, json={"messages": [USER]}).status_code == 200
    assert server.llm.running == []


def test_an_engine_out_of_memory_is_503(server: Running) -> None:
    def fail(produced: int) -> None:
        raise MemoryError

    server.llm.before_token = fail
    assert error_of(server.http.post(CHAT, json={"messages": [USER]}), 503)["code"] == "out_of_memory"


def test_a_fault_in_mid_stream_is_an_event(server: Running, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(produced: int) -> None:
        if produced == 3:
            raise RuntimeError("secret")

    server.llm.before_token = fail
    response = server.http.post(CHAT, json={"messages": [USER], "stream": True})
    assert response.status_code == 200
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "internal_error"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-2]) == "Hel"
    assert "secret" not in response.text
    wait_for(lambda: server.llm.running == [])


def test_odd_text_comes_through(server: Running) -> None:
    text = "\x00 \u202e \ufeff <|im_end|> <｜end▁of▁sentence｜> 🦈"
    response = server.http.post(TEXT, json={"prompt": text, "max_tokens": 1})
    assert response.status_code == 200
    assert bytes(server.llm.asked[-1][0]).decode() == text


def test_numbers_too_large_for_json_are_refused(server: Running) -> None:
    response = server.http.post(CHAT, content=b'{"messages": [], "temperature": 1' + b"0" * 400 + b"}")
    assert error_of(response, 400)["code"] in ("invalid_json", "invalid_value")
