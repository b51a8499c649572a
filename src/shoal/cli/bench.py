"""`shoal bench`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.console import human_bytes, note, print_pairs, print_table

if TYPE_CHECKING:
    from shoal.engine.bench import Measured, Spread
    from shoal.engine.core import Core

COLUMNS = ("batch", "depth", "prompt tok/s", "first token", "decode tok/s", "gb/s", "of memory's")


def run(
    model: Annotated[str, typer.Argument(help="Short name, Hugging Face folder or GGUF file.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    gen: Annotated[int, typer.Option(min=0, help="Tokens to generate after the first; 0: the prompt alone.")] = 64,
    depth: Annotated[str, typer.Option(help="Tokens in the cache before the prompt; 0,1024 gives a row each.")] = "0",
    batch: Annotated[str, typer.Option(help="Sequences that run together; 1,8 gives a row each.")] = "1",
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.")] = None,
    weights: Annotated[str, typer.Option(help="auto (as in the file), or f32, bf16, q8, q4, q4m.")] = "auto",
    activations: Annotated[str, typer.Option(help="auto, int8 or int16, where they meet quantised weights.")] = "auto",
    cache: Annotated[str, typer.Option(help="f32, bf16 or int8, the precision of the attention cache.")] = "bf16",
    prefill: Annotated[str, typer.Option(help="auto, absorbed or expanded: MLA's form over prompts.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each row; shown are median, least and most.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines also on a terminal.")] = False,
) -> None:
    """Measure a model: speed of prompt and decoding, time to the first token, memory.

    Random tokens run through the engine as requests do, a batch together; speeds are totals over the batch. GB/s counts
    what decoding has to read: the weights once a step (of the experts those in use) and every sequence's cache. The
    last column sets it beside plain reading on the same threads, measured just before; a model that fits into the
    processor's caches can pass 100%. A terminal gets a table, anything else a line of JSON for each row.

    [bold]Examples[/bold]
      shoal bench smollm2-135m
      shoal bench ./model.gguf --prompt 16 --depth 0,1024,4096 --batch 1,8,32
      shoal bench ./model.gguf --json | jq .decode_tok_s
    """
    from shoal import hub, kernels, settings
    from shoal.engine.bench import Bench, Case, open_core, read_bandwidth
    from shoal.formats.checkpoint import open_checkpoint

    depths, batches = _numbers("--depth", depth), _numbers("--batch", batch)
    cases = [Case(prompt=prompt, gen=gen, depth=d, batch=b) for d in depths for b in batches]
    isa = kernels.selected_isa()  # puts SHOAL_ISA in force, too
    started = time.perf_counter()
    checkpoint = open_checkpoint(hub.resolve(model))
    core = open_core(
        checkpoint, cases, threads=threads or settings.threads(), weights=weights, activations=activations,
        cache=cache, prefill=prefill,
    )  # fmt: skip
    facts = {"model": model, "threads": core.threads, "isa": isa, "weights": weights, "activations": activations}
    facts |= {"cache": cache, "prefill": prefill, "load_seconds": time.perf_counter() - started}
    bench = Bench(core, checkpoint.config)
    table = sys.stdout.isatty() and not as_json
    rows = []
    for case in cases:
        read_gb_s = read_bandwidth(core.threads) / 1e9
        note(f"batch {case.batch}, depth {case.depth}")  # no bar: its thread would take time from what is measured
        measured = bench.measure(case, repeats=repeats)
        rows.append({**facts, **_row(measured, core, read_gb_s), "repeats": repeats})
        if not table:
            _write_line(rows[-1])
    if table:
        _show(rows)


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 0,1024", param_hint=option)
    return [int(part) for part in parts]


def _row(measured: Measured, core: Core, read_gb_s: float) -> dict[str, Any]:
    from shoal.cli.machine import peak_rss_bytes

    case, speed = measured.case, measured.decode_gb_s
    row: dict[str, Any] = {"batch": case.batch, "depth": case.depth, "prompt": case.prompt, "gen": case.gen}
    for name in ("prompt_tok_s", "first_token_s", "decode_tok_s", "decode_gb_s"):
        spread: Spread | None = getattr(measured, name)
        row[name] = spread.median if spread else None
        row[f"{name}_range"] = [spread.low, spread.high] if spread else None
    return row | {
        "read_gb_s": read_gb_s,
        "bandwidth_share": speed.median / read_gb_s if speed else None,
        "step_bytes": {
            "weights": measured.weight_bytes,
            "experts": measured.expert_bytes,
            "cache": measured.cache_bytes,
        },
        "experts_per_layer": measured.experts_per_layer,
        "weight_bytes": core.weight_bytes,
        "cache_bytes": core.cache_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _write_line(row: dict[str, Any]) -> None:
    import orjson

    sys.stdout.write(orjson.dumps(row).decode() + "\n")
    sys.stdout.flush()  # a long run's rows are there when they are done


def _show(rows: list[dict[str, Any]]) -> None:
    first, last = rows[0], rows[-1]
    print_pairs(
        {
            "model": f"{first['model']}, {human_bytes(first['weight_bytes'])} of weights",
            "run": f"{first['threads']} threads, {first['isa']}, prompt {first['prompt']}, gen {first['gen']}, "
            f"median (least–most) of {first['repeats']}",
            "memory": f"{human_bytes(last['peak_rss_bytes'])} at most, {human_bytes(last['cache_bytes'])} of it cache",
        }
    )
    print()
    print_table([_cells(row) for row in rows], COLUMNS)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    share = row["bandwidth_share"]
    return {
        "batch": str(row["batch"]),
        "depth": str(row["depth"]),
        "prompt tok/s": _spread(row, "prompt_tok_s"),
        "first token": _spread(row, "first_token_s", 1000) + " ms",
        "decode tok/s": _spread(row, "decode_tok_s"),
        "gb/s": _spread(row, "decode_gb_s"),
        "of memory's": "–" if share is None else f"{row['read_gb_s']:.1f} ({100 * share:.0f}%)",
    }


def _spread(row: dict[str, Any], name: str, factor: float = 1.0) -> str:
    if row[name] is None:
        return "–"
    low, high = row[f"{name}_range"]
    return f"{_short(row[name] * factor)} ({_short(low * factor)}–{_short(high * factor)})"


def _short(value: float) -> str:
    """Three digits that count: 0.812, 23.4, 1530."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
