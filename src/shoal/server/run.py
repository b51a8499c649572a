"""Running the application on a socket until a signal ends it."""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import uvicorn
from starlette.types import ASGIApp

from shoal import settings
from shoal.engine import LLM
from shoal.engine.expert_load import ExpertLoad
from shoal.machine import processors, stay_on, usable_cpus
from shoal.server.app import Policy, create_app
from shoal.server.guard import LOOPBACK
from shoal.server.protocol_http import PatientProtocol
from shoal.server.service import Service
from shoal.server.worker import EngineWorker

DRAIN_SECONDS = 30
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection, which else may meet its end with a request


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


def uvicorn_config(app: ASGIApp, *, drain_seconds: int) -> uvicorn.Config:
    """One connection's manners: bounds on heads and idleness, no log but our own."""
    return uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=drain_seconds,
        http=PatientProtocol, timeout_keep_alive=KEEP_ALIVE_SECONDS, ws="none", lifespan="on",
    )  # fmt: skip


def serve(
    load: Callable[[], LLM],
    *,
    name: str,
    sock: socket.socket,
    parallel: int = 32,
    max_queue: int = 64,
    request_seconds: float = float("inf"),
    drain_seconds: int = DRAIN_SECONDS,
    price_per_hour: float | None = None,
    adapters: tuple[str, ...] = (),
    code: str | None = None,
    policy: Policy | None = None,
    on_start: Callable[[], None] | None = None,
    on_ready: Callable[[LLM], None] | None = None,
    engine_on: Collection[int] = (),
    others_on: Collection[int] = (),
) -> bool:
    """Serve one model on a listening socket until SIGTERM or SIGINT, then finish what runs and return.

    The socket answers (503) while the model loads. A second SIGINT ends at once. `on_start` is called when signals are
    handled and the loading begins, `on_ready` (on another thread) when it is done. `parallel`, `max_queue` and
    `request_seconds` are those of `EngineWorker`; `adapters` are those of the model, `code` is the name in `LLM.beside`
    of one that fills gaps. `engine_on` and `others_on` are those of `places`. A server on a loopback address answers to
    loopback names only.

    Returns:
        False if the engine's thread could not be stopped because it is still loading. It is a daemon, but Python cannot
        end such a thread cleanly: leave the process by `os._exit`.

    Raises:
        whatever `load` raised, after the server has stopped.
    """

    loop_thread = threading.get_native_id()
    before = processors() if others_on else []

    def load_and_tell() -> LLM:
        llm = load()
        if llm.config.moe is not None:
            llm.expert_load = ExpertLoad(llm.config)
        gc.collect()
        gc.freeze()  # what is here now stays: looking through it again would cost a hundredth of the time
        stay_on(engine_on)
        stay_on(others_on, loop_thread)
        if on_ready is not None:
            on_ready(llm)
        return llm

    def give_up() -> None:
        server.should_exit = True

    worker = EngineWorker(
        load_and_tell, parallel=parallel, max_queue=max_queue, seconds=request_seconds, on_failure=give_up
    )
    hosts = LOOPBACK if is_loopback(sock.getsockname()[0]) else None
    app = create_app(
        Service(name=name, worker=worker, adapters=adapters, code=code, price_per_hour=price_per_hour),
        replace(policy or Policy(), hosts=hosts),
    )
    server = uvicorn.Server(uvicorn_config(app, drain_seconds=drain_seconds))
    with _quiet_signals(give_up), sock:
        if on_start is not None:
            on_start()
        try:
            server.run(sockets=[sock])
        finally:
            gc.unfreeze()
            stay_on(before, loop_thread)
    if worker.error is not None:
        raise worker.error
    return not worker.alive


def places(threads: int | None, pin: bool = True) -> tuple[list[int], list[int]]:
    """Processors for the thread that steps the engine, and for all others of the server; none, which is any, unless the
    engine's team fills the machine.

    The team meets at a barrier several times a layer. Where the system moves its threads freely it puts two of them on
    one processor again and again, as long as others (the event loop, a client) come and go on the next one."""
    all_of_them = processors()
    team = threads or settings.threads() or usable_cpus()
    if not pin or len(all_of_them) < 2 or team != len(all_of_them):
        return [], []
    return all_of_them[:1], all_of_them[1:]


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; `localhost` is."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _quiet_signals(stop: Callable[[], None]) -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more after its shutdown; a drained server exits 0 instead."""
    old = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
