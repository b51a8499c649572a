"""Whether a wheel may be trained on: what its metadata declares, and whether a licence text in it says the same.

Only licences that ask for no more than keeping a notice are accepted. Both witnesses must agree: the declaration
(`License-Expression`, `License` or a classifier) and a text that the wheel carries.
"""

from __future__ import annotations

import re
from email.message import Message

# A phrase of each licence's text, spaces folded, and how metadata names it.
TEXTS = {
    "MIT": r"permission is hereby granted, free of charge, to any person obtaining a copy",
    "Apache-2.0": r"apache license,? version 2\.0|licensed under the apache license|apache\.org/licenses/license-2\.0",
    "BSD": r"redistribution and use in source and binary forms",
    "ISC": r"permission to use, copy, modify, and/?(or)? distribute this software for any purpose",
    "PSF-2.0": r"psf license agreement|python software foundation license|license agreement for matplotlib",
    "HPND": r"permission to use, copy, modify,? and distribute this software and its (associated )?documentation",
    "Unlicense": r"this is free and unencumbered software",
    "BlueOak-1.0.0": r"blue oak model license",
}
NAMES = {
    "MIT": r"\bmit(-0|-cmu)?\b|\bexpat\b",
    "Apache-2.0": r"\bapache\b|\basl ?2\b|\bal2\b",
    "BSD": r"\b0?bsd\b",
    "ISC": r"\bisc\b",
    "PSF-2.0": r"\bpsf\b|\bpython software foundation\b|\bpython-2\.0\b|\bmatplotlib\b",
    "HPND": r"\bhpnd\b|\bmit-cmu\b|historical permission notice|\bbiopython\b",
    "Unlicense": r"\bunlicense\b|\bpublic domain\b",
    "BlueOak-1.0.0": r"\bblueoak\b|\bblue oak\b",
}
# Where these are named, permission comes with conditions on the whole work, or is not known.
COPYLEFT = re.compile(
    r"\ba?l?gpl|gnu (lesser|library|affero|general)|\bmpl\b|mozilla public|\bepl\b|eclipse|cddl|\beupl\b|\bcc-by"
    r"|creative commons|proprietary|commercial|\bbusl\b|\bsspl\b|elastic licen",
    re.I,
)


def licence_of(metadata: Message, texts: list[str]) -> tuple[str, str]:
    """(licence, "") if both witnesses agree on a permissive one, else ("", reason).

    `texts`: the licence files that the wheel carries.
    """
    declared = _declared(metadata)
    if not declared:
        return "", "declares no licence"
    if COPYLEFT.search(declared) and not _has_permissive_choice(declared):
        return "", f"declares {declared[:60]!r}"
    named = [name for name, pattern in NAMES.items() if re.search(pattern, declared, re.I)]
    if not named:
        return "", f"declares {declared[:60]!r}"
    folded = [" ".join(text.lower().split()) for text in texts]
    agreed = [name for name in named if any(re.search(TEXTS[name], text) for text in folded)]
    if not agreed:
        return "", f"declares {named[0]}, carries no such text"
    return " / ".join(agreed), ""


def is_copyleft_source(head: str) -> bool:
    """Whether the first lines of a file put it under another licence than its package."""
    return (
        re.search(r"gnu (lesser|library|affero|general) public|SPDX-License-Identifier: *\(?A?L?(GPL|MPL)", head, re.I)
        is not None
    )


def _declared(metadata: Message) -> str:
    """The expression if there is one, else the classifiers, else a short `License` field."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [line.split("::")[-1].strip() for line in metadata.get_all("Classifier", []) if "License ::" in line]
    if classifiers := [line for line in classifiers if line != "OSI Approved"]:
        return "; ".join(classifiers)
    lines = [line.strip() for line in str(metadata.get("License") or "").splitlines() if line.strip()]
    return lines[0][:120] if lines else ""


def _has_permissive_choice(declared: str) -> bool:
    """`Apache-2.0 OR GPL-2.0`: the reader may choose."""
    choices = re.split(r"\bOR\b", declared)
    return any(not COPYLEFT.search(choice) for choice in choices) and len(choices) > 1
