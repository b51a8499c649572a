"""Putting a finished folder where an older one may lie."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(dst: Path) -> Iterator[Path]:
    """A free path beside `dst` to write a folder to; when the block ends well, it takes the place of `dst`."""
    fresh = dst.with_name(f".{dst.name}.{secrets.token_hex(4)}.partial")
    yield fresh
    if dst.exists():
        old = dst.with_name(f".{dst.name}.{secrets.token_hex(4)}.partial")
        dst.rename(old)
        fresh.rename(dst)
        shutil.rmtree(old)
    else:
        fresh.rename(dst)
