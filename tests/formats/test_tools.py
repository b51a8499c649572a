"""Calls of functions in a model's text, in every family's syntax, however the text is cut."""

from __future__ import annotations

import random

import pytest

from shoal.formats.chat import chat_from_template
from shoal.formats.chat_deepseek import deepseek_chat
from shoal.formats.tools import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_1,
    HERMES,
    LLAMA,
    ToolParser,
    ToolSyntax,
    describe_tools,
    takes_tools,
    tool_syntax,
)

Calls = list[tuple[str, str]]


def read(syntax: ToolSyntax, pieces: list[str]) -> tuple[str, Calls]:
    """(text, [(name, arguments)]), with what a stream must keep: a name comes once, before its arguments."""
    parser = ToolParser(syntax)
    out = [item for piece in pieces for item in parser.push(piece)] + parser.flush()
    text, calls = "", []  # type: tuple[str, Calls]
    for kind, index, value in out:
        assert value
        if kind == "text":
            text += value
        elif kind == "name":
            assert index == len(calls)
            calls.append((value, ""))
        else:
            assert index == len(calls) - 1
            calls[index] = (calls[index][0], calls[index][1] + value)
    return text, calls


V3_CALLS = (
    "ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n"
    '{"x": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>h\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V3_1_CALLS = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>h<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
CASES: list[tuple[ToolSyntax, str, str, Calls]] = [
    (HERMES, "Just words, 1 < 2.", "Just words, 1 < 2.", []),
    (
        HERMES,
        'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": "}</tool_call>\\"", "b": [1]}}\n</tool_call>\n'
        '<tool_call>{"name":"g","arguments":{}}</tool_call>',
        "Sure.",
        [("f", '{"a": "}</tool_call>\\"", "b": [1]}'), ("g", "{}")],
    ),
    (HERMES, 'a <tool_call> is what? <tool_c"', 'a <tool_call> is what? <tool_c"', []),
    (HERMES, '<tool_call>\n{"name": "f", "argum', '<tool_call>\n{"name": "f", "argum', []),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "f\\"é", "arguments": {}}</tool_call> Done.', " Done.", [('f"é', "{}")]),
    (DEEPSEEK_V3, V3_CALLS, "ok", [("get", '{"x": 1}'), ("h", "{}")]),
    (DEEPSEEK_V3_1, V3_1_CALLS, "", [("get", '{"x": 1}'), ("h", "{}")]),
    (DEEPSEEK_V3_1, "<｜tool▁calls▁begin｜>no", "no", []),
    (LLAMA, '{"name": "f", "parameters": {"q": "\\"}"}}', "", [("f", '{"q": "\\"}"}')]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    (LLAMA, '{"a": "f", "parameters": {}}', '{"a": "f", "parameters": {}}', []),
    (LLAMA, 'Hello {"name": "f", "parameters": {}}', 'Hello {"name": "f", "parameters": {}}', []),
]


@pytest.mark.parametrize(("syntax", "text", "words", "calls"), CASES)
def test_calls_are_read_however_the_text_is_cut(syntax: ToolSyntax, text: str, words: str, calls: Calls) -> None:
    assert read(syntax, [text]) == (words, calls)
    for seed in range(100):
        rng, at, pieces = random.Random(seed), 0, []
        while at < len(text):
            size = rng.choice([1, 2, 5, 11])
            pieces.append(text[at : at + size])
            at += size
        assert read(syntax, pieces) == (words, calls)


def test_arguments_stream_before_the_call_is_complete() -> None:
    parser = ToolParser(HERMES)
    out = parser.push('<tool_call>\n{"name": "f", "arguments": {"city": "Par')
    assert out == [("name", 0, "f"), ("arguments", 0, '{"city": "Par')]


def test_a_model_that_never_ends_a_head_is_given_up() -> None:
    text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>" + "x" * 2000
    parser = ToolParser(DEEPSEEK_V3)
    assert parser.push(text) == [("text", 0, "<｜tool▁call▁begin｜>" + "x" * 2000)]


def test_templates_tell_their_syntax() -> None:
    assert tool_syntax(deepseek_chat("v3").template_source) is DEEPSEEK_V3
    assert tool_syntax(deepseek_chat("v3.1").template_source) is DEEPSEEK_V3_1
    assert tool_syntax("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert tool_syntax('{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}') is LLAMA
    assert tool_syntax("{{ messages }}") is HERMES
    assert takes_tools("{% if tools %}x{% endif %}")
    assert not takes_tools("{{ messages }} mytools")


def test_our_templates_write_calls_that_our_parser_reads() -> None:
    call = {"type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call, call]}]
    for kind, syntax in (("v3", DEEPSEEK_V3), ("v3.1", DEEPSEEK_V3_1)):
        text = deepseek_chat(kind).render(messages, add_generation_prompt=False)  # type: ignore[arg-type]
        written = text[text.index(syntax.opening) : text.index("<｜end▁of▁sentence｜>")]
        assert read(syntax, [written]) == ("", [("get", '{"x": 1}')] * 2)


def test_tools_are_put_in_words_for_a_template_that_knows_none() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    tool = {"type": "function", "function": {"name": "get", "description": "Gets.", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    text = chat_from_template(template).render(describe_tools(messages, [tool]))
    assert text.startswith("[system]Be brief.\n\n")
    assert '"description": "Gets."' in text
    assert (
        '[assistant]<tool_call>\n{"name": "get", "arguments": {"x": 1}}\n</tool_call>\n[user]<tool_response>\n42'
        in text
    )
    assert describe_tools(messages[1:2], [tool])[0]["role"] == "system"
    assert messages[2]["tool_calls"] == [call]  # the caller's own are left alone
    assert describe_tools([{"role": "user", "content": "Hi"}], []) == [{"role": "user", "content": "Hi"}]
