"""What a file holds, in a few characters: how a later run tells that it meets the same one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from shoal.errors import FileError

PIECE = 1 << 20  # bytes in memory at once


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises FileError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    return digest.hexdigest()
