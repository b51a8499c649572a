"""Errors that a user can cause. Each names the thing at fault; the command line prints one line and exits with 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class ShoalError(Exception):
    """Base of every error that is the input's fault rather than ours; the command line ends with `exit_code`."""

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their message alone, with which our constructors could not be called again.
        return _revived, (type(self), self.args, self.__dict__)


def _revived(kind: type[ShoalError], args: tuple[Any, ...], state: dict[str, Any]) -> ShoalError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ConfigError(ShoalError, ValueError):
    """A model or run configuration is impossible; the message names the field and its value."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        super().__init__(f"{field}: {problem}")


class FileError(ShoalError):
    """A file on disk is missing, damaged or unsupported.

    Args:
        path: the file at fault.
        problem: what is wrong, in one clause.
        item: the tensor, key or field at fault, if one can be named.
    """

    def __init__(self, path: str | Path, problem: str, *, item: str | None = None) -> None:
        self.path = Path(path)
        self.item = item
        self.problem = problem
        where = f"{path}: {item}" if item else f"{path}"
        super().__init__(f"{where}: {problem}")


class RequestError(ShoalError, ValueError):
    """A generation request is impossible; `param` names the field at fault, as the OpenAI API does."""

    def __init__(self, param: str | None, problem: str, *, code: str = "invalid_value") -> None:
        self.param = param
        self.code = code
        super().__init__(f"{param}: {problem}" if param else problem)


class UnknownModelError(ShoalError):
    """The name is neither a folder, a GGUF file nor a known short name."""


class RunError(ShoalError):
    """A long run cannot go on, through no fault of what was asked: a full disk, a loss that is no number."""

    exit_code = 1


class MissingExtraError(ShoalError):
    """An optional part is not installed; the message says which `pip install shoal[extra]` brings it."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs an optional part of Shoal: pip install 'shoal[{extra}]'")
