"""What recording costs: the same work with a recorder and without, turn by turn, on a small random V3 model.

The model is small on purpose (87.6 million weights): the faster a step, the more a fixed cost shows.

    python benchmarks/trace.py            # a table; --json for the numbers, --rounds for more turns
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from random_gguf import tiny, write_random

from shoal import LLM
from shoal.engine import SamplingParams
from shoal.trace.recorder import Recorder
from shoal.trace.table import Shape

CASES = {"prompt of 512": (512, 1, 1), "decoding, one text": (16, 128, 1), "decoding, eight texts": (16, 128, 8)}


def run(llm: LLM, prompts: list[list[int]], gen: int, *, routing: bool = False) -> float:
    params = SamplingParams(temperature=0, max_tokens=gen, ignore_eos=True, routing=routing)
    generations = [llm.prepare(prompt, params) for prompt in prompts]
    start = time.perf_counter()
    for generation in generations:
        generation.start()
    while not all(generation.done for generation in generations):
        llm.step()
        for generation in generations:
            generation.ready()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_random(tiny(), "Q8_0", path)
        llm = LLM(path, cache_tokens=1 << 16, threads=args.threads)
        shape = Shape.of(llm.config, model=llm.name, started="")
        with Recorder(Path(folder) / "trace.parquet", shape, text=llm.tokenizer.token_bytes) as recorder:
            for name, (prompt, gen, batch) in CASES.items():
                ratios: dict[str, list[float]] = {"recorder": [], "feed": []}
                for turn in range(args.rounds + 1):  # the first one warms up
                    prompts = [rng.integers(3, llm.config.vocab_size, prompt).tolist() for _ in range(batch)]
                    seconds = {}
                    for kind in ("off", "recorder", "feed") if turn % 2 else ("feed", "recorder", "off"):
                        fresh = [[*text[:-1], int(rng.integers(3, 32_000))] for text in prompts]
                        fresh = [rng.permutation(text).tolist() for text in fresh]  # nothing is in the cache already
                        llm.trace = recorder.listen if kind == "recorder" else None
                        seconds[kind] = run(llm, fresh, gen, routing=kind == "feed")
                    for kind, found in ratios.items():
                        if turn:
                            found.append(seconds[kind] / seconds["off"] - 1)
                results[name] = {kind: statistics.median(found) for kind, found in ratios.items()}
                results[name] |= {f"{kind}_range": [min(found), max(found)] for kind, found in ratios.items()}
    if args.json:
        print(json.dumps(results, indent=1))
        return
    for name, row in results.items():
        print(f"{name:24}  recorder {row['recorder']:+.2%}   feed {row['feed']:+.2%}")


if __name__ == "__main__":
    main()
