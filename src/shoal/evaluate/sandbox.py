"""Run a program that a model wrote, in a process of its own with limits.

What holds: processor and wall-clock time, memory, size of written files, few child processes, no core dumps, an empty
environment, an empty working folder that is removed, no network where the kernel lets a user make a network namespace
of his own, and the whole process group is killed at the end. What does not: the program can read whatever the user can
read, and write to what he can write to outside its folder. It keeps accidents harmless; code from somebody who means
harm belongs into a container or a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

MAX_OUTPUT = 64 * 1024
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Wall-clock `seconds` (processor time is limited to the same, rounded up), bytes of `memory`, of files written."""

    seconds: float = 10.0
    memory: int = 1 << 30
    file_bytes: int = 1 << 20
    processes: int = 32


DEFAULT = Limits()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`status` is `ok` (exit code 0), `failed` or `timeout`; `output` the end of what it printed, errors included."""

    status: str
    output: str


def run_program(program: str, limits: Limits = DEFAULT) -> Outcome:
    """Run Python source in this interpreter's isolated mode."""
    if _network_stays():
        _warn_network()
    with tempfile.TemporaryDirectory(prefix="shoal-run-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(_guard(limits) + program, encoding="utf-8", errors="surrogateescape")
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(path)], cwd=folder, env={}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = "ok" if process.wait(limits.seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timeout"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - MAX_OUTPUT))
            return Outcome(status=status, output=output.read().decode("utf-8", "replace"))


# Set in the child itself: code between fork and exec is not safe beside threads, and the engine has them.
_GUARD = """
def _limit(seconds, memory, file_bytes, processes):
    import ctypes, resource
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "unshare"):
        libc.unshare({flags})
    for what, value in (("RLIMIT_CPU", seconds), ("RLIMIT_AS", memory), ("RLIMIT_FSIZE", file_bytes),
                        ("RLIMIT_NPROC", processes), ("RLIMIT_NOFILE", 64), ("RLIMIT_CORE", 0)):
        if hasattr(resource, what):
            kind = getattr(resource, what)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
_limit({seconds}, {memory}, {file_bytes}, {processes})
del _limit
"""


def _guard(limits: Limits) -> str:
    return _GUARD.format(
        seconds=int(limits.seconds) + 1, memory=limits.memory, file_bytes=limits.file_bytes,
        processes=limits.processes, flags=CLONE_NEWUSER | CLONE_NEWNET,
    )  # fmt: skip


@functools.cache
def _network_stays() -> bool:
    """Whether this kernel refuses a network namespace to a plain user; found out in a child."""
    code = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({CLONE_NEWUSER | CLONE_NEWNET}) != 0)"
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False).returncode != 0


@functools.cache
def _warn_network() -> None:
    warnings.warn(
        "this kernel lets no network namespace be made: evaluated programs could use the network", stacklevel=3
    )
