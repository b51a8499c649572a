"""Recipes by name or path: `smoke`, `./my/recipe.py`, or a folder that holds a `recipe.py`."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shoal.errors import FileError, ShoalError, UnknownModelError
from shoal.train.recipe import Recipe

FILE = "recipe.py"
Prepare = Callable[[Path, Recipe], None]


class Found(NamedTuple):
    """A recipe as it stands in its file.

    Attributes:
        name: what the run is called: the folder's name.
        path: the Python file.
        recipe: what its function returned.
        prepare: makes the run's data, if the recipe brings its own.
    """

    name: str
    path: Path
    recipe: Recipe
    prepare: Prepare | None


def find_recipe(name: str) -> Found:
    """Load a recipe. Its file is Python and runs as such: take recipes from people you trust.

    Raises:
        UnknownModelError: there is none of this name (with a did-you-mean).
        FileError: the file cannot be run, or has no function `recipe` that returns a Recipe.
        ConfigError: the recipe is impossible.
    """
    path = _locate(name)
    spec = importlib.util.spec_from_file_location(f"shoal_recipe_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "recipe", None)
        recipe = make() if callable(make) else None
    except ShoalError:
        raise
    except (SyntaxError, ImportError, OSError) as error:
        raise FileError(path, f"cannot be run: {error}") from error
    except Exception as error:  # whatever else is wrong with somebody's Python
        raise FileError(path, f"cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(recipe, Recipe):
        raise FileError(path, "must define recipe() and return a shoal.train.recipe.Recipe")
    prepare = getattr(module, "prepare", None)
    return Found(path.parent.name if path.name == FILE else path.stem, path, recipe, prepare)


def recipe_folders() -> list[Path]:
    """Where names are looked up: `recipes/` here, beside a source checkout, and inside an installed package."""
    package = Path(__file__).parents[1]
    return [Path("recipes"), package.parents[1] / "recipes", package / "recipes"]


def recipe_names() -> list[str]:
    """The names that `find_recipe` knows."""
    return sorted({path.parent.name for folder in recipe_folders() for path in folder.glob(f"*/{FILE}")})


def _locate(name: str) -> Path:
    given = Path(name)
    if given.suffix == ".py" and given.is_file():
        return given
    if len(given.parts) > 1 or name.startswith("."):
        if (given / FILE).is_file():
            return given / FILE
        raise UnknownModelError(f"{name}: no recipe there; a recipe is a folder with a {FILE}, or a .py file")
    for folder in recipe_folders():
        if (folder / name / FILE).is_file():
            return folder / name / FILE
    if (given / FILE).is_file():
        return given / FILE
    names = recipe_names()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}"
    raise UnknownModelError(f"{name}: no such recipe; {hint}")
