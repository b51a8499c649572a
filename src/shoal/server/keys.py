"""API keys: kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import ConfigError, FileError

MIN_LENGTH = 8
MAX_LENGTH = 512
MAX_FILE_BYTES = 1 << 20


class Keys:
    """A set of keys, none of which memory holds in clear. Raises ConfigError for one that is too short to be one."""

    def __init__(self, keys: Iterable[str], *, name: str = "api-key") -> None:
        self._digests = []
        for key in dict.fromkeys(keys):
            if not MIN_LENGTH <= len(key) <= MAX_LENGTH or not key.isprintable() or " " in key:
                problem = f"must have from {MIN_LENGTH} to {MAX_LENGTH} printable characters and no space"
                raise ConfigError(name, problem)
            self._digests.append(_digest(key.encode()))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def know(self, key: bytes) -> bool:
        """Takes the same time whichever key it is, or none: digests are compared, and all of them."""
        digest = _digest(key)
        found = 0
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return bool(found)


def read_keys(path: str | Path) -> list[str]:
    """Keys from a file, one a line; empty lines and lines that start with # do not count. FileError: no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(MAX_FILE_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, getattr(error, "strerror", None) or "is not UTF-8") from None
    keys = [line.strip() for line in lines]
    found = [key for key in keys if key and not key.startswith("#")]
    if not found:
        raise FileError(path, "holds no key")
    return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
