#!/usr/bin/env python3
"""`shoal serve` under load beside llama-server: the same model file, the same requests, turn by turn.

Each turn starts one server, lets a second process load it over loopback for a minute, and stops it; then the other's
turn comes. A ratio is taken inside a pair of turns; the table shows the median pair.

    make bench-serve                                    every case, at least 20 minutes
    make bench-serve ARGS="--cases tiny --repeats 1"    one case
    make bench-serve ARGS="--quick"                     shows that everything runs; the numbers mean nothing
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from peers_report import commit, slug
from random_gguf import REVISION, SHAPES, write_random

from shoal.cli.machine import describe_machine
from shoal.formats.atomic import atomic_file

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load. `slots`: answers that a server writes at once; `queue`: requests that Shoal lets wait (llama-server has
    no such bound); `peer`: whether llama-server takes its turn too."""

    name: str
    title: str
    model: str
    load: tuple[str, ...]
    slots: int
    queue: int = 64
    context: int = 64  # tokens a slot, for llama-server, which divides its cache
    peer: bool = True


CASES = (
    Case(
        name="tiny", title="16 + 16 tokens, 32 clients", model="tiny", slots=32,
        load=("--clients", "32", "--prompt", "16", "--gen", "16"),
    ),
    Case(
        name="chat", title="chat, 64 tokens, 8 clients", model="smollm2", slots=8, context=512,
        load=("--clients", "8", "--chat", "--gen", "64"),
    ),
    Case(
        name="overload", title="ten times the clients that fit", model="tiny", slots=16, queue=16, peer=False,
        load=("--clients", "320", "--prompt", "16", "--gen", "16"),
    ),
    Case(
        name="open", title="200 requests/s, 16 + 8 tokens", model="tiny", slots=32, queue=256,
        load=("--rate", "200", "--prompt", "16", "--gen", "8"),
    ),
)  # fmt: skip


def our_command(case: Case, model: Path, port: int, threads: int) -> list[str]:
    return [
        sys.executable, "-m", "shoal", "serve", "--model", str(model), "--port", str(port), "--threads", str(threads),
        "--parallel", str(case.slots), "--max-queue", str(case.queue), "--log", "none",
    ]  # fmt: skip


def their_command(folder: Path, case: Case, model: Path, port: int, threads: int) -> list[str]:
    return [
        str(folder / "llama-server"), "-m", str(model), "--port", str(port), "-t", str(threads), "-tb", str(threads),
        "-np", str(case.slots), "-c", str(case.slots * case.context), "-fa", "on", "--no-webui", "--no-cache-prompt",
    ]  # fmt: skip


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers its health check, until the block ends."""
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            end = time.monotonic() + 180
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"serve.py: the server did not start; see {log}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def turn(command: list[str], case: Case, port: int, seconds: float, log: Path) -> dict[str, Any]:
    load = [sys.executable, str(Path(__file__).with_name("serve_load.py")), f"http://127.0.0.1:{port}", *case.load]
    with serving(command, port, log) as process:
        done = subprocess.run([*load, "--seconds", str(seconds)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"serve.py: the load failed: {done.stderr[-500:]}")
        row: dict[str, Any] = json.loads(done.stdout)
        row["alive"] = process.poll() is None
    return row


def measure(case: Case, args: argparse.Namespace, peer: llama_cpp.LlamaCpp | None, model: Path) -> dict[str, Any]:
    pairs = []
    seconds = 3.0 if args.quick else args.seconds
    for index in range(1 if args.quick else args.repeats):
        port = free_port()
        pair = {
            "load_average": os.getloadavg()[0],
            "ours": turn(our_command(case, model, port, args.threads), case, port, seconds, args.work / "shoal.log"),
        }
        if peer is not None and case.peer:
            port = free_port()
            command = their_command(peer.folder, case, model, port, args.threads)
            pair["theirs"] = turn(command, case, port, seconds, args.work / "llama-server.log")
        pairs.append(pair)
        print(f"{case.name}, {index + 1}: " + json.dumps(pair), file=sys.stderr, flush=True)
    return {"case": case.name, "title": case.title, "model": case.model, "seconds": seconds, "pairs": pairs}


def model_of(name: str, work: Path) -> Path:
    if name == "tiny":
        path = work / f"tiny-q8_0-r{REVISION}.gguf"
        if not path.exists():
            write_random(SHAPES["tiny"](), "Q8_0", path, name="tiny-q8_0")
        return path
    from shoal import hub

    return hub.resolve("smollm2-135m")


def markdown(facts: dict[str, Any]) -> str:
    machine = facts["machine"]
    head = ("case", "Shoal", "llama-server", "ratio", "Shoal p50 / p99", "llama-server p50 / p99", "refused", "lost")
    lines = [
        f"# Servers under load, {facts['date']}",
        "",
        *(["A trial of the script: **these numbers mean nothing.**", ""] if facts["quick"] else []),
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']};"
        f" {facts['threads']} threads on both sides, which the client shares",
        f"- Shoal {machine['shoal']} ({facts['commit']}), kernels {machine['isa']}, Python {machine['python']}",
        f"- llama.cpp {facts['llama_cpp']}, native build, flash attention on",
        f"- `{facts['command']}`",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(_row(result)) + " |" for result in facts["results"]),
        "",
        f"Answers a second, all clients together, over at least {facts['results'][0]['seconds']:g} s a turn; medians of"
        f" {len(facts['results'][0]['pairs'])} turns. Latencies are whole answers of admitted requests, from when"
        " they were due. `overload` runs against a queue of 16; a refused client waits 0.1 s and asks again.",
        "",
    ]
    return "\n".join(lines)


def _row(result: dict[str, Any]) -> list[str]:
    def middle(side: str, name: str) -> float | None:
        values = [pair[side][name] for pair in result["pairs"] if side in pair and pair[side][name] is not None]
        return statistics.median(values) if values else None

    ours, theirs = middle("ours", "answers_per_s"), middle("theirs", "answers_per_s")
    ratios = [
        pair["ours"]["answers_per_s"] / max(pair["theirs"]["answers_per_s"], 1e-9)
        for pair in result["pairs"]
        if "theirs" in pair
    ]
    latencies = []
    for side in ("ours", "theirs"):
        p50, p99 = middle(side, "p50_ms"), middle(side, "p99_ms")
        latencies.append("" if p50 is None or p99 is None else f"{p50:.0f} / {p99:.0f} ms")
    refused = sum(pair["ours"]["statuses"].get("429", 0) for pair in result["pairs"])
    return [
        f"{result['model']}: {result['title']}",
        f"{ours:.1f}/s" if ours is not None else "",
        f"{theirs:.1f}/s" if theirs is not None else "",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "",
        *latencies,
        str(refused),
        str(sum(pair["ours"]["lost"] for pair in result["pairs"])),
    ]


def write(facts: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    stem = f"serve_{slug(facts['machine']['cpu'])}_{facts['date']}{'_quick' if facts['quick'] else ''}"
    for name, text in ((f"{stem}.json", json.dumps(facts, indent=1) + "\n"), (f"{stem}.md", markdown(facts))):
        with atomic_file(out / name) as stream:
            stream.write(text.encode())
    print(out / f"{stem}.md", flush=True)


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in CASES if not args.cases or case.name in args.cases.split(",")]
    if not wanted:
        sys.exit(f"serve.py: no case {args.cases}")
    try:
        peer = None if args.alone else llama_cpp.find(args.llama_cpp, args.work)
    except llama_cpp.PeerError as error:
        sys.exit(f"serve.py: {error}")
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/serve.py " + " ".join(word for word in sys.argv[1:] if os.sep not in word),
        "threads": args.threads,
        "quick": args.quick,
        "machine": describe_machine(),
        "commit": commit(),
        "llama_cpp": peer.version if peer is not None else "not measured",
        "results": [],
    }
    for case in wanted:
        facts["results"].append(measure(case, args, peer, model_of(case.model, args.work)))
        write(facts, args.out)  # after every case, so that a stop loses little


def _arguments() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal" / "peers"
    build = os.environ.get("LLAMA_CPP")
    parser = argparse.ArgumentParser(description="Measure shoal serve beside llama-server.")
    parser.add_argument("--cases", default="", help=f"of {', '.join(case.name for case in CASES)}; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load in each turn (60)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs for each case (3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on both sides")
    parser.add_argument("--llama-cpp", type=Path, default=Path(build) if build else None, help="a build of llama.cpp")
    parser.add_argument("--alone", action="store_true", help="without llama-server")
    parser.add_argument("--work", type=Path, default=cache, help="where models and logs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="3 s a turn, once; the numbers mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
