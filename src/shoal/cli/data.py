"""`shoal data`: from raw text and source trees to packed tokens, with a page that says what became of everything."""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import data_select
from shoal.cli.console import Meter, human_count, note, print_pairs, write_json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.data.prepare import Result
    from shoal.data.recipe import Recipe

UNREADABLE = 3  # exit code: done, but some of the input could not be read
app = typer.Typer(
    help="Turn text and code into training data: clean, dedupe, choose, pack, report.",
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Sources = Annotated[
    list[Path] | None,
    typer.Argument(metavar="SRC…", help="Files (.jsonl, .parquet, .txt, code; .gz, .zst) or folders."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result; a run that was cut off goes on in it.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a processor.")]
Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Cap for all processes together, such as 2G.")]
Engine = Annotated[str, typer.Option(help="processes, or ray (pip install 'shoal\\[scale]').")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster: auto, or HOST:PORT.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def prepare(
    out: Out,
    sources: Sources = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML or JSON file with these settings; flags win.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Pack with the tokenizer of this model or folder.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=258, help="Train a tokenizer of so many tokens.")] = None,
    rules: Annotated[str | None, typer.Option(help="auto, gopher, c4, fineweb, code, none; several by commas.")] = None,
    languages: Annotated[str | None, typer.Option(help="Keep only these: en,de for text, python,c for code.")] = None,
    licences: Annotated[str | None, typer.Option(help="any, or permissive.")] = None,
    decontaminate: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Drop what holds pieces of this evaluation set; repeat.")
    ] = None,
    near: Annotated[float | None, typer.Option(help="Similarity from which two texts are one; 0: exact only.")] = None,
    band: Annotated[str | None, typer.Option(help="Keep quantiles of compressibility: 0.05,0.95.")] = None,
    entropy: Annotated[str | None, typer.Option(metavar="MODEL", help="Judge the band by this model, too.")] = None,
    mask: Annotated[bool | None, typer.Option("--mask/--no-mask", help="Mask personal data and keys.")] = None,
    keep_rejects: Annotated[bool | None, typer.Option("--keep-rejects", help="Write down what is dropped.")] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="Stop at the first unreadable row.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Column of rows that holds the text.")] = None,
    max_document: Annotated[str | None, typer.Option(metavar="SIZE", help="Pass over longer documents.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of samples and hashes.")] = None,
    workers: Workers = None,
    memory: Memory = None,
    engine: Engine = "processes",
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and the plan, do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Read, clean, dedupe, choose, tokenize and pack, then write a page about it.

    The result does not depend on workers, memory or engine: the same recipe gives the same bytes. Exit code 3 means
    done, but something could not be read; `rejects/` names file and line.

    [bold]Examples[/bold]
      shoal data prepare corpus.jsonl.zst --out clean --tokenizer smollm2-135m
      shoal data prepare ~/src/project --out code --licences permissive --vocab-size 16000
      shoal data prepare books docs --out mix --band 0.05,0.95 --entropy smollm2-135m --decontaminate HumanEval.jsonl.gz
    """
    flags = {
        "rules": _words(rules), "languages": _words(languages), "licences": licences, "near_duplicates": near,
        "evaluations": tuple(path.absolute() for path in decontaminate) if decontaminate else None,
        "band": _numbers("band", band or ("0.05,0.95" if entropy and recipe is None else None)),
        "entropy_model": entropy, "mask_pii": mask, "keep_rejects": keep_rejects, "strict": strict, "seed": seed,
        "text_field": text_field, "max_document": parse_size("max_document", max_document), "tokenizer": tokenizer,
        "vocab_size": vocab_size,
    }  # fmt: skip
    chosen = _recipe(sources, recipe, flags)
    if dry_run:
        write_json(_plan(chosen))
        return
    result = _prepare(chosen, out, workers, memory, engine, address)
    _finish(result, as_json)


@app.command()
def dedupe(
    sources: Sources,
    out: Out,
    near: Annotated[float, typer.Option(help="Similarity from which two texts are one; 0: exact copies only.")] = 0.7,
    text_field: Annotated[str, typer.Option(help="Column of rows that holds the text.")] = "text",
    workers: Workers = None,
    memory: Memory = None,
    engine: Engine = "processes",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Find exact and near duplicates, and nothing else: no languages, no rules, no masking, nothing packed.

    `attributes/duplicates` says for each document which one it repeats.
    """
    flags = {
        "rules": ("none",), "mask_pii": False, "identify_language": False, "near_duplicates": near,
        "text_field": text_field,
    }  # fmt: skip
    _finish(_prepare(_recipe(sources, None, flags), out, workers, memory, engine, address), as_json)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="What `shoal data prepare` wrote.")],
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than before.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=258, help="Train a tokenizer of so many tokens.")] = None,
    workers: Workers = None,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Tokenize and pack a prepared folder again, as its attributes now say: after a selection, or with another
    tokenizer."""
    from shoal.data.prepare import pack_folder
    from shoal.data.run import Machine

    machine = Machine(workers=workers, memory=parse_size("memory", memory))
    with Stages() as stages:
        result = pack_folder(folder, machine, tokenizer=tokenizer, vocab_size=vocab_size, notice=stages)
    _finish(result, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `shoal data prepare` wrote.")], as_json: Json = False
) -> None:
    """Write the page about a prepared folder once more, or print its numbers with --json."""
    import json

    from shoal.data.report import write_report

    path = write_report(folder)
    if as_json:
        write_json(json.loads((folder / "summary.json").read_bytes()))
    else:
        print(path)


@app.command()
def tokenizer(
    folder: Annotated[Path, typer.Argument(help="What `shoal data prepare` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tokenizer; it must be free.")],
    vocab_size: Annotated[int, typer.Option(min=258, help="Tokens in all.")] = 32000,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample that is learned from.")] = 0,
) -> None:
    """Train a byte-level BPE tokenizer on what a prepared folder keeps."""
    from shoal.data.prepare import train_on_folder
    from shoal.formats.atomic import require_empty

    require_empty(out)
    train_on_folder(folder, out, vocab_size=vocab_size, seed=seed)
    print(out)


app.command()(data_select.select)
app.command()(data_select.prove)


class Stages(contextlib.ExitStack):
    """Progress of a run's stages on stderr, one meter after another."""

    _name = ""

    def __call__(self, name: str, done: int, total: int) -> None:
        if name != self._name:
            self.close()
            self._name, self._meter = name, self.enter_context(Meter(name))
        self._meter(done, total)


def parse_size(name: str, text: str | None) -> int | None:
    """`2G`, `512M`, `1.5 GiB` or plain bytes; letters are powers of 1024."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ConfigError(name, f"must be a size such as 512M or 2G, got {text!r}")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(name, f"must be numbers with commas between, got {text!r}") from error


def _recipe(sources: list[Path] | None, path: Path | None, flags: dict[str, Any]) -> Recipe:
    from shoal.data.plan import Source
    from shoal.data.recipe import Recipe, load_recipe

    given = {name: value for name, value in flags.items() if value is not None}
    if sources:
        given["sources"] = tuple(Source(path=source.absolute()) for source in sources)
    if path is not None:
        return replace(load_recipe(path.absolute()), **given)
    if "sources" not in given:
        raise ConfigError("SRC", "name at least one file or folder, or give a --recipe")
    return Recipe(**given)


def _plan(recipe: Recipe) -> dict[str, Any]:
    from shoal.data.plan import plan_shards

    shards, passed = plan_shards(recipe.sources, shard_bytes=recipe.shard_bytes)
    files = {part.path for shard in shards for part in shard}
    total = sum(path.stat().st_size for path in files)
    return {
        "recipe": recipe.to_dict(), "shards": len(shards), "files": len(files), "bytes": total, "passed_over": passed
    }  # fmt: skip


def _prepare(
    recipe: Recipe, out: Path, workers: int | None, memory: str | None, engine: str, address: str | None
) -> Result:
    from shoal.data.prepare import prepare as run_prepare
    from shoal.data.run import Machine

    machine = Machine(workers=workers, memory=parse_size("memory", memory), engine=engine, address=address)
    with Stages() as stages:
        return run_prepare(recipe, out, machine, notice=stages)


def _finish(result: Result, as_json: bool) -> None:
    if as_json:
        write_json({**asdict(result), "folder": str(result.folder)})
    else:
        print_pairs(
            {
                "read": f"{human_count(result.read)} documents",
                "kept": f"{human_count(result.kept)} documents",
                "packed": f"{human_count(result.tokens)} tokens" if result.tokens else "nothing (no tokenizer)",
                "report": str(result.folder / "report.html"),
            }
        )
    if result.unreadable:
        note(f"{result.unreadable} rows or files could not be read; {result.folder / 'rejects'} names them", dim=False)
        raise typer.Exit(UNREADABLE)
