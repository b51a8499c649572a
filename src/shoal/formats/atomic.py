"""Files and folders that appear whole or not at all: a temporary sibling, fsync, then a rename; one run a folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shoal.errors import FileError

LOCK = ".lock"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for writing that replaces `path` when the block ends well and vanishes when it does not.

    Raises:
        FileError: the file cannot be created or filled (no such folder, read-only, disk full, …).
    """
    temporary = _sibling(path)
    try:
        out = temporary.open("xb")
    except OSError as error:
        raise FileError(path, f"cannot be written: {error.strerror}") from error
    try:
        yield out
        try:
            out.flush()
            os.fsync(out.fileno())
            out.close()
            temporary.replace(path)
        except OSError as error:
            raise FileError(path, f"cannot be written: {error.strerror}") from error
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # closing tries once more to write what did not fit
            out.close()
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes `path` when the block ends well and is removed when it does not.

    Raises:
        FileError: `path` already holds something, or its parent cannot be written.
    """
    require_empty(path)
    temporary = _sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise FileError(path, f"cannot be written: {error.strerror}") from error
    try:
        yield temporary
        sync_folder(temporary)
        require_empty(path)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, FileError) and error.path.is_relative_to(temporary):  # name what the user asked for
            error.args = (str(error).replace(str(temporary), str(path)),)
            error.path = path / error.path.relative_to(temporary)
        raise


def require_empty(path: Path) -> None:
    """Raise FileError unless `path` is free or an empty folder: we never write into somebody's model."""
    if path.is_dir():
        if any(path.iterdir()):
            raise FileError(path, "already exists and is not empty")
    elif path.exists() or path.is_symlink():
        raise FileError(path, "already exists and is not a folder")


def sync_folder(path: Path) -> None:
    """Make a rename in `path` survive a power cut, where the file system lets a folder be synced."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold a run's folder; the system lets go of it when the process ends, however it ends.

    Raises:
        FileError: another run holds it.
    """
    import fcntl  # not everywhere

    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FileError(folder, f"cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 20).decode("ascii", "replace").strip()
            raise FileError(folder, f"another run is at work here (process {holder or 'unknown'})") from error
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
        os.truncate(handle, 0)
    finally:
        os.close(handle)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.partial")
