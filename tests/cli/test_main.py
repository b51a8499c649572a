"""The frame of every verb: help, version, exit codes, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from tests.cli.conftest import Result

from shoal.cli import main as cli
from shoal.errors import FileError

Shoal = Callable[..., Result]
HEAVY = ("numpy", "torch", "tokenizers", "starlette", "pydantic", "orjson", "jinja2", "shoal.engine")


@pytest.mark.parametrize("args", [["--help"], ["--version"], []])
def test_the_first_look_imports_nothing_heavy_and_no_verb(args: list[str]) -> None:
    code = (
        "import sys\n"
        "from shoal.cli.main import main\n"
        f"try: main({args!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "verbs = [m for m in sys.modules if m.startswith('shoal.cli.') and m != 'shoal.cli.main']\n"
        f"heavy = [m for m in sys.modules if m.startswith({HEAVY!r})]\n"
        "assert not verbs + heavy, verbs + heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "shoal" in done.stdout


def test_version(shoal: Shoal) -> None:
    import shoal as package

    assert (result := shoal("--version")).code == 0
    assert result.out == f"shoal {package.__version__}\n"


def test_help_lists_every_verb_with_its_summary(shoal: Shoal) -> None:
    text = " ".join(shoal("--help").out.replace("│", " ").split())
    for verb, summary in cli.VERBS.items():
        assert f"{verb} {summary}" in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_opens_with_its_summary_and_shows_examples(shoal: Shoal, verb: str) -> None:
    module = import_module(f"shoal.cli.{verb}")
    group = getattr(module, "app", None)
    summary = module.run.__doc__.splitlines()[0] if group is None else group.info.help
    assert summary == cli.VERBS[verb]
    result = shoal(verb, "-h")
    assert result.code == 0
    if group is not None:  # its verbs have the examples
        first = group.registered_commands[0]
        verb = f"{verb} {first.name or first.callback.__name__}"
        result = shoal(*verb.split(), "-h")
    assert "Examples" in result.out
    assert f"shoal {verb}" in result.out.split("Examples")[1]
    assert "[bold]" not in result.out
    assert "\\[" not in result.out


def test_every_file_of_the_command_line_is_a_verb_or_shared() -> None:
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    seconds = {stem for stem in files if "_" in stem and stem.partition("_")[0] in cli.VERBS}  # a verb's second file
    assert files - seconds == set(cli.VERBS) | {"__init__", "main", "console", "machine"}


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["chta"], "Did you mean 'chat'"),
        (["chat", "--temprature", "1"], "--temprature"),
        (["serve", "--port", "99999"], "65535"),
        (["serve", "--port", "x"], "--port"),
        (["info", "a", "b"], "b"),
        (["pull"], "name"),
        (["info", "smolm2-135m"], "did you mean smollm2-135m?"),
        (["info", "./nowhere"], "nowhere"),
        (["serve", "--model", "no/such"], "shoal pull no/such"),
        (["pull", "../x"], "no such model"),
        (["chat", "--temperature", "-1", "Hi"], "temperature"),
        (["chat", "--top-p", "nan", "Hi"], "top_p"),
        (["chat", ""], "prompt: is empty"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_2(shoal: Shoal, args: list[str], part: str) -> None:
    result = shoal(*args)
    assert part in result.error
    assert result.code == 2


def raising(error: BaseException) -> Callable[..., None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FileError("a.gguf", "is damaged", item="blk.0"), 2, "a.gguf: blk.0: is damaged"),
        (FileError("a\x1b[31m\nb.gguf", "is damaged"), 2, "a [31m b.gguf: is damaged"),
        (PermissionError(13, "Permission denied", "b.gguf"), 1, "b.gguf: Permission denied"),
        (KeyError("x"), 1, "internal error: KeyError: 'x' (shoal --debug … shows the trace)"),
    ],
)
def test_failures_inside_a_verb(
    shoal: Shoal, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr("shoal.cli.models.run", raising(error))
    result = shoal("models")
    assert (result.code, result.error) == (code, line)


def test_ctrl_c_is_130_and_silent(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cli.models.run", raising(KeyboardInterrupt()))
    result = shoal("models")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_debug_shows_the_trace(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cli.models.run", raising(FileError("a.gguf", "is damaged")))
    by_flag = shoal("--debug", "models")
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    by_setting = shoal("models")
    for result in (by_flag, by_setting):
        assert "Traceback" in result.err
        assert result.err.endswith("shoal: error: a.gguf: is damaged\n")
        assert result.code == 2


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [sys.executable, "-m", "shoal", "info", "smollm2-135m", "--json"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""


def test_no_color_is_honoured() -> None:
    """On a terminal the help is coloured; with NO_COLOR it is not."""
    import pty

    def shown(**env: str) -> bytes:
        main, side = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "--help"], stdout=side, env={**os.environ, "TERM": "xterm", **env}
        )
        os.close(side)
        out = b""
        try:
            while piece := os.read(main, 4096):
                out += piece
        except OSError:  # the other side is closed
            pass
        os.close(main)
        assert process.wait() == 0
        return out

    colour = b"36m"  # cyan
    assert colour in shown()
    assert colour not in shown(NO_COLOR="1")
