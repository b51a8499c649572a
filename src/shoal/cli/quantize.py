"""`shoal quantize`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.console import Meter, human_bytes, note, print_pairs, print_table, write_json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.formats.checkpoint import Checkpoint
    from shoal.quant.calibrate import Importance
    from shoal.quant.report import Quality, Sizes
    from shoal.quant.texts import Texts

WINDOW = 512
MENTIONED = 0.1  # share of the file from which on a smaller embedding is worth a word


def run(
    src: Annotated[str, typer.Argument(help="Short name, Hugging Face folder or GGUF file.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write; it must be free.")],
    scheme: Annotated[str, typer.Option(help="int8, int4 or int4-asym (4 bits with zero points).")] = "int8",
    group: Annotated[int, typer.Option(help="Columns that share a scale: 32, 64 or 128.")] = 32,
    calibrate: Annotated[
        str, typer.Option(metavar="TEXT", help="builtin, none, or a text file like what the model will read.")
    ] = "builtin",
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How many tokens of it to run.")] = 8192,
    tables: Annotated[
        str, typer.Option(help="Embedding and output head: auto (what every reader understands), int8 or bfloat16.")
    ] = "auto",
    report: Annotated[bool, typer.Option("--report/--no-report", help="Measure what it cost, on other text.")] = True,
    report_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to measure on.")] = 4096,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Shrink a model to 8 or 4 bits a weight.

    Writes a Hugging Face folder in the compressed-tensors layout, which vLLM and others read too. Routers, norms and
    the small MLA projections keep their precision; with int4, attention, shared experts and the output head get 8 bits.

    The weights stream through, one tensor at a time. Calibration keeps the source model in memory, the report both
    models; `--calibrate none --no-report` needs neither.

    [bold]Examples[/bold]
      shoal quantize smollm2-135m ./smollm2-int8
      shoal quantize ./DeepSeek-V2-Lite ./v2-lite-int4 --scheme int4 --group 128 --calibrate prompts.txt
    """
    from shoal import hub
    from shoal.formats.atomic import require_empty
    from shoal.formats.checkpoint import open_checkpoint
    from shoal.quant import quantize
    from shoal.quant.recipes import choose
    from shoal.quant.report import measure_sizes
    from shoal.quant.texts import BUILTIN, load_texts

    path = hub.resolve(src)
    require_empty(dst)
    checkpoint = open_checkpoint(path)
    choose(scheme, group, tables, tied=checkpoint.config.tie_word_embeddings)
    texts = load_texts(BUILTIN if calibrate == "none" else calibrate) if report or calibrate != "none" else None
    started = time.perf_counter()
    importance = _calibrate(checkpoint, texts, calibration_tokens, threads) if texts and calibrate != "none" else None
    with Meter(f"writing {dst}", human_bytes) as meter:
        quantize(
            checkpoint, dst, scheme=scheme, group=group, tables=tables, importance=importance, threads=threads,
            progress=meter,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    del importance
    small = open_checkpoint(dst)
    sizes = measure_sizes(checkpoint, small)
    quality = _compare(checkpoint, small, texts, report_tokens, threads) if report and texts else None
    note(f"{dst}: {human_bytes(sizes.bytes_after)} in {seconds:.1f} s")
    _mention_tables(sizes, tables)
    if as_json:
        write_json(_as_data(path, dst, scheme, seconds, sizes, quality))
    else:
        _show(sizes, quality)


def _calibrate(checkpoint: Checkpoint, texts: Texts, tokens: int, threads: int | None) -> Importance:
    from shoal.quant.calibrate import calibrate

    with Meter("calibrating") as meter:
        return calibrate(checkpoint, _windows(checkpoint, texts.calibration, tokens), threads=threads, progress=meter)


def _windows(checkpoint: Checkpoint, text: str, tokens: int) -> list[list[int]]:
    from shoal.quant.texts import windows

    length = min(WINDOW, checkpoint.config.max_position_embeddings, tokens)
    found = windows(checkpoint.load_tokenizer().encode(text), length, tokens)
    if not found:
        raise ConfigError("calibrate", "the text holds no tokens")
    return found


def _compare(large: Checkpoint, small: Checkpoint, texts: Texts, tokens: int, threads: int | None) -> Quality:
    from shoal.engine import LLM
    from shoal.quant.report import measure_quality

    windows = _windows(large, texts.held_out, tokens)
    options: dict[str, Any] = {"threads": threads, "cache_tokens": WINDOW}
    with Meter("measuring") as meter:
        return measure_quality(LLM(large, **options), LLM(small, **options), windows, meter)


def _mention_tables(sizes: Sizes, tables: str) -> None:
    embedding = next(one for one in sizes.roles if one.role == "embedding")
    saved = embedding.bytes * (1 - 8.5 / 16)
    if tables == "auto" and saved > MENTIONED * sizes.bytes_after:
        note(f"--tables int8 would save {human_bytes(saved)} more; Shoal reads that, vLLM and transformers not yet")


def _as_data(
    path: Path, dst: Path, scheme: str, seconds: float, sizes: Sizes, quality: Quality | None
) -> dict[str, Any]:
    return {
        "source": str(path),
        "path": str(dst),
        "scheme": scheme,
        "seconds": seconds,
        "bytes_before": sizes.bytes_before,
        "bytes_after": sizes.bytes_after,
        "bits_per_weight": sizes.bits_per_weight,
        "roles": [{**asdict(one), "bits": one.bits} for one in sizes.roles],
        "quality": asdict(quality) if quality else None,
    }


def _show(sizes: Sizes, quality: Quality | None) -> None:
    rows = [
        {
            "weights of": one.role,
            "stored as": "+".join(one.dtypes),
            "bits": f"{one.bits:.2f}",
            "size": human_bytes(one.bytes),
        }
        for one in sizes.roles
    ]
    print_table(rows, ("weights of", "stored as", "bits", "size"))
    pairs = {
        "size": f"{human_bytes(sizes.bytes_before)} → {human_bytes(sizes.bytes_after)}",
        "bits per weight": f"{sizes.bits_per_weight:.2f}",
    }
    if quality is not None:
        pairs |= {
            "perplexity": f"{quality.perplexity_before:.3f} → {quality.perplexity_after:.3f}",
            "KL divergence": f"{quality.kl:.5f} nats a token (99% of tokens below {quality.kl_99:.4f})",
            "same likeliest token": f"{quality.top1:.2%}",
            "measured on": f"{quality.tokens} tokens of held-out text",
        }
    print_pairs(pairs)
