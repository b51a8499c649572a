"""`key=value` on the command line: change one setting of a recipe by its dotted name, in the type it has."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import is_dataclass, replace
from typing import Any, Union

from shoal.errors import ConfigError
from shoal.train.recipe import Recipe, flatten

AnyRecipe = typing.TypeVar("AnyRecipe", bound=Recipe)


def override(recipe: AnyRecipe, assignments: Iterable[str]) -> AnyRecipe:
    """`recipe` with every `key=value` applied. All are applied before the whole is checked.

    Values are JSON where the setting is a list, else plain text: `optimiser.lr=3e-4`, `compile=true`,
    `data.folder=none`, `samples.prompts=["def ", "import "]`.

    Raises:
        ConfigError: no such key (with a did-you-mean), a key given twice, a value of the wrong type or size.
    """
    values: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(text, "is no assignment; write key=value")
        if key in values:
            raise ConfigError(key, "is given twice")
        values[key] = value
    known = flatten(recipe)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(key, f"is no setting of this recipe{hint}")
    return typing.cast(AnyRecipe, _apply(recipe, values, ""))


def _apply(part: Any, values: dict[str, str], prefix: str) -> Any:
    hints = typing.get_type_hints(type(part))
    changes: dict[str, Any] = {}
    for name, hint in hints.items():
        inner, key = getattr(part, name, None), prefix + name
        if is_dataclass(inner):
            if any(other.startswith(f"{key}.") for other in values):
                changes[name] = _apply(inner, values, f"{key}.")
        elif key in values:
            changes[name] = parse(key, values[key], hint)
    return replace(part, **changes) if changes else part


def parse(key: str, text: str, hint: Any) -> Any:
    """`text` as a value of the type `hint`.

    Raises:
        ConfigError: it is none.
    """
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = typing.get_args(hint)
        if text.lower() in ("none", "null"):
            if type(None) in kinds:
                return None
            raise ConfigError(key, "cannot be none")
        return parse(key, text, next(kind for kind in kinds if kind is not type(None)))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(key, f"must be true or false, got {text!r}")
        return text.lower() == "true"
    if hint is str:
        return text
    if typing.get_origin(hint) is tuple:
        return _parse_list(key, text, typing.get_args(hint)[0])
    try:
        return hint(text.replace("_", "")) if hint in (int, float) else _unsettable(key)
    except ValueError:
        what = "whole number" if hint is int else "number"
        raise ConfigError(key, f"must be a {what}, got {text!r}") from None


def _parse_list(key: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ConfigError(key, f"must be a JSON list such as {['a', 'b'] if kind is str else [1, 2]}, got {text!r}")
    return tuple(values)


def _unsettable(key: str) -> Any:
    raise ConfigError(key, "cannot be set on the command line")
