"""`shoal trace`: record where tokens go, sum a recording up, draw it as a timeline."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.console import Meter, human_count, note, print_table, write_json
from shoal.errors import FileError, RequestError, ShoalError

if TYPE_CHECKING:
    from shoal.engine import LLM, Generation, SamplingParams
    from shoal.trace.recorder import Recorder
    from shoal.trace.summary import LayerDrift, LayerSummary
    from shoal.trace.table import Shape

SUMMARY, EXPORT = "summary", "export"


def run(
    what: Annotated[str, typer.Argument(help="A model to record, or `summary` or `export` and a recording.")],
    file: Annotated[Path | None, typer.Argument(help="The recording, after `summary` or `export`.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a prompt a line, or .jsonl with `prompt`, `text` or `messages`.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write: .parquet, or .json of `export`.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate after each prompt.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.")] = None,
    keep_text: Annotated[bool, typer.Option("--text/--no-text", help="Keep tokens and their text.")] = True,
    against: Annotated[Path | None, typer.Option(help="With `summary`: a later recording to compare with.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="With `export`: calls of the network to draw.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Record which experts each token goes to; sum a recording up or draw it.

    A recording is Parquet with a row for each token and layer: experts, weights, the router's entropy, and the call of
    the network that read the token. `shoal serve --trace-dir DIR` records what a server does. `summary` also reads the
    log.jsonl of a training run.

    [bold]Examples[/bold]
      shoal trace ./DeepSeek-V2-Lite-Chat --prompts questions.txt --out trace.parquet --max-tokens 64
      shoal trace summary trace.parquet
      shoal trace summary before.parquet --against after.parquet
      shoal trace export trace.parquet --out trace.json      # opens in ui.perfetto.dev
    """
    if what in (SUMMARY, EXPORT):
        if file is None:
            raise typer.BadParameter(f"{what} needs a recording")
        if what == SUMMARY:
            _summary(file, against, as_json=as_json)
        else:
            _export(file, out or file.with_suffix(".json"), steps)
        return
    if file is not None or against is not None:
        raise typer.BadParameter(f"only {SUMMARY} and {EXPORT} take recordings; {what!r} would be a model")
    if prompts is None or out is None:
        raise typer.BadParameter("recording a model needs --prompts and --out")
    _record(what, prompts, out, max_tokens=max_tokens, threads=threads, keep_text=keep_text, as_json=as_json)


class Traces:
    """What `shoal serve` records into a folder; nothing if there is none. Without `keep_text` the files do not
    tell what was asked."""

    def __init__(self, folder: Path | None, *, keep_text: bool = False) -> None:
        self._folder, self._keep_text = folder, keep_text
        self._recorder: Recorder | None = None

    def watch(self, llm: LLM) -> LLM:
        """Listen to a model from now on. ConfigError if it has no experts."""
        if self._folder is not None:
            from shoal.trace.recorder import Recorder

            text = llm.tokenizer.token_bytes if self._keep_text else None
            self._recorder = Recorder(self._folder, _shape(llm), text=text, folder=True, on_failure=_stopped)
            llm.trace = self._recorder.listen
        return llm

    def close(self) -> None:
        """Finish the last file. That recording failed has been said when it did."""
        if self._recorder is not None:
            with contextlib.suppress(ShoalError):
                self._recorder.close()


def _stopped(error: Exception) -> None:
    note(f"shoal: recording stopped: {error}", dim=False)


def _shape(llm: LLM) -> Shape:
    from shoal.trace.table import Shape

    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Shape.of(llm.config, model=llm.name, started=started)


def _record(
    model: str, prompts: Path, out: Path, *, max_tokens: int, threads: int | None, keep_text: bool, as_json: bool
) -> None:
    from shoal import settings
    from shoal.engine import LLM, SamplingParams
    from shoal.trace.recorder import Recorder

    asked = read_prompts(prompts)  # mistakes in the file are cheaper to find before the model is loaded
    llm = LLM(model, threads=threads or settings.threads())
    shape = _shape(llm)
    texts = [llm.encode_chat(prompt) if isinstance(prompt, list) else prompt for prompt in asked]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens or None)
    with Recorder(out, shape, text=llm.tokenizer.token_bytes if keep_text else None) as recorder:
        llm.trace = recorder.listen
        generations = [
            _prepared(llm, prompts, number, text, params, generate=max_tokens > 0)
            for number, text in enumerate(texts, 1)
        ]
        with Meter("prompts") as meter:
            for number, generation in enumerate(generations, 1):  # one by one: each reads as it would alone
                for _ in generation.chunks():
                    pass
                meter(number, len(texts))
    size = out.stat().st_size
    if as_json:
        write_json({"path": str(out), "prompts": len(texts), "tokens": recorder.tokens, "bytes": size})
    else:
        note(
            f"{out}: {len(texts)} prompts, {recorder.tokens} tokens, {len(shape.layers)} layers, {size:,} bytes",
            dim=False,
        )


def _prepared(
    llm: LLM, path: Path, number: int, text: str | list[int], params: SamplingParams, *, generate: bool
) -> Generation:
    try:
        return llm.prepare(text, params, generate=generate)
    except RequestError as error:
        raise FileError(path, str(error), item=f"prompt {number}") from error


def read_prompts(path: Path) -> list[str | list[dict[str, Any]]]:
    """Prompts of a text file, a line each, or of a .jsonl file. FileError names the line at fault."""
    try:
        # By newlines alone: JSON text may hold the other characters that end a line for `splitlines`.
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise FileError(path, error.strerror or "cannot be read") from error
    except UnicodeDecodeError as error:
        raise FileError(path, f"is not UTF-8 at byte {error.start}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise FileError(path, "holds no prompt")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_json_prompt(path, number, line) for number, line in numbered]


def _json_prompt(path: Path, number: int, line: str) -> str | list[dict[str, Any]]:
    import orjson

    where = f"line {number}"
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise FileError(path, f"is no JSON: {error}", item=where) from error
    if isinstance(entry, str) and entry:
        return entry
    if isinstance(entry, dict):
        for name in ("prompt", "text"):
            if isinstance(entry.get(name), str) and entry[name]:
                return str(entry[name])
        messages = entry.get("messages")
        if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
            return messages
    raise FileError(path, "must be a string or hold `prompt`, `text` or `messages`", item=where)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _export(file: Path, out: Path, steps: int) -> None:
    from shoal.trace.perfetto import export
    from shoal.trace.table import TraceFile

    count, cut = export(TraceFile(file), out, max_steps=steps)
    note(f"{out}: {count} calls{'; the rest is left out, see --steps' if cut else ''}", dim=False)


def _summary(file: Path, against: Path | None, *, as_json: bool) -> None:
    from shoal.trace.summary import drift

    before = _layers(file)
    changes: list[LayerDrift] = []
    if against is not None:
        after = _layers(against)
        try:
            changes = drift(before, after)
        except ValueError as error:
            raise FileError(against, f"cannot be compared with {file}: {error}") from error
    if as_json:
        write_json({"layers": list(map(dataclasses.asdict, before)), "drift": list(map(dataclasses.asdict, changes))})
        return
    print_table([_row(layer) for layer in before], list(_row(before[0])))
    if changes:
        print()
        print_table([_drift_row(change) for change in changes], list(_drift_row(changes[0])))


def _layers(file: Path) -> list[LayerSummary]:
    from shoal.trace.summary import summarise
    from shoal.trace.table import TraceFile
    from shoal.trace.training import summarise_log

    return summarise_log(file) if file.suffix == ".jsonl" else summarise(TraceFile(file))


def _row(layer: LayerSummary) -> dict[str, str]:
    busiest = sorted(range(len(layer.load)), key=lambda expert: -layer.load[expert])[:3]
    total = max(sum(layer.load), 1)
    return {
        "layer": str(layer.layer),
        "tokens": human_count(layer.tokens),
        "maxvio": f"{layer.max_vio:.3f}",
        "load entropy": f"{layer.load_entropy:.4f}",
        "router entropy": "-" if layer.router_entropy is None else f"{layer.router_entropy:.4f}",
        "dead": f"{len(layer.dead)}/{len(layer.load)}",
        "busiest": " ".join(f"{expert}:{layer.load[expert] / total:.1%}" for expert in busiest),
        "together": " ".join(f"{p.experts[0]}+{p.experts[1]}:×{p.lift:.1f}" for p in layer.together[:3]) or "-",
    }


def _drift_row(change: LayerDrift) -> dict[str, str]:
    return {
        "layer": str(change.layer),
        "js bits": f"{change.divergence:.5f}",
        "by chance": f"{change.chance:.5f}",
        "changed most": " ".join(f"{expert}:{before:.1%}→{after:.1%}" for expert, before, after in change.most),
    }
