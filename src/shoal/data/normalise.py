"""One spelling for what looks the same: line ends, Unicode composition, invisible characters.

Mojibake is not repaired: a repair touches correct text too, and documents full of it fall to the entropy band. Code is
changed as little as a compiler would notice.
"""

from __future__ import annotations

import re
import unicodedata

# Zero-width and control characters that neither text nor code needs; tab, newline and form feed stay.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x9f\u200b\u2060\ufeff\ufffe\uffff]")
_CONTROLS = bytes(code for code in range(128) if _INVISIBLE.match(chr(code)))
_BLANKS = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_TRAILING = re.compile(r"(?<![ \t])[ \t]+\n")  # from the first blank only, else long runs take quadratic time
_EMPTY = re.compile(r"\n{4,}")


def normalise(text: str, kind: str) -> str:
    """`text` with LF line ends, in NFC and without invisible characters; unless it is code also with plain blanks, none
    at the ends of lines, and at most two empty lines in a row."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = _BLANKS.sub(" ", text) if kind != "code" else text
    text = _visible(text)
    if kind != "code":
        # Two characters are found much faster than a pattern, and are nearly always missing.
        text = _TRAILING.sub("\n", text) if " \n" in text or "\t\n" in text else text
        text = (_EMPTY.sub("\n\n\n", text) if "\n\n\n\n" in text else text).strip()
    return text


def _visible(text: str) -> str:
    if not text.isascii():
        return _INVISIBLE.sub("", text)
    plain = text.encode()
    left = plain.translate(None, _CONTROLS)
    return text if len(left) == len(plain) else left.decode()
