"""Which licence a source tree stands under: SPDX identifiers from headers, licence files and package metadata.

Twenty licences cover nearly all public code; anything else is `unknown`, which the permissive filter drops.
"""

from __future__ import annotations

import email.parser
import functools
import re
from collections.abc import Mapping
from pathlib import Path

from shoal.data.document import Document

# What a model may learn from without conditions on what it is part of: attribution at most (SPDX identifiers).
PERMISSIVE = frozenset(
    {"0BSD", "AFL-2.1", "AFL-3.0", "Apache-2.0", "Artistic-2.0", "BlueOak-1.0.0", "BSD-2-Clause", "BSD-3-Clause",
     "BSL-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "NCSA", "PostgreSQL",
     "PSF-2.0", "Python-2.0", "Unlicense", "UPL-1.0", "W3C", "WTFPL", "X11", "ZPL-2.1", "Zlib", "public-domain"}
)  # fmt: skip

# Words by which a licence is known. The first in a text counts, as licences name others further down; where two begin
# at one place, the first here.
_TEXTS = (
    ("AGPL-3.0", r"gnu affero general public license"),
    ("LGPL-2.1", r"gnu lesser general public license.{0,80}version 2\.1"),
    ("LGPL-3.0", r"gnu lesser general public license"),
    ("GPL-3.0", r"gnu general public license.{0,80}version 3"),
    ("GPL-2.0", r"gnu general public license.{0,80}version 2"),
    ("MPL-2.0", r"mozilla public license,?.{0,20}2\.0"),
    ("EPL-2.0", r"eclipse public license.{0,20}2\.0"),
    ("Apache-2.0", r"apache license.{0,40}version 2\.0"),
    ("CC-BY-SA-4.0", r"creative commons attribution-sharealike 4\.0"),
    ("CC-BY-4.0", r"creative commons attribution 4\.0"),
    ("CC0-1.0", r"cc0 1\.0 universal"),
    ("PSF-2.0", r"python software foundation license version 2"),
    ("BSL-1.0", r"boost software license.{0,20}1\.0"),
    ("Unlicense", r"this is free and unencumbered software released into the public domain"),
    ("Zlib", r"altered source versions must be plainly marked as such"),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms.*(?:neither the name|the names of its)"),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms"),
    ("MIT", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("0BSD", r"permission to use, copy, modify, and/or distribute(?!.*provided that the above copyright)"),
    ("ISC", r"permission to use, copy, modify, and(?:/or)? distribute"),
)  # fmt: skip
_PATTERNS = tuple((name, re.compile(pattern, re.S)) for name, pattern in _TEXTS)
_HEADER = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+() -]+)")
_FILES = ("license", "licence", "copying", "unlicense")
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0", "BSD License": "BSD-3-Clause", "MIT License": "MIT",
    "ISC License (ISCL)": "ISC", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0", "The Unlicense (Unlicense)": "Unlicense",
    "GNU General Public License v3 (GPLv3)": "GPL-3.0", "GNU General Public License v2 (GPLv2)": "GPL-2.0",
    "GNU General Public License (GPL)": "GPL-2.0", "zlib/libpng License": "Zlib",
    "MIT No Attribution License (MIT-0)": "MIT-0",
}  # fmt: skip
LIMIT = 200_000  # characters of a licence file that are read
HEADER = 2000  # characters of a source file in which a header stands


def from_text(text: str) -> str | None:
    """SPDX identifier of a licence's full text or its usual notice, or None."""
    plain = re.sub(r"[\s*#/;]+", " ", text[:LIMIT]).lower()
    found = [(match.start(), at) for at, (_, pattern) in enumerate(_PATTERNS) if (match := pattern.search(plain))]
    return _PATTERNS[min(found)[1]][0] if found else None


def from_header(text: str) -> str | None:
    """What a source file says of itself in an `SPDX-License-Identifier:` line."""
    found = _HEADER.search(text[:HEADER])
    return found[1].strip(" -") if found else None  # `-`: of `-->`


def is_permissive(expression: str | None) -> bool:
    """Whether an SPDX expression lets us use the text with attribution at most: every side of AND, one side of OR."""
    if not expression:
        return False
    words = re.findall(r"[()]|[^\s()]+", expression)
    value, rest = _any_of(words)
    return value and not rest


def _any_of(words: list[str]) -> tuple[bool, list[str]]:
    value, words = _all_of(words)
    while words and words[0].upper() == "OR":
        other, words = _all_of(words[1:])
        value = value or other
    return value, words


def _all_of(words: list[str]) -> tuple[bool, list[str]]:
    value, words = _one(words)
    while words and words[0].upper() in ("AND", "WITH"):
        with_exception = words[0].upper() == "WITH"
        other, words = (True, words[2:]) if with_exception else _one(words[1:])
        value = value and other
    return value, words


def _one(words: list[str]) -> tuple[bool, list[str]]:
    if not words:
        return False, []
    if words[0] == "(":
        value, words = _any_of(words[1:])
        return value and words[:1] == [")"], words[1:]
    return words[0].removesuffix("+").removesuffix("-only").removesuffix("-or-later") in PERMISSIVE, words[1:]


def provenance(document: Document, path: Path, root: Path) -> None:
    """Give a document of a source tree its `licence` and `version` (from package metadata) unless it has them; what the
    document says of its licence itself goes before everything else."""
    meta = document.metadata
    header = from_header(document.text)
    if header:
        meta["licence"] = header
    if "licence" in meta and "version" in meta:
        return
    inside = path.relative_to(root).parts if path.is_relative_to(root) else ()
    # The root may be a folder of packages, or one package among others.
    package = _packages(root).get(inside[0]) if inside else None
    package = package or _packages(root.parent, f"{root.name}-*.dist-info").get(root.name)
    if package:
        meta.update({key: value for key, value in package.items() if key not in meta})
    if "licence" not in meta and (found := _of_folder(path.parent, root)):
        meta["licence"] = found


@functools.lru_cache(maxsize=4096)
def _of_folder(folder: Path, root: Path) -> str | None:
    """From the licence files of a folder, else of the folder above it, up to the root."""
    try:
        names = sorted(
            p for p in folder.iterdir() if p.name.lower().split(".")[0].split("-")[0] in _FILES and p.is_file()
        )
    except OSError:
        names = []
    found = {from_text(p.read_bytes()[:LIMIT].decode("utf-8", "replace")) for p in names} - {None}
    if found:
        return " AND ".join(sorted(str(name) for name in found))
    return None if folder == root or root not in folder.parents else _of_folder(folder.parent, root)


@functools.lru_cache(maxsize=16)
def _packages(root: Path, pattern: str = "*.dist-info") -> Mapping[str, Mapping[str, str]]:
    """Licence and version of each top-level folder or module that a Python wheel has installed below `root`."""
    found: dict[str, dict[str, str]] = {}
    for info in sorted(root.glob(pattern)):
        try:
            meta = email.parser.HeaderParser().parsestr((info / "METADATA").read_text(errors="replace"))
            record = (info / "RECORD").read_text(errors="replace")
        except OSError:
            continue
        said = {"version": f"{meta['Name']} {meta['Version']}", "licence": _of_package(meta, info)}
        for name in {line.split("/")[0].split(",")[0] for line in record.splitlines()} - {"..", info.name}:
            found[name] = {key: value for key, value in said.items() if value}
    return found


def _of_package(meta: email.message.Message, info: Path) -> str | None:
    if meta["License-Expression"]:
        return str(meta["License-Expression"])
    for classifier in meta.get_all("Classifier", []):
        if classifier.startswith("License ::") and classifier.split(" :: ")[-1] in _CLASSIFIERS:
            return _CLASSIFIERS[classifier.split(" :: ")[-1]]
    short = str(meta["License"] or "").strip()
    if short in PERMISSIVE:
        return short
    return from_text(short) or _of_folder(info / "licenses", info) or _of_folder(info, info)
