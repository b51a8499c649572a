"""What the verbs share: data goes to stdout, everything said about it to stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shoal.errors import MissingExtraError

DEFAULT_MODEL = "smollm2-135m"


def note(text: str, *, dim: bool = True) -> None:
    """A line on stderr; dimmed where that is a terminal with colours."""
    aside(text + "\n", dim=dim)


def aside(text: str, *, dim: bool = True) -> None:
    """A piece of text on stderr, unbroken and uninterpreted."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(Text(text, style="dim" if dim else ""), end="")


def write_json(data: Any) -> None:
    """One JSON value and a line end on stdout."""
    import orjson

    sys.stdout.write(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode() + "\n")


def print_table(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    """Rows under a heading, in columns as wide as they need to be: readable for people and for `awk`."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    for row in ({name: name.upper() for name in columns}, *rows):
        print("  ".join(row[name].ljust(widths[name]) for name in columns).rstrip())


def print_pairs(pairs: Mapping[str, str]) -> None:
    """`name  value` lines, aligned."""
    width = max(len(name) for name in pairs)
    for name, value in pairs.items():
        print(f"{name.ljust(width)}  {value}")


def human_bytes(count: float) -> str:
    """1536 → `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_count(count: float) -> str:
    """671026419200 → `671.03 B`."""
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= limit:
            return f"{count / limit:.2f}{unit}"
    return f"{count:.0f}"


class Meter:
    """Progress on stderr: a bar on a terminal, elsewhere a plain line at each tenth of the way.

    Used as a context, and called with the amount done and the amount in all (0: not known).
    """

    def __init__(self, title: str, show: Callable[[float], str] = human_count) -> None:
        self._title = title
        self._show = show
        self._tenths = 0
        self._bar: Any = None

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total or None)
        elif total and 10 * done // total > self._tenths:
            self._tenths = 10 * done // total
            note(f"{self._title}: {self._show(done)} of {self._show(total)}")


@contextlib.contextmanager
def needs_torch(what: str) -> Iterator[None]:
    """Around imports that fail without PyTorch: MissingExtraError then says what `what` needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("train", what) from error
