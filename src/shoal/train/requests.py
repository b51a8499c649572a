"""How a run is asked to save or stop: signals and touched files."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Requests:
    """What was asked for since the last step.

    Attributes:
        signal: the signal that asks the run to save and end, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signal: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as requests. The second one ends the process at once, as if nobody listened."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread only; whoever started this one deals with them
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def forget_files(self) -> None:
        """Remove what was touched before this run began: it was meant for another."""
        self.take_stop()
        self.take_save()

    def take_stop(self) -> bool:
        """Whether a file `STOP` was touched; it is removed."""
        return self._take_file(STOP_FILE)

    def take_save(self) -> bool:
        """Whether a file `SAVE` was touched; it is removed."""
        return self._take_file(SAVE_FILE)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)

    def _take_file(self, name: str) -> bool:
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        return True
