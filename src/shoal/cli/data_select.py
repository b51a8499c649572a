"""`shoal data select` and `shoal data prove`: the documents that serve a target, and what choosing them bought."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.console import human_count, needs_torch, note, print_pairs, print_table, write_json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.cli.data import Stages
    from shoal.data.select.run import Ground
    from shoal.data.select.task import Proxies

Folder = Annotated[Path, typer.Argument(help="What `shoal data prepare` wrote, with a tokenizer.")]
TextField = Annotated[str, typer.Option(help="Column of rows that holds the text.")]
ProxyTokens = Annotated[int | None, typer.Option(min=1, help="What a proxy reads; by default the budget.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Target = Annotated[list[Path], typer.Option(metavar="FILE", help="A sample of the domain that is wanted; repeat.")]
HeldOut = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="What will judge: nothing of it may be in the sample; repeat.")
]
DropOverlap = Annotated[bool, typer.Option(help="Leave out of the sample what the held-out set holds, too.")]
Share = Annotated[str, typer.Option(help="Of the pool's tokens, such as 10% or 0.1.")]
Rounds = Annotated[int, typer.Option(min=1, help="Of the adversarial method.")]


def select(
    folder: Folder,
    target: Target,
    held_out: HeldOut = None,
    share: Share = "10%",
    method: Annotated[
        str, typer.Option(help="adversarial, random, heuristics, dsir, perplexity, classifier or preselect.")
    ] = "adversarial",
    rounds: Rounds = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    proxy_tokens: ProxyTokens = None,
    drop_overlap: DropOverlap = False,
    text_field: TextField = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that number the documents.")] = None,
    as_json: Json = False,
) -> None:
    """Keep the documents that serve a target domain best: a share of the tokens and no more.

    Writes the verdict `select` beside the documents, which `shoal data pack` obeys, `selection.json` and
    `selection.html`. Half of the sample teaches the method, the other half judges its proxies. adversarial, preselect
    and perplexity train small models (pip install 'shoal\\[train]'); the same command goes on after an interruption.

    [bold]Example[/bold]
      shoal data select clean --target wanted.jsonl --share 10%
      shoal data pack clean
    """
    from shoal.cli.data import Stages
    from shoal.data.select.report import write_page
    from shoal.data.select.run import METHODS, choose, write_choice

    if method not in METHODS:
        raise ConfigError("method", f"must be one of {', '.join(METHODS)}, got {method!r}")
    with Stages() as stages:
        ground = _ground(folder, target, held_out, seed, drop_overlap, text_field, workers, stages)
        part = _share(share)
        proxies = _makers(ground, proxy_tokens or int(part * ground.pool.tokens)) if method in ASKING else None
        choice = choose(ground, method, part, seed=seed, rounds=rounds, proxies=proxies, notice=stages)
    settings = {"target": [str(one) for one in target], "held_out": [str(one) for one in held_out or []], "seed": seed}
    data = write_choice(ground, choice, settings | {"rounds": rounds})
    page = write_page(ground, choice, data)
    if as_json:
        write_json(data)
        return
    pool = data["pool"]
    print_pairs(
        {
            "pool": f"{human_count(pool['tokens'])} tokens in {human_count(pool['documents'])} documents",
            "kept": f"{human_count(data['tokens'])} tokens in {human_count(data['documents'])} documents",
            "report": str(page),
            "next": f"shoal data pack {folder}",
        }
    )


def prove(
    folder: Folder,
    target: Target,
    held_out: Annotated[list[Path], typer.Option(metavar="FILE", help="What judges; no method sees it; repeat.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the proof; one that was cut off goes on.")],
    share: Share = "10%",
    methods: Annotated[str | None, typer.Option(help="Arms beside the whole; by default all, with commas.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Models of each kind; intervals need three.")] = 3,
    tokens: Annotated[int | None, typer.Option(min=1, help="At equal tokens; by default the pool's.")] = None,
    epochs: Annotated[float, typer.Option(help="At equal epochs.")] = 1.0,
    proxy_tokens: ProxyTokens = None,
    rounds: Rounds = 3,
    layers: Annotated[int, typer.Option(min=1, help="Of the small models.")] = 2,
    width: Annotated[int, typer.Option(min=32, help="Of the small models.")] = 128,
    context: Annotated[int, typer.Option(min=16, help="Tokens of a row.")] = 128,
    cases: Annotated[int, typer.Option(min=0, help="Lines of code to complete; 0: none.")] = 200,
    drop_overlap: DropOverlap = False,
    text_field: TextField = "text",
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the cells with predicted minutes, train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train equal small models on the whole pool, a random share and each method's share, and compare.

    At equal tokens every model reads as much, shares again and again; at equal epochs every model goes over its own
    text as often. Writes OUT/proof.json and OUT/proof.html after every model; each finished one is a file in OUT/cells.

    [bold]Example[/bold]
      shoal data prove clean --target wanted.jsonl --held-out test.jsonl --out proof --plan
    """
    from shoal.cli.data import Stages

    with needs_torch("training small models"):
        from shoal.prove import run as proof
        from shoal.prove.cells import Plan
        from shoal.prove.proxy import Size

    arms = {} if methods is None else {"methods": tuple(word.strip() for word in methods.split(",") if word.strip())}
    wanted = Plan(
        share=_share(share), seeds=seeds, tokens=tokens, epochs=epochs, proxy_tokens=proxy_tokens, rounds=rounds,
        cases=cases, size=Size(layers=layers, width=width, context=context), **arms,
    )  # fmt: skip
    with Stages() as stages:
        ground = _ground(folder, target, held_out, 0, drop_overlap, text_field, None, stages)
        if plan:
            _print_plan(proof.outline(ground, wanted), as_json)
            return
        command = "shoal " + shlex.join(sys.argv[1:])
        data = proof.prove(ground, wanted, out, command, stages)
    if as_json:
        write_json(data["arms"])
        return
    for said in data["statements"]:
        print(said)
    note(str(out / "proof.html"))


ASKING = ("adversarial", "preselect", "perplexity")  # methods that train small models


def _makers(ground: Ground, tokens: int) -> Proxies:
    with needs_torch("training small models"):
        from shoal.prove.proxy import Makers, Size
    return Makers(Size(), tokens, ground)


def _share(text: str) -> float:
    from shoal.data.select.budget import parse_share

    return parse_share(text)


def _ground(
    folder: Path, target: list[Path], held_out: list[Path] | None, seed: int,
    drop_overlap: bool, text_field: str, workers: int | None, stages: Stages,
) -> Ground:  # fmt: skip
    from shoal.data.run import Machine
    from shoal.data.select.run import open_ground

    return open_ground(
        folder, target, held_out or [], seed=seed, drop_overlap=drop_overlap, text_field=text_field,
        machine=Machine(workers=workers or 1), notice=stages,
    )  # fmt: skip


def _print_plan(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        write_json(found)
        return
    columns = ("seed", "arm", "regime", "tokens", "minutes")
    rows = [
        {**{name: str(one[name]) for name in columns}, "tokens": human_count(one["tokens"]),
         "minutes": f"{one['minutes']:.2f}"}
        for one in found["cells"]
    ]  # fmt: skip
    print_table(rows, columns)
    total = found["cell_minutes"] + found["selection_minutes"]
    print(
        f"{len(rows)} cells {found['cell_minutes']:.1f} minutes, selecting {found['selection_minutes']:.1f}, "
        f"together {total:.1f} at {human_count(found['tokens_a_second'])} tokens a second"
    )
