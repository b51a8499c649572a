"""`shoal convert`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.console import Meter, human_bytes, note, write_json
from shoal.errors import FileError


def run(
    src: Annotated[str, typer.Argument(help="Short name, Hugging Face folder or GGUF file.")],
    dst: Annotated[Path, typer.Argument(help="What to write: FILE.gguf, or a folder in the Hugging Face layout.")],
    dtype: Annotated[
        str, typer.Option(help="keep, float32, float16 or bfloat16; for GGUF also block types such as q8_0.")
    ] = "keep",
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A LoRA (PEFT folder) to merge.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace what is at DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a model between a Hugging Face folder and GGUF.

    Weights stream through: about one tensor is in memory at a time. Nothing half-written is left behind.

    [bold]Examples[/bold]
      shoal convert smollm2-135m ./smollm2 --dtype bfloat16
      shoal convert ./DeepSeek-V2-Lite ./deepseek-v2-lite.gguf --dtype q8_0
    """
    from shoal import hub
    from shoal.formats.convert import convert

    path = hub.resolve(src)
    taken = dst.is_symlink() or dst.exists()
    if taken and not force:
        raise FileError(dst, "already exists; --force replaces it")
    if taken and _inside(path, dst):
        raise FileError(dst, f"holds the source {path}; choose another place")
    started = time.perf_counter()
    with Meter(f"writing {dst}", human_bytes) as meter:
        if taken:
            _replace(dst, lambda target: convert(path, target, dtype=dtype, progress=meter, adapter=adapter))
        else:
            convert(path, dst, dtype=dtype, progress=meter, adapter=adapter)
    seconds = time.perf_counter() - started
    size = dst.stat().st_size if dst.is_file() else sum(f.stat().st_size for f in dst.iterdir() if f.is_file())
    note(f"{dst}: {human_bytes(size)} in {seconds:.1f} s")
    if as_json:
        write_json({"source": str(path), "path": str(dst), "dtype": dtype, "bytes": size, "seconds": seconds})


def _inside(source: Path, target: Path) -> bool:
    source, target = source.resolve(), target.resolve()
    return target == source or target in source.parents


def _replace(dst: Path, write: Callable[[Path], None]) -> None:
    """Write beside `dst` and swap at the end, so that a failed conversion leaves what was there."""
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", suffix=".partial", dir=dst.absolute().parent) as folder:
        fresh, old = Path(folder) / f"new{dst.suffix}", Path(folder) / "old"
        write(fresh)
        dst.rename(old)
        fresh.rename(dst)
