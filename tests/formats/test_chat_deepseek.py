"""DeepSeek's chat formats, string by string as their templates and model cards publish them."""

# ruff: noqa: E501  (templates and what they print are single lines)

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.errors import RequestError
from shoal.formats.chat import load_chat
from shoal.formats.chat_deepseek import deepseek_chat, guess_deepseek_kind

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
    {"role": "user", "content": "Bye"},
]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call("get", '{"city": "Köln"}'), call("now", {})]},
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "noon"},
]
ANSWER = {"role": "assistant", "content": "Wet."}
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "Weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now", "description": "Time"}},
]
DESCRIBED = (
    "\n\n## Tools\nYou have access to the following tools:\n"
    '\n### get\nDescription: Weather\n\nParameters: {"type": "object"}\n'
    "\n### now\nDescription: Time\n\nParameters: {}\n"
    "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n%s\n\nWhere:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, %s"
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("v2", f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: <think>\nhm\n</think>\n\nHello{EOS}User: Bye\n\nAssistant:"),
        (
            "v3",
            f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜><think>\nhm\n</think>\n\nHello{EOS}<｜User｜>Bye<｜Assistant｜>",
        ),
        ("r1", f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜>\n\nHello{EOS}<｜User｜>Bye<｜Assistant｜><think>\n"),
        (
            "v3.1",
            f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜></think>\n\nHello{EOS}<｜User｜>Bye<｜Assistant｜></think>",
        ),
    ],
)
def test_a_conversation(kind, expected):
    chat = deepseek_chat(kind)
    assert chat.render([SYSTEM, *TURNS]) == expected
    assert chat.render([SYSTEM, *TURNS], options={"thinking": False}) == expected


def test_v31_thinks_when_asked():
    chat = deepseek_chat("v3.1")
    for name in ("thinking", "enable_thinking"):
        assert chat.render(TURNS[:1], options={name: True}) == f"{BOS}<｜User｜>Hi<｜Assistant｜><think>"


@pytest.mark.parametrize(
    ("kind", "end"), [("v2", "User: Hi\n\n"), ("v3", "<｜User｜>Hi"), ("r1", "<｜User｜>Hi"), ("v3.1", "<｜User｜>Hi")]
)
def test_without_generation_prompt(kind, end):
    assert deepseek_chat(kind).render(TURNS[:1], add_generation_prompt=False) == BOS + end


@pytest.mark.parametrize("kind", ["v3", "r1", "v3.1"])
def test_system_prompts_are_joined_by_an_empty_line_wherever_they_stand(kind):
    text = deepseek_chat(kind).render(
        [SYSTEM, TURNS[0], {"role": "system", "content": "Now."}], add_generation_prompt=False
    )
    assert text == f"{BOS}Be brief.\n\nNow.<｜User｜>Hi"


@pytest.mark.parametrize(("kind", "again"), [("v3", "<｜Assistant｜>"), ("r1", "<｜Assistant｜><think>\n")])
def test_tool_calls_and_outputs_of_v3_and_r1(kind, again):
    calls = (
        f"{BOS}<｜User｜>Weather?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n"
        '```json\n{"city": "Köln"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
        f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
    )
    outputs = (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>"
        "<｜tool▁outputs▁end｜>"
    )
    chat = deepseek_chat(kind)
    assert chat.render(CALLS) == calls + outputs
    assert chat.render([*CALLS, ANSWER, TURNS[0]]) == f"{calls}{outputs}Wet.{EOS}<｜User｜>Hi{again}"


def test_tool_calls_and_outputs_of_v31():
    text = (
        f"{BOS}<｜User｜>Weather?<｜Assistant｜></think><｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>get<｜tool▁sep｜>{"city": "Köln"}<｜tool▁call▁end｜>'
        f"<｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>"
    )
    chat = deepseek_chat("v3.1")
    assert chat.render(CALLS) == text
    assert chat.render([*CALLS, ANSWER, TURNS[0]]) == f"{text}Wet.{EOS}<｜User｜>Hi<｜Assistant｜></think>"


@pytest.mark.parametrize(
    ("kind", "form", "chain", "end"),
    [
        (
            "v3",
            "function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```",
            "chain them with a newline as separator",
            "",
        ),
        (
            "r1",
            "function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```",
            "chain them with a newline as separator",
            "<think>\n",
        ),
        (
            "v3.1",
            "tool_call_name<｜tool▁sep｜>tool_call_arguments",
            "chain them directly without separators or spaces",
            "</think>",
        ),
    ],
)
def test_tools_are_described_after_the_system_prompt(kind, form, chain, end):
    form = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{form}<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>"
    text = deepseek_chat(kind).render([SYSTEM, TURNS[0]], tools=TOOLS)
    assert text == f"{BOS}Be brief.{DESCRIBED % (form, chain)}<｜User｜>Hi<｜Assistant｜>{end}"


def test_a_user_without_content_is_the_requests_fault():
    with pytest.raises(RequestError, match="messages"):
        deepseek_chat("v3.1").render([{"role": "user", "content": None}])


def test_the_kind_is_told_by_the_vocabulary():
    assert guess_deepseek_kind(["<｜begin▁of▁sentence｜>"]) == "v2"
    assert guess_deepseek_kind(["<｜User｜>"]) == "v3"
    assert guess_deepseek_kind(["<｜User｜>", "<think>", "</think>"]) == "v3.1"
    with pytest.raises(ValueError, match="v4"):
        deepseek_chat("v4")  # type: ignore[arg-type]


def test_a_deepseek_folder_without_template_gets_one_and_others_none(tmp_path):
    tokens = [{"id": index, "content": token} for index, token in enumerate(["<｜User｜>", "</think>"])]
    step = {"type": "ByteLevel"}
    data = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": tokens, "decoder": step}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    chat = load_chat(tmp_path)
    assert chat is not None
    assert chat.render(TURNS[:1]) == f"{BOS}<｜User｜>Hi<｜Assistant｜></think>"
    chat.save(tmp_path)
    again = load_chat(tmp_path)
    assert again is not None
    assert again.template_source == chat.template_source
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_chat(tmp_path) is None
