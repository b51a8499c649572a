"""`shoal`: finds the verb, imports only its module, and turns every failure into one line and an exit code.

Exit codes: 0 done, 1 a failure while running, 2 a fault in the input or the command, 130 Ctrl-C, 143 a request to stop.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from shoal import __version__, settings
from shoal.errors import ConfigError, ShoalError

# A verb is the function `run` of the module `shoal.cli.<verb>`, or its `app` if it has verbs of its own; the summary
# opens that function's docstring.
VERBS = {
    "chat": "Talk to a model, one question or a conversation.",
    "serve": "Serve a model over HTTP with the OpenAI API.",
    "convert": "Convert a model between a Hugging Face folder and GGUF.",
    "bench": "Measure a model: speed of prompt and decoding, time to the first token, memory.",
    "train": "Train a model from text, by a recipe.",
    "tune": "Tune a model on examples: adapters under a budget, or all weights.",
    "distil": "Teach a student model what a teacher model knows.",
    "quantize": "Shrink a model to 8 or 4 bits a weight.",
    "reshape": "Give a dense model DeepSeek-V3's attention, and experts if asked.",
    "eval": "Score a model on tasks, with 95% intervals.",
    "data": "Turn text and code into training data: clean, dedupe, choose, pack, report.",
    "trace": "Record which experts each token goes to; sum a recording up or draw it.",
    "cost": "Count what training takes, before it starts: operations, memory, time and dollars.",
    "info": "Show this machine, or what a model is and costs.",
    "models": "List the models at hand.",
    "pull": "Fetch a model by its short name.",
}
CONTEXT = {"help_option_names": ["-h", "--help"]}


class _Verb(TyperCommand):
    """Stands in for a verb until it is run, so that `shoal --help` imports none of them."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        module = importlib.import_module(f"shoal.cli.{self.name}")
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings=CONTEXT)
            app.command(name=self.name)(module.run)
        return get_command(app).make_context(info_name, args, parent=parent, **extra)


class _Shoal(TyperGroup):
    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, summary in VERBS.items():
            self.add_command(_Verb(name, help=summary, callback=None))


app = typer.Typer(cls=_Shoal, rich_markup_mode="rich", context_settings=CONTEXT)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def shoal(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full trace of an error.")] = False,
) -> None:
    """Train, reshape, shrink and serve DeepSeek-style language models on the hardware at hand."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    args = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        code = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # 128 + SIGPIPE, as a C program would end
    sys.exit(code)


def _run(args: list[str]) -> int:
    try:
        code = get_command(app).main(args, prog_name="shoal", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except typer.Abort:
        return 1
    except Exception as error:
        debug = _debugging(args)
        if debug:
            traceback.print_exc()
        if isinstance(error, ShoalError):
            return _fail(str(error), error.exit_code)
        if hasattr(error, "format_message"):  # what Typer and Click raise for a wrong command line
            # Without a message it is a group without a verb, whose help has been printed.
            return _fail(_usage(error), 2) if error.format_message() else 2
        if isinstance(error, OSError):
            return _fail(_os_problem(error), 1)
        hint = "" if debug else " (shoal --debug … shows the trace)"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", 1)


def _debugging(args: list[str]) -> bool:
    try:
        return args[:1] == ["--debug"] or settings.debug()
    except ConfigError:  # a bad SHOAL_DEBUG must not hide the error at hand
        return True


def _fail(message: str, code: int) -> int:
    """One line, whatever the message holds: terminals obey control characters that a file name may carry."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(message.split()))
    print(f"shoal: error: {line}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "shoal"
    return f"{error.format_message().rstrip('.')} (see {where} --help)"


def _os_problem(error: OSError) -> str:
    problem = error.strerror or str(error)
    return f"{error.filename}: {problem}" if error.filename else problem
