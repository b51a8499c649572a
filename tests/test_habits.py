"""The habits of the house that a machine can check: doors between rooms, sizes, one place for the environment, no torch
on the serving path, and a README that shows every room."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "shoal"

# Imports go down this list or stay on a line, and a line's rooms may not import each other in a circle.
FLOORS = [
    ["errors"],
    ["config", "settings"],
    ["positions", "machine"],
    ["formats"],
    ["kernels"],
    ["model"],
    ["hub", "data", "engine", "quant", "evaluate", "train", "tune", "prove", "vision", "symbolic", "trace", "cost"],
    ["server"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAX_FILE, MAX_FUNCTION = 500, 80


def _sources(*patterns: str) -> list[Path]:
    return sorted(p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file() and "__pycache__" not in p.parts)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[tuple[str, str]]:
    """(imported module, line) of everything of ours that a file imports, at its top or inside a function."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "shoal":
            names = [f"shoal.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        for name in names:
            if name == "shoal" or name.startswith("shoal."):
                yield name, f"{path.relative_to(ROOT)}:{node.lineno}"


PYTHON = [p for p in _sources("src/shoal/**/*.py") if p.parent != PACKAGE or p.name != "__init__.py"]


def test_every_room_has_a_floor():
    assert {_room(path) for path in PYTHON} - set(FLOOR) == set()


def test_imports_go_down():
    wrong = []
    for path in PYTHON:
        here = FLOOR[_room(path)]
        for name, where in _imports(path):
            room = name.split(".")[1] if "." in name else ""
            if room not in FLOOR:  # the package itself or its version: for the top floors only
                allowed = here >= FLOOR["server"]
            else:
                allowed = FLOOR[room] <= here
            if not allowed:
                wrong.append(f"{where} imports {name}")
    assert wrong == []


def test_rooms_on_one_floor_form_no_circle():
    doors: dict[str, set[str]] = {}
    for path in PYTHON:
        for name, _ in _imports(path):
            room = name.split(".")[1] if "." in name else ""
            if room in FLOOR and room != _room(path):
                doors.setdefault(_room(path), set()).add(room)
    seen: list[str] = []

    def visit(room: str, way: tuple[str, ...]) -> None:
        assert room not in way, f"rooms import each other in a circle: {' → '.join((*way, room))}"
        if room not in seen:
            for other in sorted(doors.get(room, ())):
                visit(other, (*way, room))
            seen.append(room)

    for room in sorted(doors):
        visit(room, ())


def test_file_sizes():
    files = _sources("src/**/*.py", "native/**/*", "recipes/**/*.py")
    assert len(files) > 10
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > MAX_FILE}
    assert long == {}


def test_python_function_sizes():
    long = {}
    for path in _sources("src/**/*.py", "recipes/**/*.py"):
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}


def _native_functions(text: str) -> Iterator[tuple[str, int]]:
    """(first line, length) of each function at namespace level; clang-format puts its ends in column 0."""
    first, start, opened = "", None, False
    for number, line in enumerate(text.splitlines()):
        if start is None and re.match(r"(?!namespace|struct|class|enum|union|extern)[A-Za-z][^=]*[({,]$", line):
            first, start, opened = line, number, line.endswith("{")
        elif start is not None and not opened:
            opened = line.endswith("{")
            start = None if line.endswith(";") else start  # a declaration
        elif start is not None and line.startswith("}"):
            yield first, number - start + 1
            start = None


def test_native_function_sizes():
    found, long = 0, {}
    for path in _sources("native/**/*.h", "native/**/*.cpp", "native/**/*.inc"):
        for first, lines in _native_functions(path.read_text()):
            found += 1
            if lines > MAX_FUNCTION:
                long[f"{path.relative_to(ROOT)}: {first}"] = lines
    assert found > 20
    assert long == {}


def test_the_environment_is_read_in_one_file():
    readers = []
    for path in _sources("src/shoal/**/*.py", "recipes/**/*.py"):
        for node in ast.walk(_tree(path)):
            name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if name in ("environ", "environb", "getenv", "getenvb"):
                readers.append(path.relative_to(PACKAGE).as_posix())
    assert set(readers) == {"settings.py"}
    assert [p.name for p in _sources("native/**/*") if "getenv" in p.read_text()] == []


def test_no_pickle_and_no_code_from_models():
    wrong = []
    for path in _sources("src/shoal/**/*.py"):
        for node in ast.walk(_tree(path)):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            keywords = [k for k in node.keywords if _is_true(k.value)] if isinstance(node, ast.Call) else []
            if {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & set(imported) or any(
                k.arg in ("allow_pickle", "trust_remote_code") for k in keywords
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


@pytest.mark.parametrize(
    "package",
    [
        "shoal",
        "shoal.formats",
        "shoal.kernels",
        "shoal.engine",
        "shoal.quant",
        "shoal.data",
        "shoal.server",
        "shoal.cli",
    ],
)
def test_no_torch_on_the_serving_path(package):
    """`pip install shoal` brings no torch: importing a room, and every module of all but the engine, does without."""
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
deep = {package!r} not in ("shoal", "shoal.engine")  # the engine's torch path lives in a module of its own
names = [m.name for m in pkgutil.walk_packages(package.__path__, {package!r} + ".")] if deep else []
for name in names:
    importlib.import_module(name)
for heavy in ("torch", "transformers", "huggingface_hub", "safetensors"):
    assert heavy not in sys.modules, heavy
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_readme_shows_every_room():
    readme = (ROOT / "README.md").read_text()
    rooms = sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py")))
    assert [room for room in rooms if not re.search(rf"^\W*{room}/\s+\S", readme, re.M)] == []


def test_readme_lists_every_setting():
    readme = (ROOT / "README.md").read_text()
    settings = set(
        map("".join, re.findall(r'environ\.get\("(\w+)"|"(SHOAL_\w+)"', (PACKAGE / "settings.py").read_text()))
    )
    assert {"SHOAL_ISA", "XDG_CACHE_HOME", "SHOAL_PORT"} <= settings
    assert [name for name in sorted(settings) if not re.search(rf"^\|\s*`{name}`", readme, re.M)] == []
