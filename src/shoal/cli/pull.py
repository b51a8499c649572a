"""`shoal pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.console import Meter, human_bytes, write_json


def run(
    name: Annotated[str, typer.Argument(help="A short name, ORG/NAME, or ORG/NAME:FILE.gguf.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fetch a model by its short name.

    Prints where the model is. The only verb that uses the network; a model that is here already is not fetched again.

    [bold]Examples[/bold]
      shoal pull smollm2-135m
      shoal pull deepseek-ai/DeepSeek-V2-Lite-Chat
    """
    from shoal import hub

    with Meter(f"fetching {name}", human_bytes) as meter:
        path = hub.pull(name, meter)
    if as_json:
        write_json({"name": name, "path": str(path)})
    else:
        print(path)
