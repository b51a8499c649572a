"""`log.jsonl`: a line of JSON for every step, each once, whatever happened in between; and a copy for TensorBoard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import orjson

from shoal.errors import FileError, MissingExtraError, RunError

Record = dict[str, Any]


class Log:
    """Appends records to a file; opening it removes whatever lies behind `step`, such as steps that a kill undid.

    Raises:
        RunError: the disk refuses.
        FileError: the file holds something else than a log.
    """

    def __init__(self, path: Path, step: int, *, tensorboard: bool = False) -> None:
        self.path = path
        self._board = _open_board(path.parent / "tensorboard", step) if tensorboard else None
        try:
            self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b")
            self._file.truncate(_end_of(self._file, path, step))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error

    def write(self, record: Record) -> None:
        try:
            self._file.write(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from error
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Make sure that what was written survives a power cut; a checkpoint never knows of steps that the log lost."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from error
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[Record]:
    """The records of a log."""
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _end_of(file: IO[bytes], path: Path, step: int) -> int:
    """Where the first line past `step`, or the first half-written one, begins."""
    end = 0
    for number, line in enumerate(file, 1):
        try:
            record = orjson.loads(line) if line.endswith(b"\n") else None
        except orjson.JSONDecodeError:
            record = None
        if record is None:  # torn by a kill or a power cut: the steps from here on are done again
            return end
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise FileError(path, f"line {number} is no record of a training log")
        if record["step"] > step:
            return end
        end += len(line)
    return end


def _scalars(record: Record, prefix: str = "") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            out += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            out.append((prefix + name, float(value)))
    return out


def _open_board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard=true") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
