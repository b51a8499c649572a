"""Milliseconds of a completion, in a process of its own under a memory limit: in Shoal's engine, or in llama.cpp.

    python recipes/code/speed.py shoal MODEL PROMPTS.json --limit-gb 4
    python recipes/code/speed.py llama.cpp MODEL.gguf PROMPTS.json --limit-gb 4

PROMPTS.json is a list of lists of token ids. Each is completed greedily by `--tokens` tokens, end tokens ignored, so
that both engines do the same work; one prompt beforehand warms up. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Complete = Callable[[list[int], int], dict[str, Any]]


def shoal_engine(model: Path, threads: int, context: int, look_ahead: bool) -> Complete:
    from shoal.engine import LLM, SamplingParams

    llm = LLM(model, threads=threads, max_context=context, cache_tokens=4 * context, look_ahead=look_ahead)

    def complete(ids: list[int], count: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        stats = llm.generate(ids, params).stats
        return {"tokens": stats.completion_tokens, "drafted": stats.drafted, "accepted": stats.accepted}

    return complete


def llama_cpp(model: Path, threads: int, context: int) -> Complete:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def complete(ids: list[int], count: int) -> dict[str, Any]:
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        answer = server.handle_completions(body)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        usage = answer.get("usage", {})
        return {"tokens": usage.get("completion_tokens", answer.get("tokens_predicted", 0))}

    return complete


def measure(complete: Complete, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Milliseconds of each completion and what came of it."""
    complete(prompts[0], tokens)
    spent, results = [], []
    for ids in prompts[1:]:
        started = time.perf_counter()
        results.append(complete(ids, tokens))
        spent.append(1000 * (time.perf_counter() - started))
    ordered = sorted(spent)
    drafted = sum(result.get("drafted", 0) for result in results)
    return {
        "completions": len(spent),
        "tokens_each": tokens,
        "tokens_produced": sum(result["tokens"] for result in results),
        "ms_median": statistics.median(spent),
        "ms_p90": ordered[int(0.9 * (len(ordered) - 1))],
        "drafted": drafted,
        "accepted_share": sum(result.get("accepted", 0) for result in results) / drafted if drafted else None,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("shoal", "llama.cpp"))
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--look-ahead", action="store_true", help="guess with the MTP layer (shoal)")
    parser.add_argument("--limit-gb", type=float, default=4.0, help="address space that the process may have; 0: all")
    options = parser.parse_args()
    if options.limit_gb:
        limit = int(options.limit_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if options.engine == "shoal":
        complete = shoal_engine(options.model, options.threads, options.context, options.look_ahead)
    else:
        complete = llama_cpp(options.model, options.threads, options.context)
    print(json.dumps(measure(complete, json.loads(options.prompts.read_text()), options.tokens)))


if __name__ == "__main__":
    main()
