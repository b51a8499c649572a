#!/usr/bin/env python3
"""Shoal beside llama.cpp: the same models at the same bits, turn by turn on the same machine.

Every measurement is a process of its own, first Shoal's, then llama.cpp's, and again: the two never run at once, and a
pair lies within the same minutes, so that what the machine does meanwhile meets both. A ratio is taken inside a pair;
the table shows the median of a cell's ratios with the least and the greatest. Both load the same GGUF file, use the
same number of threads and flash attention where llama.cpp has it, and warm up before they measure.

    make bench-peers                                     every cell: hours, 20 GB of disk, 19 GB of memory
    make bench-peers ARGS="--models tiny,smollm2"        minutes
    make bench-peers ARGS="--quick --models tiny"        shows that everything runs; the numbers mean nothing

llama.cpp is built once in the cache folder; --llama-cpp, or LLAMA_CPP in the environment, names a build at hand.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import peers_report
import psutil
from llama_cpp import LlamaCpp, PeerError
from random_gguf import REVISION, SHAPES, file_bytes, write_random

ROOT = Path(__file__).resolve().parents[1]
LARGE_BYTES = 1_000_000_000
SPARE_BYTES = 1_500_000_000  # beside the weights: Python, cache, buffers; and on the disk


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to measure on both sides. `depth` tokens lie in the cache before; `batch` sequences run together; each
    process measures `inner` times and reports the median."""

    name: str
    title: str
    prompt: int
    gen: int
    depth: int = 0
    batch: int = 1
    inner: int = 1

    @property
    def metric(self) -> str:
        return "decode_tok_s" if self.gen else "prompt_tok_s"

    def ours(self, model: Path, threads: int) -> list[str]:
        return [
            sys.executable, "-m", "shoal", "bench", str(model), "--threads", str(threads), "--prompt", str(self.prompt),
            "--gen", str(self.gen), "--depth", str(self.depth), "--batch", str(self.batch),
            "--repeats", str(self.inner), "--json",
        ]  # fmt: skip

    def theirs(self, peer: LlamaCpp, model: Path, threads: int) -> list[str]:
        if self.batch > 1:
            return peer.batched_bench(model, prompt=self.prompt, gen=self.gen, batch=self.batch, threads=threads)
        prompt = 0 if self.gen else self.prompt
        return peer.bench(model, prompt=prompt, gen=self.gen, depth=self.depth, threads=threads, repetitions=self.inner)

    def their_speed(self, row: dict[str, Any]) -> float:
        return float(row["speed_tg"] if self.batch > 1 else statistics.median(row["samples_ts"]))


def cells(size: str) -> dict[str, Cell]:
    """The cells for a `large` model, a `small` one, which needs more tokens to be measured well, or a `quick` trial."""
    pick = ("large", "small", "quick").index(size)
    prompt, deep, batch = (512, 512, 64)[pick], (4096, 4096, 192)[pick], (32, 32, 4)[pick]
    inner, gen, few = (1, 3, 1)[pick], (64, 256, 8)[pick], (32, 64, 8)[pick]
    made = (
        Cell(name="decode", title="decode, 1 sequence", prompt=1, gen=gen, inner=inner),
        Cell(name="prompt", title=f"prompt of {prompt}", prompt=prompt, gen=0, inner=inner),
        Cell(name="deep", title=f"decode, {deep} deep", prompt=1, gen=few, depth=deep),
        Cell(name="batch", title=f"decode, {batch} sequences", prompt=16, gen=few, batch=batch),
    )
    return {cell.name: cell for cell in made}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A GGUF file to measure: one that is there, one converted from a model at hand, or one with random weights."""

    name: str
    dtype: str
    cells: tuple[str, ...]
    shape: str | None = None
    given: Path | None = None

    @property
    def label(self) -> str:
        return f"{self.name}-{self.dtype.lower()}" if self.dtype else self.name

    @property
    def file_name(self) -> str:
        return f"{self.label}.gguf" if self.shape is None else f"{self.label}-r{REVISION}.gguf"


MODELS = (
    Model(name="smollm2", dtype="Q8_0", cells=("decode", "prompt")),
    Model(name="smollm2", dtype="Q4_1", cells=("decode", "prompt")),
    *(Model(name="tiny", dtype=dtype, shape="tiny", cells=("decode", "prompt", "batch")) for dtype in ("Q8_0", "Q4_0")),
    *(
        Model(name="v2lite", dtype=dtype, shape="v2lite", cells=("decode", "prompt", "deep", "batch"))
        for dtype in ("Q4_0", "Q8_0")
    ),
)


@dataclass(kw_only=True)
class Run:
    """What the measurements need, and what they have found so far."""

    peer: LlamaCpp
    work: Path
    threads: int
    repeats: int
    quick: bool
    keep: bool
    only: Sequence[str] | None
    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        say(f"skipped {what}: {why}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_model(run: Run, model: Model) -> None:
    """All cells of a model; its file is made first and, if large, deleted afterwards."""
    made = model.given is None and not (run.work / model.file_name).exists()
    path = _file_of(run, model)
    if path is None:
        return
    try:
        needed = path.stat().st_size + SPARE_BYTES
        available = psutil.virtual_memory().available
        if needed > available:
            run.skip(model.label, f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free")
            return
        chosen = cells("quick" if run.quick else "large" if path.stat().st_size > LARGE_BYTES else "small")
        for name in run.only or model.cells:
            try:
                run.results.append(measure_cell(run, model, path, chosen[name]))
            except PeerError as error:
                run.skip(f"{model.label}, {name}", str(error))
    finally:
        if made and model.shape == "v2lite" and not run.keep:
            path.unlink()


def measure_cell(run: Run, model: Model, path: Path, cell: Cell) -> dict[str, Any]:
    """Pairs of measurements, Shoal first in each."""
    ours, theirs = cell.ours(path, run.threads), cell.theirs(run.peer, path, run.threads)
    pairs = []
    for index in range(run.repeats):
        load, started = os.getloadavg()[0], time.time()
        our_run = llama_cpp.run(ours)
        their_run = llama_cpp.run(theirs)
        row, peer_row = our_run.rows[0], their_run.rows[0]
        pair = {
            "started": started,
            "load_average": load,
            "ours": row[cell.metric],
            "theirs": cell.their_speed(peer_row),
            "their_peak_rss_bytes": their_run.peak_rss_bytes,
            "row": row,
            "their_row": {key: value for key, value in peer_row.items() if key != "model_filename"},
        }
        pairs.append(pair)
        ratio = pair["ours"] / pair["theirs"]
        say(
            f"{model.label}, {cell.title}, {index + 1} of {run.repeats}: "
            f"{pair['ours']:.1f} and {pair['theirs']:.1f} tokens/s, ratio {ratio:.2f}"
        )
        row["model"] = path.name  # where the file lies is nobody's business
    return {
        "model": model.name,
        "dtype": model.dtype,
        "cell": cell.name,
        "title": cell.title,
        "metric": cell.metric,
        "batch": cell.batch,
        "file_bytes": path.stat().st_size,
        "commands": [_shown(ours), _shown(theirs)],
        "pairs": pairs,
    }


def _file_of(run: Run, model: Model) -> Path | None:
    """The model's file, made if it is not there; None if the disk is too full or the model not at hand."""
    if model.given is not None:
        return model.given
    path = run.work / model.file_name
    if path.exists():
        return path
    if model.shape is not None:
        config = SHAPES[model.shape]()
        needed, free = file_bytes(config, model.dtype) + SPARE_BYTES, psutil.disk_usage(str(run.work)).free
        if needed > free:
            run.skip(model.label, f"needs {needed / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free")
            return None
        say(f"writing {path}")
        write_random(config, model.dtype, path, name=model.label)
        return path
    return _smollm2(run, model, path)


def _smollm2(run: Run, model: Model, path: Path) -> Path | None:
    from shoal import hub
    from shoal.errors import ShoalError

    try:
        source = hub.resolve("smollm2-135m")
    except ShoalError as error:
        run.skip(model.label, str(error))
        return None
    if model.dtype == "Q4_1":  # as it is shipped
        return source
    command = [sys.executable, "-m", "shoal", "convert", str(source), str(path), "--dtype", model.dtype.lower()]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        run.skip(model.label, "could not be converted")
        return None
    return path


def _shown(command: Sequence[str]) -> str:
    """A command as a reader would type it: programs and files without their folders."""
    words = [Path(word).name if os.sep in word else word for word in command]
    if words[1:3] == ["-m", "shoal"]:
        words[:3] = ["shoal"]
    return " ".join(words)


def main() -> None:
    args = _arguments()
    if args.work.resolve().is_relative_to(ROOT):
        sys.exit("peers.py: --work must lie outside the repository: models of many GB go there")
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [word for word in args.models.split(",") if word]
    models = [model for model in MODELS if not wanted or {model.name, model.label} & set(wanted)]
    models = [
        Model(name=path.stem, dtype="", cells=("decode", "prompt", "batch"), given=path) for path in args.gguf
    ] or models
    only = args.cells.split(",") if args.cells else None
    unknown = sorted(set(only or ()) - set(cells("small")))
    if unknown or not models:
        sys.exit(f"peers.py: {f'no cell {unknown[0]}' if unknown else f'no model {args.models}'}")
    started = time.time()
    try:
        peer = llama_cpp.find(args.llama_cpp, args.work)
    except PeerError as error:
        sys.exit(f"peers.py: {error}")
    repeats = 1 if args.quick else args.repeats
    run = Run(
        peer=peer, work=args.work, threads=args.threads, repeats=repeats, quick=args.quick, keep=args.keep, only=only
    )
    if os.getloadavg()[0] > 0.5:
        say(f"warning: something else is running here (load average {os.getloadavg()[0]:.1f})")
    for model in models:
        measure_model(run, model)
        peers_report.write(  # after every model, so that a stop loses little
            args.out, results=run.results, skipped=run.skipped, peer=peer.version, threads=args.threads,
            started=started, command=f"python benchmarks/peers.py {_shown(sys.argv[1:])}".rstrip(), quick=args.quick,
        )  # fmt: skip
    if not run.results:
        sys.exit("peers.py: nothing could be measured")


def _arguments() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal" / "peers"
    build = os.environ.get("LLAMA_CPP")
    parser = argparse.ArgumentParser(description="Measure Shoal beside llama.cpp.")
    parser.add_argument("--models", default="", help=f"of {', '.join(model.label for model in MODELS)}; default: all")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="files to measure instead")
    parser.add_argument("--cells", default="", help=f"of {', '.join(cells('small'))}; default: those of each model")
    parser.add_argument("--repeats", type=int, default=5, help="pairs for each cell (5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on both sides")
    parser.add_argument("--llama-cpp", type=Path, default=Path(build) if build else None, help="a build of llama.cpp")
    parser.add_argument("--work", type=Path, default=cache, help="where models and the build go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the report goes")
    parser.add_argument("--keep", action="store_true", help="keep the large models")
    parser.add_argument("--quick", action="store_true", help="small cells, once; the numbers mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
