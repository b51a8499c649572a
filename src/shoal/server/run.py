"""Running the application on a socket until a signal ends it."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from shoal.engine import LLM
from shoal.server.app import create_app
from shoal.server.guard import LOOPBACK
from shoal.server.service import Service
from shoal.server.worker import EngineWorker

DRAIN_SECONDS = 30


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. OSError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return sock


def serve(
    load: Callable[[], LLM],
    *,
    name: str,
    sock: socket.socket,
    parallel: int = 32,
    max_queue: int = 64,
    drain_seconds: int = DRAIN_SECONDS,
    api_key: str | None = None,
    on_start: Callable[[], None] | None = None,
    on_ready: Callable[[LLM], None] | None = None,
) -> bool:
    """Serve one model on a listening socket until SIGTERM or SIGINT, then finish what runs and return.

    The socket answers (503) while the model loads. A second SIGINT ends at once. `on_start` is called when signals are
    handled and the loading begins, `on_ready` (on another thread) when it is done. `parallel` and `max_queue` are
    those of `EngineWorker`.

    Returns:
        False if the engine's thread could not be stopped because it is still loading. It is a daemon, but Python cannot
        end such a thread cleanly: leave the process by `os._exit`.

    Raises:
        whatever `load` raised, after the server has stopped.
    """

    def load_and_tell() -> LLM:
        llm = load()
        if on_ready is not None:
            on_ready(llm)
        return llm

    def give_up() -> None:
        server.should_exit = True

    worker = EngineWorker(load_and_tell, parallel=parallel, max_queue=max_queue, on_failure=give_up)
    host = sock.getsockname()[0]
    hosts = LOOPBACK if host in LOOPBACK else None
    app = create_app(Service(name=name, worker=worker), hosts=hosts, api_key=api_key)
    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=drain_seconds
    )
    server = uvicorn.Server(config)
    with _quiet_signals(give_up), sock:
        if on_start is not None:
            on_start()
        server.run(sockets=[sock])
    if worker.error is not None:
        raise worker.error
    return not worker.alive


@contextlib.contextmanager
def _quiet_signals(stop: Callable[[], None]) -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more after its shutdown; a drained server exits 0 instead."""
    old = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
