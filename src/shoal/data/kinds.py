"""What a file is by its name: code in which language, plain text, rows, or nothing to read."""

from __future__ import annotations

from pathlib import PurePosixPath

# Programming languages by suffix: unambiguous ones only (GitHub's linguist knows more, and looks inside for it).
CODE = {
    ".py": "python", ".pyi": "python", ".pyx": "cython", ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++",
    ".cxx": "c++", ".hpp": "c++", ".hh": "c++", ".cu": "cuda", ".cuh": "cuda", ".rs": "rust", ".go": "go",
    ".java": "java", ".kt": "kotlin", ".scala": "scala", ".swift": "swift", ".cs": "c#", ".fs": "f#",
    ".js": "javascript", ".mjs": "javascript", ".cjs": "javascript", ".jsx": "javascript", ".ts": "typescript",
    ".tsx": "typescript", ".rb": "ruby", ".php": "php", ".pl": "perl", ".pm": "perl", ".lua": "lua", ".r": "r",
    ".jl": "julia", ".hs": "haskell", ".ml": "ocaml", ".mli": "ocaml", ".ex": "elixir", ".exs": "elixir",
    ".erl": "erlang", ".clj": "clojure", ".lisp": "lisp", ".el": "lisp", ".sh": "shell", ".bash": "shell",
    ".zsh": "shell", ".ps1": "powershell", ".sql": "sql", ".zig": "zig", ".nim": "nim", ".dart": "dart",
    ".f90": "fortran", ".vhd": "vhdl", ".sv": "systemverilog", ".cmake": "cmake", ".proto": "protobuf",
    ".mm": "metamath",
}  # fmt: skip
NAMES = {"makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake"}
TEXT = {".txt", ".md", ".rst", ".text", ".markdown", ".adoc", ".tex", ".org"}
ROWS = (".jsonl", ".ndjson", ".parquet")


def kind_of(name: str) -> tuple[str | None, str | None]:
    """(`code`, language), (`text`, None) or (`rows`, None) of a file name; (None, None): not ours to read."""
    lower = PurePosixPath(name).name.lower().removesuffix(".gz").removesuffix(".zst")
    suffix = PurePosixPath(lower).suffix
    if lower.endswith(ROWS):
        return "rows", None
    if lower in NAMES:
        return "code", NAMES[lower]
    if suffix in CODE:
        return "code", CODE[suffix]
    return ("text", None) if suffix in TEXT else (None, None)
