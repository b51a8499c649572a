"""Stop strings in text that comes in pieces."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.stops import StopMatcher

TEXT = st.text("ab<€", max_size=30)


@given(TEXT, st.lists(st.text("ab<€", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 30), max_size=8))
def test_pieces_show_what_the_whole_text_shows(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    matcher = StopMatcher(tuple(stops))
    shown = ""
    for start, end in itertools.pairwise(edges):
        shown += matcher.push(text[start:end])
        if not matcher.stopped:
            held = text[len(shown) : end]
            assert held == "" or any(stop.startswith(held) for stop in stops), "held back without need"
    shown += matcher.flush()
    # The stop string that is complete first wins; of several that end there, the longest.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert matcher.stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_nothing_is_held_without_need() -> None:
    matcher = StopMatcher(("###", "\n\nUser:"))
    assert matcher.push("one ") == "one "
    assert matcher.push("two #") == "two "
    assert matcher.push("3") == "#3"
    assert matcher.push("\n\nUse") == ""
    assert matcher.push("d") == "\n\nUsed"
    assert matcher.push("x##") == "x"
    assert matcher.push("# tail") == ""
    assert matcher.stopped
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_what_was_held_comes_at_the_end() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.push("the EN") == "the "
    assert matcher.flush() == "EN"
    assert not matcher.stopped
