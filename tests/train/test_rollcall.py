"""Who is to blame when processes stop hearing from each other: told from a store, without any process but this one."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest
from torch.distributed import HashStore

from shoal.train import rollcall
from shoal.train.rollcall import RollCall

HERE = f"(process {os.getpid()} on {socket.gethostname()})"


@pytest.fixture
def meet():
    """Processes of one store, each with its own roll."""
    with contextlib.ExitStack() as rolls:
        store = HashStore()

        def go(*ranks: int, world: int) -> list[RollCall]:
            return [rolls.enter_context(contextlib.closing(RollCall(store, rank, world))) for rank in ranks]

        yield go


def dead_process() -> int:
    """A process id that was somebody's."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_process_that_died_is_named(meet):
    first, second = meet(0, 1, world=2)
    number = dead_process()
    second.store.set("place/1", f"{socket.gethostname()} {number}")
    assert first.call("closed") == f"rank 1 of 2 (process {number} on {socket.gethostname()}) is gone"
    assert first.absent == [1]


def test_last_words_are_passed_on(meet):
    first, second = meet(0, 1, world=2)
    second.leave("data: no such file")
    assert first.call("closed") == f"rank 1 of 2 {HERE} has ended: data: no such file"


def test_who_does_not_answer_is_named_and_who_does_is_not(meet, monkeypatch):
    """On another machine nobody can see whether a process lives."""
    monkeypatch.setattr(rollcall, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(rollcall, "LISTEN_SECONDS", 0.05)
    first, _, third = meet(0, 1, 2, world=3)
    third.close()
    third.store.set("place/2", "elsewhere 17")
    assert first.call("closed") == "rank 2 of 3 (process 17 on elsewhere) does not answer"
    assert first.absent == [2]


def test_where_all_answer_the_first_that_failed_is_to_blame(meet, monkeypatch):
    monkeypatch.setattr(rollcall, "LISTEN_SECONDS", 0.05)
    first, second = meet(0, 1, world=2)
    assert second.call("MemoryError()") is None  # its own
    assert first.call("closed") == f"rank 1 of 2 {HERE} has failed: MemoryError()"
    assert first.absent == []


def test_waiting_for_the_leading_process_ends_with_it(meet):
    first, second = meet(0, 1, world=2)
    first.lead_first()
    second.lead_first()
    first.leave("the disk is full")
    with pytest.raises(RuntimeError, match="gone"):
        second.lead_first()
    assert second.call("gone") == f"rank 0 of 2 {HERE} has ended: the disk is full"
