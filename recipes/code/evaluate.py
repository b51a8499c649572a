"""Judge the code model and its twin on held-out packages.

    python recipes/code/evaluate.py MODEL --corpus DIR [--run RUN] [--twin MODEL --twin-run RUN] --out RESULTS

Completion runs in Shoal's engine for both models, so that quality is compared alone; speed is measured in processes of
their own under a memory limit, the twin's also in llama.cpp (`speed.py`). RUN folders give loss by operations and by
time. Writes RESULTS.json and RESULTS.md. Shares come with 95 % Wilson intervals.
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

from shoal.config import ModelConfig
from shoal.cost.model_cost import cache_bytes_per_token, model_cost
from shoal.cost.train_flops import train_flops
from shoal.engine import LLM, SamplingParams
from shoal.formats.checkpoint import open_checkpoint
from shoal.formats.convert import convert

LINE_TOKENS, FUNCTION_TOKENS = 48, 192
Json = dict[str, Any]
Curve = list[tuple[float, float, float]]  # operations, seconds, held-out loss


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
    counts: dict[str, list[int]] = {}
    for case in cases:
        for with_suffix in (False, True):
            right = _is_right(llm, case, with_suffix=with_suffix)
            counts.setdefault(f"{case.kind} {'fim' if with_suffix else 'plain'}", []).append(right)
    return {name: [*wilson(sum(found), len(found)), len(found)] for name, found in counts.items()}


def _is_right(llm: LLM, case: Case, *, with_suffix: bool) -> bool:
    function = case.kind == "function"
    count = FUNCTION_TOKENS if function else LINE_TOKENS
    ids = prompt_ids(case, llm.tokenizer, llm.max_context - count, with_suffix=with_suffix)
    stop = () if function else ("\n",)
    done = llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=count, stop=stop))
    if function:  # an end token ends the last line too, the token limit does not
        return is_valid_function(case, done.text + ("\n" if done.finish_reason == "stop" else ""))
    return first_line(done.text) == case.expected.rstrip()


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


def curve(run: Path, config: ModelConfig, tokens_per_step: int, sequence_length: int) -> Curve:
    """Held-out loss of a run by operations and by seconds of training."""
    per_step = train_flops(config, sequence_length).model * tokens_per_step
    out: Curve = []
    seconds = 0.0
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds += record.get("seconds", tokens_per_step / record["tok_s"])
        if record.get("val_loss") is not None:
            out.append((record["step"] * per_step, seconds, record["val_loss"]))
    return out


def ratios(ours: Curve, twins: Curve) -> list[Json]:
    """For each held-out loss of ours within the twin's range: how many times our operations and seconds it took."""
    out = []
    for flops, seconds, loss in ours:
        at = next((index for index in range(1, len(twins)) if twins[index][2] <= loss < twins[index - 1][2]), None)
        if at is None:
            continue
        (f0, s0, l0), (f1, s1, l1) = twins[at - 1], twins[at]
        part = (l0 - loss) / (l0 - l1)
        out.append(
            {
                "val_loss": loss,
                "flops": flops,
                "twin_flops_ratio": (f0 + part * (f1 - f0)) / flops,
                "twin_seconds_ratio": (s0 + part * (s1 - s0)) / seconds,
            }
        )
    return out


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
    if points := result.get("ratios"):
        last = points[-1]
        lines += [
            "",
            f"At held-out loss {last['val_loss']:.3f} the twin needs {last['twin_flops_ratio']:.2f} × the operations.",
        ]
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gb", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result: Json = {"code": examine(options.model, options, twin=False)}
    curves: dict[str, Curve] = {}
    for name, model, run in (("code", options.model, options.run), ("twin", options.twin, options.twin_run)):
        if model is not None and run is not None:
            config = open_checkpoint(model).config
            curves[name] = curve(run, config, options.tokens_per_step, options.sequence_length)
    if options.twin is not None:
        result["twin"] = examine(options.twin, options, twin=True)
    if curves:
        result["curves"] = curves
    if len(curves) == 2:
        result["ratios"] = ratios(curves["code"], curves["twin"])
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
