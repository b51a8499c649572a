"""Where the server's threads run."""

from __future__ import annotations

import pytest

from shoal.server import run
from shoal.server.run import places


@pytest.mark.parametrize(
    ("allowed", "threads", "pin", "expected"),
    [
        ([0, 1], 2, True, ([0], [1])),
        ([4, 5, 9], 3, True, ([4], [5, 9])),
        ([0, 1], 2, False, ([], [])),
        ([0, 1], 1, True, ([], [])),  # there is room: the system may move them
        ([0, 1], 8, True, ([], [])),
        ([0], 1, True, ([], [])),
        ([], 2, True, ([], [])),  # a system that does not tell
    ],
)
def test_threads_are_kept_apart_where_they_fill_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    allowed: list[int],
    threads: int,
    pin: bool,
    expected: tuple[list[int], list[int]],
) -> None:
    monkeypatch.setattr(run, "processors", lambda: allowed)
    assert places(threads, pin) == expected
