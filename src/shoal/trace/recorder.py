"""Recording while a model runs: reports go into memory, a thread of its own turns them into files.

Memory stays bounded: at most three groups of about 65536 rows and 32 MiB wait. A file appears when it is whole; a
process that is killed leaves the ones before it, and a disk that is full none that is broken.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shoal.engine.routing import OnRouting, Routing
from shoal.errors import FileError, ShoalError
from shoal.formats.atomic import atomic_file
from shoal.trace.table import Heard, Shape, TokenText, to_table

GROUP_ROWS = 1 << 16
GROUP_BYTES = 32 << 20  # of router scores
FILE_ROWS = 1 << 23
FILE_SECONDS = 600.0


class Recorder:
    """Writes what it is told into one file, or into files of a folder that follow each other.

    Set `llm.trace = recorder.listen`. After a failure it stops recording and keeps the `error`, which `close` raises;
    the model runs on.

    Args:
        path: the Parquet file to write, or, if `folder`, where the files `routing-<time>-<number>.parquet` go.
        shape: of the model that is watched.
        text: bytes of a token; None keeps neither tokens nor text, so that nobody can read the prompts.
        folder: begin a new file every 8 million rows or ten minutes.
        on_failure: called once, with the error, when recording stops.
    """

    def __init__(
        self,
        path: Path,
        shape: Shape,
        *,
        text: TokenText | None = None,
        folder: bool = False,
        group_rows: int = GROUP_ROWS,
        file_seconds: float = FILE_SECONDS,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self.error: Exception | None = None
        self.tokens = 0
        self.files: list[Path] = []
        self._path, self._shape, self._text, self._folder = path, shape, text, folder
        self._group_rows = min(group_rows, max(1, GROUP_BYTES // (4 * shape.n_routed_experts)))
        self._file_seconds, self._on_failure = file_seconds, on_failure
        self._begin = time.perf_counter()
        self._requests = itertools.count()
        self._group: list[Heard] = []
        self._rows = 0
        self._lock = threading.Lock()  # guards the group
        self._groups: queue.Queue[list[Heard] | None] = queue.Queue(2)
        self._stack = contextlib.ExitStack()
        self._writer: Any = None
        self._opened_at = 0.0
        self._file_rows = 0
        if folder:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FileError(path, f"cannot be made: {error.strerror}") from error
        else:
            self._open(path)
        self._thread = threading.Thread(target=self._main, name="shoal-trace", daemon=True)
        self._thread.start()

    def listen(self) -> OnRouting:
        """Give a new request its number, and what is to be called with where its tokens go."""
        number = next(self._requests)

        def hear(routing: Routing) -> None:
            if self.error is None:
                self._hear(Heard(request=number, routing=routing))

        return hear

    def close(self) -> None:
        """Write what is left and finish the file. Raises what stopped the recording, and leaves no file then."""
        if self._thread.is_alive():
            if full := self._take_group():
                self._groups.put(full)
            self._groups.put(None)
            self._thread.join()
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close, or leave no unfinished file where the block failed."""
        if error is not None and self.error is None:
            self.error = ShoalError("the recording was given up")
        if error is None:
            self.close()
        else:
            with contextlib.suppress(ShoalError):
                self.close()

    def _hear(self, part: Heard) -> None:
        with self._lock:
            self._group.append(part)
            self.tokens += len(part.routing.tokens)
            self._rows += len(part.routing.tokens) * len(self._shape.layers)
            if self._rows < self._group_rows:
                return
            full, self._group, self._rows = self._group, [], 0
        self._groups.put(full)

    def _main(self) -> None:
        ended = False
        while not ended:
            try:
                group = self._groups.get(timeout=self._file_seconds / 10 if self._folder else None)
            except queue.Empty:
                group = self._take_group()  # few rows, but they have waited long enough
            ended = group is None
            try:
                if self.error is not None:  # go on emptying the queue: nobody may wait for us
                    self._drop(self.error)
                elif ended:
                    self._finish()
                else:
                    if group:
                        self._write(group)
                    self._finish_if_due()
            except Exception as error:  # full disk, lost folder
                self.error = error
                self._drop(error)
                if self._on_failure is not None:
                    self._on_failure(error)

    def _write(self, group: list[Heard]) -> None:
        if self._writer is None:
            stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
            self._open(self._path / f"routing-{stamp}-{len(self.files):04d}.parquet")
        table = to_table(group, self._shape, begin=self._begin, text=self._text)
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise FileError(self._path, f"cannot be written: {error.strerror or error}") from error
        self._file_rows += table.num_rows

    def _finish_if_due(self) -> None:
        old = time.monotonic() - self._opened_at >= self._file_seconds
        if self._folder and (old or self._file_rows >= FILE_ROWS):
            self._finish()

    def _take_group(self) -> list[Heard]:
        with self._lock:
            group, self._group, self._rows = self._group, [], 0
        return group

    def _open(self, path: Path) -> None:
        out = self._stack.enter_context(atomic_file(path))
        self._writer = pq.ParquetWriter(out, self._shape.schema(), compression="zstd")
        self._opened_at, self._file_rows = time.monotonic(), 0
        self.files.append(path)

    def _finish(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            raise FileError(self._path, f"cannot be written: {error.strerror or error}") from error
        self._writer = None
        self._stack.close()

    def _drop(self, error: Exception) -> None:
        """Leave the open file's context as a failure: it vanishes."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(Exception):  # what it still holds cannot be written
                writer.close()
            with contextlib.suppress(Exception):
                self._stack.__exit__(type(error), error, error.__traceback__)
