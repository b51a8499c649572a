"""Tuning files: four shapes, and bad lines named by line and field."""

from __future__ import annotations

import gzip
import json

import pytest

from shoal.errors import ConfigError, FileError
from shoal.tune.examples import read_examples

ASKED = {"role": "user", "content": "2+2?"}
SAID = {"role": "assistant", "content": "4"}
SAME = {
    "messages": {"messages": [ASKED, SAID]},
    "prompt": {"prompt": [ASKED], "completion": [SAID]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
}


@pytest.mark.parametrize("shape", SAME)
@pytest.mark.parametrize("named", [False, True])
def test_four_shapes_of_one_conversation(lines, shape, named):
    path = lines(SAME[shape], "", SAME[shape])
    examples = read_examples(path, shape=shape if named else "auto")
    assert [list(e.messages) for e in examples] == [[ASKED, SAID]] * 2
    assert [e.line for e in examples] == [1, 3]


def test_plain_text_alpaca_input_and_system_turns(lines):
    (plain,) = read_examples(lines({"prompt": "a", "completion": "b"}))
    assert (plain.prompt, plain.completion, list(plain.messages)) == ("a", "b", [])
    (alpaca,) = read_examples(lines({"instruction": "add", "input": "1 2", "output": "3", "system": "S"}))
    assert [m["content"] for m in alpaca.messages] == ["S", "add\n\n1 2", "3"]
    turns = [{"from": "system", "value": "S"}, *SAME["sharegpt"]["conversations"]]
    (shared,) = read_examples(lines({"conversations": turns}))
    assert [m["role"] for m in shared.messages] == ["system", "user", "assistant"]


def test_an_answer_inside_the_prompt_is_not_learnt(lines):
    (example,) = read_examples(lines({"prompt": [ASKED, SAID, ASKED], "completion": [SAID]}))
    assert [m.get("weight", 1) for m in example.messages if m["role"] == "assistant"] == [0, 1]


def test_json_lists_gzip_and_byte_order_marks(lines, tmp_path):
    assert len(read_examples(lines(json.dumps([SAME["alpaca"]] * 3, indent=1), name="a.json"))) == 3
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(json.dumps(SAME["alpaca"]).encode()))
    assert len(read_examples(zipped)) == 1
    marked = tmp_path / "c.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(SAME["alpaca"]).encode())
    assert len(read_examples(marked)) == 1
    zipped.write_bytes(zipped.read_bytes()[:-12])
    with pytest.raises(FileError, match=r"b\.jsonl\.gz: is damaged"):
        read_examples(zipped)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", r":2: is not valid JSON"),
        ("3", r":2: must be a JSON object"),
        ({"messages": []}, r":2: messages: must be a list of messages"),
        ({"messages": [ASKED]}, r":2: messages: hold no assistant message"),
        ({"messages": [ASKED, {"role": "bot", "content": ""}]}, r":2: messages\[1\]\.role: 'bot' is not one of"),
        ({"messages": [{"role": "user", "content": 3}, SAID]}, r":2: messages\[0\]\.content: must be text"),
        ({"messages": [ASKED, {**SAID, "weight": 0.5}]}, r":2: messages\[1\]\.weight: must be 0 or 1"),
        ({"messages": [ASKED, SAID], "tools": "t"}, r":2: tools: must be a list"),
        ({"text": "x"}, r":2: messages: must be a list"),
        (b"\xff\xfe{}", r":2: is not valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_line_and_field(lines, bad, said):
    path = lines(SAME["messages"])
    path.write_bytes(path.read_bytes() + (bad if isinstance(bad, bytes) else
                     (bad if isinstance(bad, str) else json.dumps(bad)).encode()) + b"\n")  # fmt: skip
    with pytest.raises(FileError, match=said):
        read_examples(path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "a", "output": 1}, "output: must be text"),
        ({"instruction": "", "output": "b"}, "instruction: is empty"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\]\.from: 'alien' is not one of"),
        ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\]\.value: must be text"),
        (
            {"conversations": [{"from": "gpt", "value": "x", "weight": "none"}]},
            r"conversations\[0\]\.weight: must be 0 or 1",
        ),
        ({"prompt": "a", "completion": ""}, "completion: is empty"),
        ({"text": "x"}, r"has the keys \['text'\], which are none of messages"),
    ],
)
def test_bad_fields_of_the_other_shapes(lines, record, said):
    with pytest.raises(FileError, match=said):
        read_examples(lines(record))


def test_missing_empty_and_endless(lines, tmp_path, monkeypatch):
    with pytest.raises(FileError, match="cannot be read"):
        read_examples(tmp_path / "absent.jsonl")
    with pytest.raises(FileError, match="holds no examples"):
        read_examples(lines(""))
    monkeypatch.setattr("shoal.tune.examples.MAX_LINE_BYTES", 1000)
    with pytest.raises(FileError, match=":2: the line is longer"):
        read_examples(lines(SAME["alpaca"], {**SAME["alpaca"], "output": "x" * 2000}))
    with pytest.raises(ConfigError, match=r"format: 'csv' is not one of auto, messages"):
        read_examples(lines(SAME["alpaca"]), shape="csv")
