"""Shards in processes: a marker for each that is done, a cap on memory that holds, the same bytes whoever works.

A task is a picklable function of a shard's number that writes whole files and returns a ledger. That is all the
contract there is, so that any scheduler can run it; `ray_engine` hands the same tasks to Ray.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from shoal import settings
from shoal.errors import ConfigError, ShoalError
from shoal.formats.atomic import atomic_file
from shoal.formats.hf_config import read_json

Task = Callable[[int], dict[str, Any]]
Progress = Callable[[int, int], None]
MARKER_BYTES = 1 << 30
PARENT = 128 << 20  # bytes of the process that hands out the work
WORKER_BASE = 256 << 20  # bytes of a worker before it holds a document: the interpreter and its libraries
PRELOADED = ["shoal.data.clean", "shoal.data.pack", "pyarrow.parquet", "rensa"]  # those that are there
DOCUMENT_COST = 96  # bytes that a byte of the largest document may cost to clean: its text, words and their hashes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the work is done. Changes no byte of the result.

    Attributes:
        workers: processes; None takes the processors that this process may use, as far as memory goes.
        memory: bytes for all of them together; None leaves them to the machine.
        engine: `processes` or `ray`.
        address: of a Ray cluster; None starts one here.
    """

    workers: int | None = None
    memory: int | None = None
    engine: str = "processes"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("processes", "ray"):
            raise ConfigError("engine", f"must be processes or ray, got {self.engine!r}")
        if self.workers is not None and self.workers < 1:
            raise ConfigError("workers", f"must be at least 1, got {self.workers}")

    def share(self, largest: int) -> tuple[int, int | None]:
        """(workers, bytes for each), where the largest document costs so many bytes. Raises ConfigError where the
        memory is too little for one."""
        wanted = self.workers or len(os.sched_getaffinity(0))
        if self.memory is None:
            return wanted, None
        least = WORKER_BASE + largest
        if self.memory < PARENT + least:
            raise ConfigError(
                "memory",
                f"must be at least {-(-(PARENT + least) >> 20)} MiB, {-(-largest >> 20)} of them for the largest "
                f"document, got {self.memory >> 20} MiB; a smaller max_document needs less",
            )
        workers = min(wanted, (self.memory - PARENT) // least)
        return workers, (self.memory - PARENT) // workers


class WorkerError(ShoalError):
    """A worker process was killed, most often for want of memory."""


def marker_path(folder: Path, stage: str, shard: int) -> Path:
    """Where it is written down that a stage has done a shard."""
    return folder / "done" / stage / f"{shard:05d}.json"


def _none(shard: int) -> Iterable[Path]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run that shards go through one by one.

    Attributes:
        name: of its markers, `done/<name>/`.
        key: of everything that decides its result; a marker with another key counts for nothing.
        task: what is done for a shard.
        files: what it leaves of a shard; a marker without them counts for nothing either.
    """

    folder: Path
    name: str
    key: str
    task: Task
    files: Callable[[int], Iterable[Path]] = _none

    def marker(self, shard: int) -> Path:
        return marker_path(self.folder, self.name, shard)

    def ledger(self, shard: int) -> dict[str, Any] | None:
        """What the task returned for a finished shard, or None."""
        path = self.marker(shard)
        if not path.exists() or not all(one.exists() for one in self.files(shard)):
            return None
        data = read_json(path, MARKER_BYTES)
        return data["ledger"] if data["key"] == self.key else None

    def finish(self, shard: int) -> None:
        """Do the task and then set its marker: a killed run does the shard again, a finished one does not."""
        path = self.marker(shard)
        path.unlink(missing_ok=True)  # one of other settings must not vouch for files that are half of these
        try:
            data = {"key": self.key, "ledger": self.task(shard)}
        except MemoryError as error:
            cap = _mib(resource.getrlimit(resource.RLIMIT_DATA)[0])
            raise WorkerError(f"shard {shard} needs more than its share of memory ({cap})") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as out:
            out.write(json.dumps(data, ensure_ascii=False).encode())


def run_stage(
    stage: Stage, shards: Sequence[int], machine: Machine, *, largest: int = 0, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Do the stage for every shard that has no marker yet, and return the ledgers of all, in the order of shards.

    Args:
        largest: bytes of memory that the largest document may cost.

    Raises:
        ShoalError: what the task raised, with everything finished so far kept; WorkerError if a process was killed.
    """
    left = [shard for shard in shards if stage.ledger(shard) is None]
    done = len(shards) - len(left)
    for _ in _finished(stage.finish, left, machine, largest):
        done += 1
        if progress is not None:
            progress(done, len(shards))
    if left:
        for rest in list(stage.folder.rglob(".*.partial")):  # of workers that were killed
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)
    return [stage.ledger(shard) or {} for shard in shards]


def _finished(finisher: Callable[[int], None], left: list[int], machine: Machine, largest: int) -> Iterator[int]:
    """Numbers of shards, as they are finished."""
    workers, memory = machine.share(largest)
    if left and machine.engine == "ray":
        from shoal.data.ray_engine import run_on_ray

        yield from run_on_ray(finisher, left, machine.address, workers, memory)
    elif min(workers, len(left)) <= 1 and memory is None:
        for shard in left:
            finisher(shard)
            yield shard
    else:
        yield from _in_processes(finisher, left, workers, memory)


def _in_processes(finisher: Callable[[int], None], left: list[int], workers: int, memory: int | None) -> Iterator[int]:
    # Not forked from here: the tokenizer's and arrow's threads do not survive that. A server that has only read those
    # libraries has threads that end and begin again around a fork (OpenBLAS's, jemalloc's); what it has read lies in
    # memory once for all workers.
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(
        max(1, min(workers, len(left))), context, initializer=prepare_worker, initargs=(memory,)
    ) as pool:
        waiting: dict[Future[None], int] = {pool.submit(finisher, shard): shard for shard in left}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    shard = waiting.pop(future)
                    future.result()
                    yield shard
        except BrokenProcessPool as error:
            raise WorkerError(
                f"a worker process was killed, most likely for want of memory ({_mib(memory)}); what is finished is "
                "kept, and the same command goes on from there"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _mib(memory: int | None) -> str:
    return "no cap was set" if memory in (None, resource.RLIM_INFINITY) else f"{memory >> 20} MiB"


def prepare_worker(memory: int | None) -> None:
    """In a worker: one thread a library, and so many bytes of private memory and no more."""
    settings.one_thread_each()
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
