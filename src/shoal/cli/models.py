"""`shoal models`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from shoal.cli.console import human_bytes, note, print_table, write_json


def run(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the models at hand.

    [bold]Examples[/bold]
      shoal models
      shoal models --json | jq -r ".\\[].path"
    """
    from shoal import hub

    entries = hub.list_models()
    if as_json:
        write_json([{**dataclasses.asdict(entry), "path": str(entry.path)} for entry in entries])
        return
    if len(entries) <= len(hub.BUNDLED):
        note("beside Shoal's own no models here yet; fetch a small one to chat with: shoal pull smollm2-135m")
    rows = [
        {
            "name": entry.name,
            "size": human_bytes(entry.bytes),
            "format": entry.format,
            "licence": entry.licence or "not stated",
            "path": str(entry.path),
        }
        for entry in entries
    ]
    print_table(rows, ("name", "size", "format", "licence", "path"))
