"""Judge the code model and its twin on held-out packages.

    python recipes/code/evaluate.py MODEL --corpus DIR [--run RUN] [--twin MODEL --twin-run RUN] --out RESULTS

Completion runs in Shoal's engine for both models, so that quality is compared alone; speed is measured in processes of
their own under a memory limit, the twin's also in llama.cpp (`speed.py`). RUN folders give loss by operations and by
time. Writes RESULTS.json and RESULTS.md; a model that RESULTS.json knows already is not judged again. Shares come with
95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import Case, draw_cases, first_line, is_valid_function, prompt_ids
from curves import at_the_end, curve, ratios, read_log

from shoal.cost.model_cost import cache_bytes_per_token, model_cost
from shoal.engine import LLM, Generation, SamplingParams
from shoal.engine.generation import run_together
from shoal.formats.checkpoint import open_checkpoint
from shoal.formats.convert import convert

LINE_TOKENS, FUNCTION_TOKENS = 48, 192
AT_ONCE = 32
Json = dict[str, Any]


def wilson(hits: int, total: int) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson 1927)."""
    if not total:
        return math.nan, math.nan, math.nan
    z, share = 1.959964, hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return share, max(0.0, middle - half), min(1.0, middle + half)


def judge(llm: LLM, cases: list[Case]) -> Json:
    """Exact lines and valid functions, with and without the suffix."""
    counts: dict[str, list[bool]] = {}
    for start in range(0, len(cases), AT_ONCE):
        some = cases[start : start + AT_ONCE]
        for with_suffix in (False, True):
            generations = [_prepare(llm, case, with_suffix=with_suffix) for case in some]
            for case, chunks in zip(some, run_together(llm.step, generations), strict=True):
                text = "".join(chunk.text for chunk in chunks)
                name = f"{case.kind} {'fim' if with_suffix else 'plain'}"
                counts.setdefault(name, []).append(_is_right(case, text, chunks[-1].finish_reason))
    return {name: [*wilson(sum(found), len(found)), len(found)] for name, found in counts.items()}


def _prepare(llm: LLM, case: Case, *, with_suffix: bool) -> Generation:
    count, stop = (FUNCTION_TOKENS, ()) if case.kind == "function" else (LINE_TOKENS, ("\n",))
    ids = prompt_ids(case, llm.tokenizer, llm.max_context - count, with_suffix=with_suffix)
    return llm.prepare(ids, SamplingParams(temperature=0.0, max_tokens=count, stop=stop))


def _is_right(case: Case, text: str, finish: str | None) -> bool:
    if case.kind == "function":  # an end token ends the last line too, the token limit does not
        return is_valid_function(case, text + ("\n" if finish == "stop" else ""))
    return first_line(text) == case.expected.rstrip()


def held_out_loss(llm: LLM, cases: list[Case]) -> Json:
    """Nats a token and bits a byte over the last window of the prefixes of `line` cases, plain order."""
    loss = tokens = size = 0.0
    for case in cases:
        if case.kind == "line":
            ids = prompt_ids(case, llm.tokenizer, llm.max_context, with_suffix=False)
            scored = [entry.logprob for entry in llm.score(ids)[1:]]
            loss -= sum(scored)
            tokens += len(scored)
            size += len(llm.tokenizer.decode(ids).encode())
    return {"nats_per_token": loss / tokens, "bits_per_byte": loss / size / math.log(2), "tokens": int(tokens)}


def speeds(model: Path, prompts: list[list[int]], *, twin: bool, threads: int, limit_gb: float) -> Json:
    """Milliseconds of a completion, by engine: ours with and without its MTP layer, the twin also in llama.cpp."""
    script = Path(__file__).with_name("speed.py")
    out: Json = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "prompts.json"
        asked.write_text(json.dumps(prompts))
        ways: dict[str, list[str]] = {"shoal": ["shoal", str(model)]}
        if twin:
            for dtype in ("Q8_0", "Q4_0"):
                gguf = Path(folder) / f"{dtype}.gguf"
                convert(model, gguf, dtype=dtype)
                ways[f"llama.cpp {dtype}"] = ["llama.cpp", str(gguf)]
        else:
            ways["shoal, look-ahead"] = [*ways["shoal"], "--look-ahead"]
        for name, (engine, path, *more) in ways.items():
            command = [sys.executable, str(script), engine, path, str(asked), "--threads", str(threads)]
            done = subprocess.run(
                [*command, "--limit-gb", str(limit_gb), *more], check=True, stdout=subprocess.PIPE, text=True
            )
            out[name] = json.loads(done.stdout.splitlines()[-1])
    return out


def examine(path: Path, options: argparse.Namespace, *, twin: bool) -> Json:
    checkpoint = open_checkpoint(path)
    cost = model_cost(checkpoint.config)
    llm = LLM(checkpoint, threads=options.threads)
    cases = draw_cases(options.corpus, llm.tokenizer, options.cases, options.seed)
    lines = [case for case in cases if case.kind == "line"]
    prompts = [prompt_ids(case, llm.tokenizer, llm.max_context // 2, with_suffix=False) for case in lines]
    facts: Json = {
        "model": path.name,
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        if path.is_dir()
        else path.stat().st_size,
        "total_params": cost.total_params,
        "active_params": cost.active_params,
        "cache_bytes_per_token": cache_bytes_per_token(checkpoint.config),
        "held_out": held_out_loss(llm, cases),
        "completion": judge(llm, cases),
    }
    del llm
    facts["speed"] = speeds(
        path, prompts[: options.prompts + 1], twin=twin, threads=options.threads, limit_gb=options.limit_gb
    )
    return facts


def table(result: Json) -> str:
    """The same as Markdown."""
    models = {name: result[name] for name in ("code", "twin") if name in result}
    lines = ["| | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]

    def row(title: str, show: Any) -> None:
        lines.append(f"| {title} | " + " | ".join(show(facts) for facts in models.values()) + " |")

    row("size on disk, MB", lambda facts: f"{facts['bytes'] / 1e6:.1f}")
    row("parameters, active", lambda f: f"{f['total_params'] / 1e6:.1f} M, {f['active_params'] / 1e6:.1f} M")
    row("cache, bytes a token", lambda facts: str(facts["cache_bytes_per_token"]))
    row("held out, nats a token", lambda facts: f"{facts['held_out']['nats_per_token']:.4f}")
    row("held out, bits a byte", lambda facts: f"{facts['held_out']['bits_per_byte']:.4f}")
    for name in next(iter(models.values()))["completion"]:
        row(name, lambda facts, name=name: "{:.1%} ({:.1%} – {:.1%})".format(*facts["completion"][name][:3]))
    for way in sorted({way for facts in models.values() for way in facts["speed"]}):
        row(
            f"ms a completion, {way}",
            lambda f, way=way: f"{f['speed'][way]['ms_median']:.1f}" if way in f["speed"] else "–",
        )
    row("MTP guesses accepted", _acceptance)
    if end := result.get("end"):
        lines += ["", _compared(end, result["ratios"])]
    return "\n".join(lines) + "\n"


def _compared(end: Json, points: list[Json]) -> str:
    """What the curves say about equal loss, and where they say nothing."""
    words = [f"Held-out loss at the end: {end['val_loss']:.4f}, the twin's {end['twin_val_loss']:.4f}."]
    if end["share_of_twins_flops"] is not None:
        words.append(f"The twin's last loss took the code model {end['share_of_twins_flops']:.2f} of its operations.")
    if points:
        last = points[-1]
        words.append(
            f"At loss {last['val_loss']:.3f}, the lowest that both measured, the twin needed "
            f"{last['twin_flops_ratio']:.2f} × the operations and {last['twin_seconds_ratio']:.2f} × the time."
        )
    if end["val_loss"] < end["twin_val_loss"]:
        words.append("What the twin would need for the code model's last loss was not measured: it never came so low.")
    return " ".join(words)


def _acceptance(facts: Json) -> str:
    share = facts["speed"].get("shoal, look-ahead", {}).get("accepted_share")
    return "–" if share is None else f"{share:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--twin", type=Path)
    parser.add_argument("--twin-run", type=Path)
    parser.add_argument("--cases", type=int, default=400, help="of each kind")
    parser.add_argument("--prompts", type=int, default=40, help="completions to time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gb", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    result: Json = json.loads(file.read_text()) if file.exists() else {}
    for name, model in (("code", options.model), ("twin", options.twin)):
        if model is not None and name not in result:
            result[name] = examine(model, options, twin=name == "twin")
            file.write_text(json.dumps(result, indent=2) + "\n")
    runs = {"code": options.run, "twin": options.twin_run}
    result["curves"] = curves = {name: curve(read_log(run)) for name, run in runs.items() if run is not None}
    if len(curves) == 2:
        result["ratios"] = ratios(curves["code"], curves["twin"])
        result["end"] = at_the_end(curves["code"], curves["twin"])
    file.write_text(json.dumps(result, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
