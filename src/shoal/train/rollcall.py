"""What processes know of each other when collectives no longer work: who is where, who is gone, and why.

It is kept in the launcher's key-value store, which outlives the processes (torchrun's agent holds it).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from datetime import timedelta

import psutil  # type: ignore[import-untyped]
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

# How long a process has to answer, how often it listens for a call, and how often who waits asks the store.
ANSWER_SECONDS, LISTEN_SECONDS, POLL_SECONDS = 10.0, 1.0, 0.1


class RollCall:
    """The processes of a run as entries of a store: place (host and process id), last words, answers to a call.

    Attributes:
        absent: whom the last call found gone or silent.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = PrefixStore("shoal", store), rank, world
        self.absent: list[int] = []
        self._ended = threading.Event()
        self._listener = threading.Thread(target=self._answer, name="roll call", daemon=True)
        self._listener.start()
        self._turns = 0
        self._places: dict[int, str] = {}
        self.store.set(f"place/{rank}", f"{socket.gethostname()} {os.getpid()}")

    def leave(self, words: str) -> None:
        """Say why this process ends."""
        self.store.set(f"words/{self.rank}", words)

    def lead_first(self) -> None:
        """Every process calls it for each turn of the leading one: it when it is done, the others to wait for that.

        Raises:
            RuntimeError: it is gone.
        """
        key = f"turn/{self._turns}"
        self._turns += 1
        if self.rank == 0:
            self.store.set(key, "")
            return
        while not self.store.check([key]):
            if self._gone(0):
                raise RuntimeError("the leading process is gone")
            time.sleep(POLL_SECONDS)

    def call(self, problem: str) -> str | None:
        """After `problem`, which may be another process's doing: whose, in words; None: this process's own.

        Processes that are known to be gone are to blame; if none is, those that do not answer in time (`absent`); if
        all do, the first that had a problem.
        """
        try:
            ticket = self.store.add("failures", 1)
            self.store.set(f"problem/{self.rank}", f"{ticket} {problem}")
            self.absent = self._wait_for_answers()
            if self.absent:
                return "; ".join(map(self._describe, self.absent))
            failed = [rank for rank in range(self.world) if self.store.check([f"problem/{rank}"])]
            problems = {rank: self.store.get(f"problem/{rank}").decode().split(" ", 1) for rank in failed}
        except DistError:  # whoever held the store is gone: without torchrun, that is rank 0
            self.absent = [0] if self.rank else []
            return f"rank 0 of {self.world} is gone" if self.rank else None
        first = min(problems, key=lambda rank: int(problems[rank][0]))
        return None if first == self.rank else f"{self._where(first)} has failed: {problems[first][1]}"

    def close(self) -> None:
        """Answer no more."""
        self._ended.set()
        self._listener.join()

    def _answer(self) -> None:
        """Answer the first call, whatever the main thread waits for."""
        with contextlib.suppress(DistError):
            while not self._ended.wait(LISTEN_SECONDS):
                if self.store.check(["failures"]):
                    self.store.set(f"here/{self.rank}", "")
                    return

    def _wait_for_answers(self) -> list[int]:
        waited_for = [rank for rank in range(self.world) if rank != self.rank]
        deadline = time.monotonic() + ANSWER_SECONDS
        while waited_for and time.monotonic() < deadline:
            gone = [rank for rank in waited_for if self._gone(rank)]
            if gone:
                return gone
            waited_for = [rank for rank in waited_for if not self.store.check([f"here/{rank}"])]
            time.sleep(POLL_SECONDS)
        return waited_for

    def _describe(self, rank: int) -> str:
        if self.store.check([f"words/{rank}"]):
            return f"{self._where(rank)} has ended: {self.store.get(f'words/{rank}').decode()}"
        return f"{self._where(rank)} {'is gone' if self._gone(rank) else 'does not answer'}"

    def _where(self, rank: int) -> str:
        host, process = self._place(rank)
        return f"rank {rank} of {self.world} (process {process} on {host})"

    def _place(self, rank: int) -> list[str]:
        if rank not in self._places:
            self.store.wait([f"place/{rank}"], timedelta(seconds=ANSWER_SECONDS))
            self._places[rank] = self.store.get(f"place/{rank}").decode()
        return self._places[rank].split(" ")

    def _gone(self, rank: int) -> bool:
        """Whether a process has ended, as far as one can tell from here."""
        if self.store.check([f"words/{rank}"]):
            return True
        if not self.store.check([f"place/{rank}"]):
            return False
        host, process = self._place(rank)
        if host != socket.gethostname():
            return False
        try:
            return bool(psutil.Process(int(process)).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
