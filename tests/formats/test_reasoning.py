"""Reasoning and answer told apart, however the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.formats.reasoning import ReasoningSplitter, split_reasoning

PIECES = st.sampled_from(
    ["<think>", "</think>", "\n", " ", "a", "<", "</", "</thi", "think>", "<think", "答", "x" * 20, "\n\n"]
)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "answer"),
    [
        ("why\n</think>\n\nbecause", True, "why", "because"),
        ("\nwhy</think>because", True, "why", "because"),
        ("<think>\nwhy\n</think>\n\nbecause\n", False, "why", "because\n"),
        (" \n<think>why</think>because", False, "why", "because"),
        ("</think>because", True, "", "because"),
        ("never closed\n\n", True, "never closed", ""),
        ("<think>never closed", False, "never closed", ""),
        ("no tags", False, "", "no tags"),
        ("\nno tags", False, "", "\nno tags"),
        ("a <think>b</think>", False, "", "a <think>b</think>"),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("a\n<b></thin", True, "a\n<b></thin", ""),
        ("<thin", False, "", "<thin"),
        ("", True, "", ""),
        ("  ", False, "", "  "),
        ("<think>a<think>b</think>c", False, "a<think>b", "c"),
    ],
)
def test_parts_of_a_whole_text(text, inside, reasoning, answer):
    assert split_reasoning(text, start_in_reasoning=inside) == (reasoning, answer)


@settings(max_examples=400)
@given(st.lists(PIECES, max_size=12), st.lists(st.integers(0, 60), max_size=12), st.booleans())
def test_any_chunking_gives_the_same_parts(pieces, cuts, inside):
    text = "".join(pieces)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    splitter = ReasoningSplitter(inside)
    out = []
    for start, end in itertools.pairwise(edges):
        out += splitter.push(text[start:end])
    out += splitter.flush()
    joined = tuple("".join(piece for part, piece in out if part == kind) for kind in ("reasoning", "content"))
    assert joined == split_reasoning(text, start_in_reasoning=inside)
    assert all(piece for _, piece in out)
    kinds = [part for part, _ in out]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes first"


def test_text_is_passed_on_at_once_and_only_a_possible_tag_is_held():
    splitter = ReasoningSplitter(True)
    assert splitter.push("abc") == [("reasoning", "abc")]
    assert splitter.push("d</th") == [("reasoning", "d")]
    assert splitter.in_reasoning
    assert splitter.push("e") == [("reasoning", "</the")]
    assert splitter.push("f\n</think>\n") == [("reasoning", "f")]
    assert not splitter.in_reasoning
    assert splitter.push("\nhi\n") == [("content", "hi\n")]
    assert splitter.flush() == []


def test_nothing_is_lost_but_tags_and_newlines_around_them():
    text = "x" * 10_000
    assert split_reasoning(f"<think>{text}</think>{text}", start_in_reasoning=False) == (text, text)
