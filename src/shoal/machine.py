"""What this process may use of the machine: processors and memory, containers' limits included."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def usable_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may run on, rounded up where a container grants a fraction; at least 1."""
    count = len(processors()) or os.cpu_count() or 1
    for folder in _groups(root, "cpu"):
        quota, period = _words(folder / "cpu.max", 2) or (None, None)
        if quota is None:
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            count = min(count, math.ceil(quota / period))
    return max(1, count)


def processors() -> list[int]:
    """Numbers of the processors that this thread may run on; none where the system does not tell (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def stay_on(places: Collection[int], thread: int = 0) -> None:
    """Keep a thread (by its native id; this one), and those that it starts from now on, on these processors; nothing is
    changed if none are named."""
    if places:
        with contextlib.suppress(OSError):  # taken from this process meanwhile: it runs where it may
            os.sched_setaffinity(thread, places)


@contextlib.contextmanager
def staying_on(places: Collection[int]) -> Iterator[None]:
    """`stay_on` until the block ends."""
    before = processors() if places else []
    stay_on(places)
    try:
        yield
    finally:
        stay_on(before)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping, in bytes: what the system has left, and what the container has."""
    import psutil  # type: ignore[import-untyped]

    left = int(psutil.virtual_memory().available)
    for folder in _groups(root, "memory"):
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is None:
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left = min(left, max(0, limit - used + _file_cache(folder / "memory.stat")))
    return left


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next who asks; whether it can (glibc can).

    By itself it hands blocks above 32 MB back to the system at once, and the top of its heap when 64 MB of it are free.
    A training step on a CPU frees a gigabyte that the next one asks for again, and the system clears every page anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # Older versions refuse more than 32 MB for the second.
    return bool(mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)) and any(mallopt(M_MMAP_THRESHOLD, 1 << n) for n in (30, 25))


def _groups(root: Path, kind: str) -> Iterator[Path]:
    """The folders of this process's control groups (version 2, or version 1 of one kind), up to the outermost."""
    base = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds and kind not in kinds.split(","):
            continue
        top = base / kinds if kinds else base
        folder = top / path.strip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top) and place.is_dir())


def _file_cache(stat: Path) -> int:
    """Bytes of files that the system keeps and drops when memory is wanted."""
    values = dict(line.split(maxsplit=1) for line in _text(stat).splitlines() if " " in line)
    found = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(found) if found.isdecimal() else 0


def _number(path: Path) -> int | None:
    words = _words(path, 1)
    return words[0] if words else None


def _words(path: Path, count: int) -> list[int] | None:
    """The numbers in a file; None if it is missing or says `max`."""
    words = _text(path).split()
    return [int(word) for word in words] if len(words) == count and all(word.isdecimal() for word in words) else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
