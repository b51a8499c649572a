"""Licences, languages, and one spelling for what looks the same."""

from __future__ import annotations

import sysconfig
import textwrap
from pathlib import Path

import pytest
from tests.data.texts import document

from shoal.data import language, licences
from shoal.data.normalise import normalise

ROOT = Path(__file__).resolve().parents[2]
MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    "documentation files"
)
BSD = "Redistribution and use in source and binary forms, with or without modification, are permitted"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MIT, "MIT"),
        (textwrap.indent(textwrap.fill(MIT, 40), " * "), "MIT"),
        (BSD, "BSD-2-Clause"),
        (BSD + " ... Neither the name of the copyright holder nor", "BSD-3-Clause"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007", "GPL-3.0"),
        ("GNU LESSER GENERAL PUBLIC LICENSE Version 2.1, February 1999", "LGPL-2.1"),
        ("GNU GENERAL PUBLIC LICENSE\nVersion 3 ... 13. Use with the GNU Affero General Public License.", "GPL-3.0"),
        (
            "Mozilla Public License Version 2.0 ... the GNU General Public License, Version 2.0, the GNU Lesser "
            "General Public License, Version 2.1, the GNU Affero General Public License",
            "MPL-2.0",
        ),
        ("All rights reserved. You may not copy this.", None),
    ],
)
def test_licence_texts(text, expected):
    assert licences.from_text(text) == expected


def test_our_own_licence_and_that_of_python():
    assert licences.from_text((ROOT / "LICENSE").read_text()) == "Apache-2.0"
    assert licences.from_text((Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text()) in (
        "PSF-2.0",
        "GPL-2.0",
    )


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True), ("GPL-3.0-only", False), ("MIT OR GPL-3.0", True), ("MIT AND GPL-3.0", False),
        ("(MIT AND Apache-2.0) OR GPL-2.0", True), ("Apache-2.0 WITH LLVM-exception", True), ("GPL-2.0+", False),
        ("MIT AND (GPL-2.0 OR BSD-3-Clause)", True), ("(MIT", False), ("MIT)", False), ("", False), (None, False),
    ],
)  # fmt: skip
def test_expressions(expression, expected):
    assert licences.is_permissive(expression) is expected


def test_a_file_stands_under_the_nearest_licence(tmp_path):
    (tmp_path / "LICENSE").write_text(MIT)
    (tmp_path / "vendor/inner").mkdir(parents=True)
    (tmp_path / "vendor/COPYING").write_text("GNU GENERAL PUBLIC LICENSE Version 3")

    def licence(inside, text="x = 1"):
        one = document(text, "code")
        licences.provenance(one, tmp_path / inside, tmp_path)
        return one.metadata.get("licence")

    assert licence("a.py") == "MIT"
    assert licence("vendor/inner/b.py") == "GPL-3.0"
    assert licence("vendor/c.py", "# SPDX-License-Identifier: BSD-3-Clause\n") == "BSD-3-Clause"
    assert licence("vendor/c.md", "<!-- SPDX-License-Identifier: CC-BY-4.0 -->\n") == "CC-BY-4.0"


def test_installed_packages_say_licence_and_version():
    import numpy

    root = Path(numpy.__file__).parents[1]
    one = document("x = 1", "code")
    licences.provenance(one, root / "numpy/version.py", root)
    assert one.metadata["version"] == f"numpy {numpy.__version__}"
    assert licences.is_permissive(one.metadata["licence"])
    one = document("# SPDX-License-Identifier: ISC\n", "code")
    licences.provenance(one, root / "numpy/version.py", root)
    assert (one.metadata["licence"], one.metadata["version"]) == ("ISC", f"numpy {numpy.__version__}")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The weather is fine today and we are going out for a walk in the park with our friends.", "en"),
        ("Das Wetter ist heute schön, und wir gehen mit unseren Freunden im Park spazieren.", "de"),
        ("Il fait beau aujourd'hui et nous allons nous promener dans le parc avec nos amis.", "fr"),
        ("今天天气很好，我们和朋友们一起去公园散步。", "zh"),
        ("123 456 789", "und"),
        ("", "und"),
    ],
)
def test_languages(text, code):
    assert language.identify(text)[0] == code


def test_normalise():
    assert normalise("a\r\nb\rc", "code") == "a\nb\nc"
    assert normalise("e\u0301\u200b\u00a0x\x00\ufeff", "text") == "é x"
    assert normalise("\n a  \n\n\n\n\nb\t\n", "text") == "a\n\n\nb"
    assert normalise("\ta  \n\n\n\n\nb = '\u00a0'", "code") == "\ta  \n\n\n\n\nb = '\u00a0'"


def test_blanks_take_linear_time():
    """A run of blanks that ends no line: begun anew at each blank this takes minutes, and the test its time limit."""
    assert normalise("a" + " " * 400_000 + "b", "text") == "a" + " " * 400_000 + "b"
