"""Text to calibrate on and to measure with: a user's file, or the documentation and sources that come with Python."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shoal.errors import FileError, ShoalError

BUILTIN = "builtin"
HELD_OUT = 5  # one part in five of a user's file is measured with, not calibrated on
# Code beside the prose; a module is either calibrated on or measured with.
_CALIBRATION_MODULES = (
    "argparse",
    "ast",
    "calendar",
    "csv",
    "difflib",
    "heapq",
    "inspect",
    "logging/__init__",
    "shutil",
)
_MEASURED_MODULES = ("statistics", "textwrap", "fractions")


class Texts(NamedTuple):
    """`calibration` and `held_out` share nothing."""

    calibration: str
    held_out: str


def load_texts(source: str) -> Texts:
    """`builtin` or the path of a UTF-8 text file, whose last fifth is held out.

    Raises:
        FileError: the file cannot be read as text or is empty.
        ShoalError: this Python came without its documentation.
    """
    if source == BUILTIN:
        return _builtin()
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(path, f"is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    if not text.strip():
        raise FileError(path, "holds no text")
    cut = len(text) - len(text) // HELD_OUT
    return Texts(text[:cut], text[cut:])


def _builtin() -> Texts:
    calibration, prose, code = _builtin_parts()
    return Texts("\n\n".join(calibration), "\n\n".join(dict.fromkeys(prose + code)))


def builtin_held_out() -> tuple[str, str]:
    """The held-out text of `builtin`, prose and code apart. ShoalError if this Python lacks its documentation."""
    _, prose, code = _builtin_parts()
    return "\n\n".join(prose), "\n\n".join(code)


def _builtin_parts() -> tuple[list[str], list[str], list[str]]:
    """Paragraphs to calibrate on; prose and code to measure with.

    Every other topic of the language reference (English prose) and a few modules (code), Python's own licence. Topics
    repeat parts of each other, so a paragraph that was calibrated on is taken out of what is measured with.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        problem = "this Python comes without its documentation (pydoc_data); name a text file instead"
        raise ShoalError(f"calibrate: {problem}") from error
    names = sorted(topics)
    calibration = _paragraphs([*(topics[name] for name in names[::2]), *_modules(_CALIBRATION_MODULES)])
    seen = set(calibration)
    prose, code = (
        [part for part in _paragraphs(texts) if part not in seen]
        for texts in ([topics[name] for name in names[1::2]], _modules(_MEASURED_MODULES))
    )
    return calibration, prose, code


def _paragraphs(texts: Sequence[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(part.rstrip() for text in texts for part in text.split("\n\n")))


def _modules(names: Sequence[str]) -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    paths = [library / f"{name}.py" for name in names]
    return [path.read_text(encoding="utf-8") for path in paths if path.exists()]


def windows(ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """At most `most` tokens in windows of `length`, spread evenly over the text; one shorter window if the text is."""
    whole = [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    if not whole:
        return [list(ids[:most])] if ids else []
    count = max(1, min(len(whole), most // length))
    return [whole[index * len(whole) // count] for index in range(count)]
