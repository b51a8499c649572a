"""Answers in a given form and calls of functions, over a real engine: a random model with DeepSeek's control tokens and
chat formats, which says nothing sensible, so that whatever is well formed is so by the server's doing."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.engine.conftest import V3, Checkpoint, open_tiny, tiny
from tests.server.conftest import FakeLLM, Running, running, wait_for

from shoal.errors import RequestError
from shoal.formats import tokenizer_json
from shoal.formats.chat import chat_from_template
from shoal.formats.chat_deepseek import deepseek_chat
from shoal.formats.tokenizer import Tokenizer
from shoal.formats.tokenizer_json import CHAR_TO_BYTE
from shoal.server.grammar_check import GrammarChecker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "metric": {"type": "boolean"}},
            "required": ["city", "metric"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get-time", "parameters": {"enum": [{}]}}}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


CONTROL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>",
)  # fmt: skip


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and DeepSeek's control tokens."""
    vocab = dict(CHAR_TO_BYTE)
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": 256 + index, "content": token, "special": index < 2, **flags} for index, token in enumerate(CONTROL)
    ]
    data = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": step, "post_processor": None, "decoder": step,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    tokenizer_json.check(data, Path("tokenizer.json"))
    return Tokenizer(data, "tokenizer.json", bos_token_id=256, eos_token_ids=(257,), add_bos=True)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    model = tiny({**V3, "vocab_size": 256 + len(CONTROL), "eos_token_id": 257})[1]
    return replace(model, load_tokenizer=byte_tokenizer)


@pytest.fixture(scope="module", params=["v3", "v3.1", "plain"])
def server(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[Running]:
    chat = chat_from_template(PLAIN) if request.param == "plain" else deepseek_chat(request.param)
    llm = open_tiny(replace(checkpoint, load_chat=lambda: chat))
    with running(lambda: llm) as box:
        yield box


def ask(server: Running, path: str = CHAT, **body: Any) -> dict[str, Any]:
    body = {"max_tokens": 100, "temperature": 0, **body}
    response = server.http.post(path, json={"messages": HELLO, "prompt": "Hi", **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]  # type: ignore[no-any-return]


SCHEMA = WEATHER["function"]["parameters"]  # type: ignore[index]
FORMS: list[tuple[dict[str, Any], str]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}},
        r'\{\s*"city"\s*:\s*"(Paris|Rome)"\s*,\s*"metric"\s*:\s*(true|false)\s*\}',
    ),
    ({"response_format": {"type": "json_object", "schema": {"enum": [{"a": 1}]}}}, r'\{\s*"a"\s*:\s*1\s*\}'),
    ({"response_format": {"type": "regex", "pattern": r"[ab]/\d{3}"}}, r"[ab]/[0-9]{3}"),
    ({"response_format": {"type": "grammar", "grammar": 'start: "x" | "y"'}}, "[xy]"),
    ({"response_format": {"type": "grammar", "grammar": 'root ::= "x" "y" | "z"'}}, "xy|z"),
    ({"structured_outputs": {"choice": ["no", 'ye"s']}}, 'no|ye"s'),
    ({"structured_outputs": {"json": json.dumps({"const": 7})}}, "7"),
    ({"structured_outputs": {"regex": "a+b"}, "logit_bias": {}}, "a+b"),
]


@pytest.mark.parametrize(("form", "expected"), FORMS)
def test_answers_have_the_form_asked_for(server: Running, form: dict[str, Any], expected: str) -> None:
    for path in (CHAT, TEXT):
        choice = ask(server, path, **form)
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        if choice["finish_reason"] == "stop":
            assert re.fullmatch(expected, text)
        else:
            assert (choice["finish_reason"] == "length" and "+" in expected) or "\\s" in expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called_with_valid_arguments(server: Running, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(3):
        message = calls(server, stream, tools=[WEATHER, TIME], tool_choice=choice, seed=seed, temperature=1)
        assert len(message) == 1
        assert message[0]["function"]["name"] == "get_weather"
        arguments = json.loads(message[0]["function"]["arguments"])
        assert arguments["city"] in ("Paris", "Rome") and isinstance(arguments["metric"], bool)
        assert message[0]["type"] == "function" and message[0]["id"].startswith("call_")


def calls(server: Running, stream: bool, **body: Any) -> list[dict[str, Any]]:
    """The calls of an answer, put together from a stream as clients do."""
    body = {"messages": HELLO, "max_tokens": 200, **body}
    if not stream:
        choice = ask(server, **body)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        return choice["message"]["tool_calls"]  # type: ignore[no-any-return]
    found: dict[int, dict[str, Any]] = {}
    reasons = []
    for chunk in server.openai.chat.completions.create(model="fake", stream=True, **body):
        reasons.append(chunk.choices[0].finish_reason)
        assert not chunk.choices[0].delta.content
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.index not in found:
                assert call.id and call.function.name and call.type == "function"
                found[call.index] = {
                    "id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": ""},
                }  # fmt: skip
            found[call.index]["function"]["arguments"] += call.function.arguments or ""
    assert reasons[-1] == "tool_calls"
    return list(found.values())


def test_required_calls_something(server: Running) -> None:
    for seed in range(3):
        found = calls(
            server, True, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False, seed=seed,
            temperature=1,
        )  # fmt: skip
        assert len(found) == 1
        json.loads(found[0]["function"]["arguments"])
        assert found[0]["function"]["name"] in ("get_weather", "get-time")


def test_none_and_auto_leave_the_model_alone(server: Running) -> None:
    free = ask(server, max_tokens=5)["message"]
    assert ask(server, max_tokens=5, tools=[WEATHER], tool_choice="none")["message"] == free
    assert "tool_calls" not in ask(server, max_tokens=5, tools=[WEATHER], tool_choice="auto")["message"]


def test_a_conversation_with_calls_and_results_goes_on(server: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get-time", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]
    assert ask(server, messages=messages, tools=[TIME], max_tokens=3)["finish_reason"] == "length"
    assert ask(server, messages=messages, max_tokens=3)["finish_reason"] == "length"


BAD: list[tuple[str, dict[str, Any]]] = [
    *(
        (
            "response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": s}}},
        )
        for s in (
            {"type": "wizard"},
            {"$ref": "http://127.0.0.1:9/schema.json"},
            {"$ref": "file:///etc/passwd"},
            {"$ref": "#"},
            False,
            {"allOf": [{"type": "string"}, {"type": "integer"}]},
            {"type": "string", "pattern": "(?<=a)b"},
            {"enum": ["x" * 9 + str(i) for i in range(100_000)]},
        )
    ),
    *(
        ("response_format.pattern", {"response_format": {"type": "regex", "pattern": pattern}})
        for pattern in ("(" * 60_000, "(?<=a)b", r"(a)\1", "[")
    ),
    *(
        ("response_format.grammar", {"response_format": {"type": "grammar", "grammar": grammar}})
        for grammar in (
            "start: " + "(" * 60_000,
            "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(9000)) + '\na9000: "x"',
            "start: nowhere",
            "start: <[999999999]>",
            "%import /etc/passwd\nstart: A",
            "",
            'root ::= "a',
        )
    ),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": "root ::= ("}}),
    (
        "tools",
        {
            "tools": [{**WEATHER, "function": {"name": "f", "parameters": {"type": "wizard"}}}],
            "tool_choice": "required",
        },
    ),
    ("tool_choice", {"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}}),
    ("ignore_eos", {"response_format": {"type": "json_object"}, "ignore_eos": True}),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_a_hostile_form_is_refused_by_name_and_disturbs_nobody(server: Running, index: int) -> None:
    param, body = BAD[index]
    response = server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 5, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert len(error["message"]) < 500 and "\n" not in error["message"] and "/work" not in error["message"]
    assert server.http.get("/health").status_code == 200


def test_grammars_that_take_long_to_try_hold_nobody_else_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, trying = threading.Event(), threading.Semaphore(0)

    def problem(self: GrammarChecker, grammar: str) -> str:
        trying.release()
        gate.wait(20)
        return "is tried"

    monkeypatch.setattr(GrammarChecker, "problem", problem)
    hostile = {"messages": HELLO, "response_format": {"type": "json_object"}}
    with running(FakeLLM, max_queue=50) as server, ThreadPoolExecutor(60) as pool:
        held = [pool.submit(server.http.post, CHAT, json=hostile) for _ in range(60)]
        assert trying.acquire(timeout=10)
        wait_for(lambda: any(answer.done() for answer in held))
        refused = [answer.result() for answer in held if answer.done()]
        assert {answer.status_code for answer in refused} == {429}
        plain = {"messages": [{"role": "user", "content": "Hi " * 10}], "tool_choice": "none"}
        assert server.http.post(CHAT, json=plain, timeout=10).status_code == 200
        gate.set()
        assert {answer.result().status_code for answer in held} == {400, 429}


def test_a_form_nested_beyond_what_json_writers_follow_is_refused(server: Running) -> None:
    for depth in (100, 250, 500):
        schema = '{"properties": {"a": ' * depth + "{}" + "}}" * depth
        tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]'
        for form in (
            f'"response_format": {{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}',
            f'"tools": {tools}',
            f'"tools": {tools}, "tool_choice": "required"',
        ):
            body = f'{{"messages": [{{"role": "user", "content": "x"}}], "max_tokens": 2, {form}}}'
            answer = server.http.post(CHAT, content=body)
            assert answer.status_code in (200, 400), (depth, form[:20], answer.text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_form_that_fails_in_mid_answer_is_named_too(path: str, stream: bool) -> None:
    def fail(produced: int) -> None:
        if produced == 3:
            raise RequestError("grammar", "became too complex", code="invalid_grammar")

    llm = FakeLLM()
    llm.before_token = fail
    with running(lambda: llm) as server:
        body = {"messages": HELLO, "prompt": "Hi", "response_format": {"type": "json_object"}, "stream": stream}
        text = server.http.post(path, json=body).text
    error = json.loads(text.split("data: ")[-2] if stream else text)["error"]
    assert (error["param"], error["message"]) == ("response_format", "response_format: became too complex")


def test_a_huge_pattern_is_served_or_refused_but_never_waited_for(server: Running) -> None:
    """It takes a busy machine more than the second that compiling may take, a quick one less."""
    form = {"type": "regex", "pattern": "((a{1000}){1000}){1000}"}
    response = server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 5, "response_format": form})
    assert response.status_code in (200, 400)
    assert response.status_code == 200 or response.json()["error"]["param"] == "response_format.pattern"
    assert server.http.get("/health").status_code == 200


def test_large_but_legal_schemas_end_by_length(server: Running) -> None:
    for schema in ({"type": "array", "minItems": 10**9}, {"type": "string", "pattern": "(a+)+$"}):
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        assert ask(server, response_format=form, max_tokens=8)["finish_reason"] in ("length", "stop")


def test_fill_in_the_middle(server: Running) -> None:
    choice = ask(server, TEXT, prompt="def f(", suffix="return x", max_tokens=3)
    assert choice["finish_reason"] == "length"
    answer = server.http.post(TEXT, json={"prompt": "a", "suffix": "b", "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == 6  # with bos
    error = server.http.post(TEXT, json={"prompt": "a", "suffix": "b", "echo": True})
    assert (error.status_code, error.json()["error"]["param"]) == (400, "suffix")


def test_gaps_go_to_the_model_that_fills_them(checkpoint: Checkpoint) -> None:
    class Blunt(FakeLLM):
        """Cannot fill gaps; beside it is one that can."""

        def __init__(self) -> None:
            super().__init__()
            self.beside = {"code": open_tiny(checkpoint)}
            self.name = self.beside["code"].name  # two folders may be called the same

        def step(self) -> bool:
            return any([super().step(), *(llm.step() for llm in self.beside.values())])

    with running(Blunt, code="code") as server:
        names = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
        assert names == ["fake", "code"]
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
        assert server.http.post(TEXT, json=body).json()["model"] == "fake"
        answer = server.http.post(TEXT, json={**body, "suffix": "b"}).json()
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("code", 2)
        events = server.http.post(TEXT, json={**body, "suffix": "b", "stream": True}).text
        assert events.count('"model":"code"') >= 2
        refused = server.http.post(TEXT, json={**body, "suffix": "b", "model": "fake"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")
        assert server.llm.name not in refused.json()["error"]["message"], "a file's name is no client's business"
        other = server.http.post(TEXT, json={**body, "model": "code"}).json()
        assert other["model"] == "code"
        assert other["system_fingerprint"] != server.http.post(TEXT, json=body).json()["system_fingerprint"]
        vectors = [
            server.http.post("/v1/embeddings", json={"model": name, "input": "a"}).json()["data"][0]["embedding"]
            for name in names
        ]
        assert [len(vector) for vector in vectors] == [4, server.llm.beside["code"].config.hidden_size]
