"""The native sources as built: the five places of a kernel, no instruction outside its unit, the check program."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
# What objdump prints of instructions beyond the baseline: VEX and EVEX encodings, BMI, Arm's dot product.
BEYOND = re.compile(r"[yz]mm\d|\t(v[a-z]\w+|shlx|shrx|sarx|rorx|andn|bzhi|mulx|pdep|pext|movbe|[su]dot)\s")


def _ops() -> list[str]:
    """Kernel names in the table, from the header."""
    return re.findall(r"\(\*(\w+)\)\(", (NATIVE / "include/shoal/ops.h").read_text())


@pytest.mark.parametrize("stem", _ops())
def test_five_places(stem):
    places = {
        "reference": re.search(rf"^def {stem}\(", _all(ROOT / "src/shoal/kernels", "reference*.py"), re.M),
        "C++ body": re.search(rf"^void {stem}\(", _read(NATIVE / f"kernels/{stem}.h"), re.M),
        "test": re.search(r"^def test_matches_reference\(isa", _read(ROOT / f"tests/kernels/test_{stem}.py"), re.M),
        "benchmark": re.search(r"^def test_benchmark\(isa", _read(ROOT / f"tests/kernels/test_{stem}.py"), re.M),
        "docs line": re.search(rf"^\| `{stem}` \| \S", (ROOT / "docs/kernels.md").read_text(), re.M),
        "table line": f".{stem} = {stem}," in (NATIVE / "isa.inc").read_text(),
        "check case": f'{{"{stem}",' in _all(NATIVE / "tests", "*_check.cpp"),
    }
    assert [place for place, found in places.items() if not found] == []


def test_every_body_is_in_the_table():
    assert sorted(path.stem for path in (NATIVE / "kernels").glob("*.h")) == sorted(_ops())


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _all(folder: Path, pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(pattern)))


def _run(*command: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True, timeout=240
    ).stdout


def _build(folder: Path, target: str, *options: str) -> Path:
    """One target without Python, in a folder of its own."""
    beside = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=beside) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=beside) or shutil.which("ninja")
    if not (cmake and ninja and shutil.which("c++")):
        pytest.skip("needs cmake, ninja and a C++ compiler")
    flags = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DSHOAL_PYTHON=OFF", *options]
    _run(cmake, "-S", ROOT, "-B", folder, *flags)
    _run(cmake, "--build", folder, "--target", target)
    return folder


def _objects(folder: Path) -> dict[str, Path]:
    found = folder.glob("CMakeFiles/shoal_kernels.dir/native/*.o")
    return {path.name.split(".")[0]: path for path in found}


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """The kernels' object files by stem: the editable install's if no source is newer, else compiled now."""
    sources = [ROOT / "CMakeLists.txt", *(path for path in NATIVE.rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources if "tests" not in path.parts)
    for installed in ROOT.glob("build/cp*/install_manifest.txt"):
        if installed.stat().st_mtime > newest:
            return _objects(installed.parent)
    return _objects(_build(tmp_path_factory.mktemp("native"), "shoal_kernels"))


def test_units_share_no_symbol_with_the_linker(objects):
    """A weak symbol (W, V, u) compiled with wide instructions may replace its baseline twin at link time."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    units = {name: path for name, path in objects.items() if name.startswith("isa_")}
    assert "isa_scalar" in units
    for name, path in units.items():
        symbols = [line.split()[-2:] for line in _run("nm", "--defined-only", path).splitlines()]
        assert [s for kind, s in symbols if kind in "WwVvuCi"] == [], name
        exported = [s for kind, s in symbols if kind.isupper()]
        assert len(exported) == 1, f"{name} should export its table alone, has {exported}"
        assert re.fullmatch(rf"_ZN5shoal\d+{name[4:]}5tableE", exported[0])
        constructors = [s for _, s in symbols if "_GLOBAL__sub_I" in s]
        assert constructors == [], name


def test_units_stay_small(objects):
    """Unrolled loops multiply: 16 parts of a tile by 8 steps by 4 rows once made the scalar unit ten times as long."""
    sizes = {name: path.stat().st_size for name, path in objects.items() if name.startswith("isa_")}
    assert {name: size for name, size in sizes.items() if size > 300_000} == {}


def test_baseline_objects_hold_baseline_instructions(objects):
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    for name in ("cpu", "dispatch", "isa_scalar"):
        code = _run("objdump", "-d", "--no-show-raw-insn", objects[name])
        assert "ret" in code
        assert BEYOND.search(code) is None, f"{name}: {BEYOND.search(code)}"
    if "isa_avx512" in objects:  # the search does find what it looks for
        assert "%zmm" in _run("objdump", "-d", "--no-show-raw-insn", objects["isa_avx512"])
        assert "%zmm" not in _run("objdump", "-d", "--no-show-raw-insn", objects["isa_avx2"])


def test_check_programs_under_sanitizers(tmp_path):
    """Each kernel and vector primitive against scalar code, in arrays of their exact size at odd addresses; and the
    executor."""
    for program in ("kernel_check", "engine_check"):
        out = _run(_build(tmp_path, program, "-DSHOAL_SANITIZE=ON") / program)
        assert re.search(r"^[1-9]\d* passed, 0 failed$", out, re.M), out
