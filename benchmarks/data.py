"""Curation beside datatrove: the same files, the same steps, turn by turn, each run a process of its own.

Steps on every side: read JSON lines (gzip), Gopher's repetition and quality rules, MinHash near duplicates over all
files, tokenize with one tokenizer. `datatrove` runs as its examples do: 14 buckets of 8 hashes, words by spaCy, which
counts punctuation as words, so that its rules drop more. `datatrove, plain words` is made to split at white space as
Shoal does, so that the rules see the same words and nearly the same is kept. Shoal also verifies candidates,
normalises, looks for licences, measures compressibility and writes its report. All have as many processes. Memory is
the peak of the proportional set sizes of a side's processes together, sampled.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = 4  # the corpus is dealt out to as many; datatrove takes a task a file
VOCABULARY = 16000
QUICK = 4 << 20  # characters of the corpus in a trial
SHOAL, PEER, PLAIN = SIDES = ("shoal", "datatrove", "datatrove, plain words")
DEFAULT = "/usr/share/doc/linux-doc-*/Documentation"


def main() -> None:
    args = _arguments()
    if args.side:
        run_shoal(args.work, args.workers) if args.side == SHOAL else run_datatrove(args.work, args.workers, args.side)
        return
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        work = Path(name)
        size, documents = make_corpus(args.corpus, work, QUICK if args.quick else args.characters)
        print(f"{documents} documents, {size / 1e6:.1f} M characters", file=sys.stderr)
        pairs = []
        for number in range(1 if args.quick else args.pairs):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            pair = {side: measure(side, args, work) for side in order}
            pairs.append(pair)
            print(json.dumps(pair), file=sys.stderr)
    write_report(pairs, size, documents, args, started)


def make_corpus(patterns: list[str], work: Path, characters: int | None) -> tuple[int, int]:
    """Write `FILES` gzipped JSON lines files from text files, and a tokenizer. Returns characters and documents."""
    import glob

    from shoal.data.plan import Source, plan_shards
    from shoal.data.read import ReadOptions, read_part
    from shoal.data.vocabulary import train_tokenizer

    paths = sorted(Path(path) for pattern in patterns for path in glob.glob(pattern))
    if not paths:
        sys.exit(f"nothing at {' '.join(patterns)}; on Debian: apt-get install linux-doc-6.1, or name a --corpus")
    sources = [Source(path=path, name=f"{i}") for i, path in enumerate(paths)]
    shards, _ = plan_shards(sources)
    texts, total = [], 0
    for part in (part for shard in shards for part in shard):
        for document in read_part(part, ReadOptions(), lambda _: None):
            if characters is None or total < characters:
                texts.append(document.text)
                total += len(document.text)
    (work / "in").mkdir()
    for number in range(FILES):
        rows = (json.dumps({"id": str(i), "text": texts[i]}) for i in range(number, len(texts), FILES))
        (work / "in" / f"{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), 6))
    train_tokenizer(texts[:: max(1, total // (8 << 20))], work / "tokenizer", vocab_size=VOCABULARY)
    return total, len(texts)


def measure(side: str, args: argparse.Namespace, work: Path) -> dict[str, float]:
    """Seconds and peak memory of one run; its output is counted and removed."""
    python = sys.executable if side == SHOAL else args.peer_python
    command = [python, __file__, "--side", side, "--work", str(work), "--workers", str(args.workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TOKENIZERS_PARALLELISM": "false"}
    shutil.rmtree(work / side, ignore_errors=True)
    started, peak = time.perf_counter(), 0
    with (work / f"{side}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.1)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{side} failed:\n{(work / f'{side}.log').read_text()[-3000:]}")
    tokens = shoal_tokens(work / side) if side == SHOAL else datatrove_tokens(work / side)
    shutil.rmtree(work / side)
    return {"seconds": seconds, "peak_bytes": peak, "tokens": tokens}


def memory_of(pid: int) -> int:
    """Proportional set size of a process and its descendants."""
    import psutil

    try:
        every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for one in every:
        try:
            found = re.search(rb"^Pss:\s+(\d+)", Path(f"/proc/{one.pid}/smaps_rollup").read_bytes(), re.M)
        except OSError:  # it has just ended
            continue
        total += int(found[1]) << 10 if found else 0
    return total


def run_shoal(work: Path, workers: int) -> None:
    from shoal.data.plan import Source
    from shoal.data.prepare import prepare
    from shoal.data.recipe import Recipe
    from shoal.data.run import Machine

    size = sum(path.stat().st_size for path in (work / "in").iterdir())
    recipe = Recipe(
        sources=(Source(path=work / "in"),), rules=("gopher",), mask_pii=False, identify_language=False,
         tokenizer=str(work / "tokenizer"),
        shard_bytes=size // FILES + 1,
    )  # fmt: skip
    prepare(recipe, work / "shoal", Machine(workers=workers))


def run_datatrove(work: Path, workers: int, side: str) -> None:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )  # fmt: skip
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    out, config = work / side, MinhashConfig()
    if side == PLAIN:
        from datatrove.pipeline.dedup import minhash
        from datatrove.utils import word_tokenizers

        plain = types.SimpleNamespace(word_tokenize=str.split)
        minhash.load_word_tokenizer = word_tokenizers.load_word_tokenizer = lambda language: plain

    def run(name: str, steps: list[Any], tasks: int) -> None:
        LocalPipelineExecutor(
            steps, tasks=tasks, workers=workers, logging_dir=str(out / "logs" / name), start_method="fork"
        ).run()

    clean, signatures, buckets, removed = (str(out / name) for name in ("clean", "signatures", "buckets", "removed"))
    run(
        "clean",
        [
            JsonlReader(str(work / "in")), GopherRepetitionFilter(), GopherQualityFilter(), JsonlWriter(clean),
            MinhashDedupSignature(signatures, config),
        ],
        FILES,
    )  # fmt: skip
    find = MinhashDedupBuckets(signatures, buckets, config=config, only_dedup_in_index=False)
    run("buckets", [find], config.num_buckets)
    run("cluster", [MinhashDedupCluster(buckets, removed, config=config)], 1)
    tokenizer = str(work / "tokenizer" / "tokenizer.json")
    tokens = DocumentTokenizer(
        str(out / "tokens"), tokenizer, eos_token="<|end_of_text|>", batch_size=1000, shuffle_documents=False
    )  # fmt: skip
    run("tokens", [JsonlReader(clean), MinhashDedupFilter(removed), tokens], FILES)


def shoal_tokens(folder: Path) -> int:
    return int(json.loads((folder / "tokens" / "index.json").read_bytes())["num_tokens"])


def datatrove_tokens(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "tokens").glob("*.ds")) // 2


def write_report(
    pairs: list[dict[str, dict[str, float]]], size: int, documents: int, args: argparse.Namespace, started: float
) -> None:
    from shoal.cli.machine import describe_machine
    from shoal.formats.atomic import atomic_file

    machine = describe_machine()
    peer = subprocess.run(
        [args.peer_python, "-c", "import importlib.metadata as m; print(m.version('datatrove'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    words = " ".join(Path(word).name if os.sep in word else word for word in sys.argv[1:])  # no folders of this machine
    command = "make bench-data" + (f' ARGS="{words}"' if words else "")
    facts = {
        "date": time.strftime("%Y-%m-%d", time.localtime(started)), "command": command, "machine": machine,
        "datatrove": peer, "characters": size, "documents": documents, "workers": args.workers, "pairs": pairs,
    }  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    stem = f"data_{slug}_{facts['date']}{'_quick' if args.quick else ''}"
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(facts, indent=1) + "\n", "md": markdown(facts, args.quick)}
    for suffix, text in texts.items():
        with atomic_file(args.out / f"{stem}.{suffix}") as stream:
            stream.write(text.encode())
    print(args.out / f"{stem}.md")


def markdown(facts: dict[str, Any], quick: bool) -> str:
    pairs, size, machine = facts["pairs"], facts["characters"], facts["machine"]
    lines = [f"# Curation: Shoal and datatrove, {facts['date']}", ""]
    if quick:
        lines += ["A trial of the script on little text: **these numbers mean nothing.**", ""]
    lines += [
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']};"
        f" {facts['workers']} processes on both sides",
        f"- Shoal {machine['shoal']}, Python {machine['python']}; datatrove {facts['datatrove']}",
        f"- {facts['documents']:,} documents, {size / 1e6:.1f} M characters, in {FILES} gzipped JSON lines files",
        f"- `{facts['command']}`",
        "",
        "| side | M characters/s | seconds | peak MiB | tokens |",
        "|---|---|---|---|---|",
    ]
    for side in SIDES:
        seconds = statistics.median(pair[side]["seconds"] for pair in pairs)
        peak = max(pair[side]["peak_bytes"] for pair in pairs) / 2**20
        lines.append(
            f"| {side} | {size / seconds / 1e6:.2f} | {seconds:.1f} | {peak:.0f} | {pairs[0][side]['tokens']:,} |"
        )
    for side in (PEER, PLAIN):
        ratios = [pair[side]["seconds"] / pair[SHOAL]["seconds"] for pair in pairs]
        memory = statistics.median(pair[SHOAL]["peak_bytes"] / pair[side]["peak_bytes"] for pair in pairs)
        said = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        lines += [
            "",
            f"Beside {side}: throughput × {said}, peak memory × {memory:.2f}; medians of {len(pairs)} rounds.",
        ]
    lines += ["", (__doc__ or "").split("\n\n", 1)[1]]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", default=[DEFAULT], help="files or folders of text; patterns allowed")
    parser.add_argument("--characters", type=int, help="take no more of it")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes of each side")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has datatrove and spacy")
    parser.add_argument("--quick", action="store_true", help="one pair on little text: a trial of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
