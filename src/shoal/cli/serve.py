"""`shoal serve`."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from shoal.cli.console import DEFAULT_MODEL, human_bytes, note
from shoal.errors import ConfigError
from shoal.settings import SERVE_FLAGS

if TYPE_CHECKING:
    from shoal.engine import LLM
    from shoal.server.app import Policy


class LogKind(str, Enum):
    text = "text"
    json = "json"
    none = "none"


def _flag(flag: str, text: str, *names: str, **limits: Any) -> Any:
    """A flag with its twin in the environment."""
    return typer.Option(*names, envvar=SERVE_FLAGS[flag], help=text, **limits)


def run(
    served: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As --model.")] = None,
    model: Annotated[str, _flag("model", "Short name, folder or GGUF file.", "--model", "-m")] = DEFAULT_MODEL,
    adapter: Annotated[list[str] | None, _flag("adapter", "A LoRA beside it; repeatable.", metavar="NAME=DIR")] = None,
    code: Annotated[str | None, _flag("code", "A model beside it that fills gaps; none, or shoal-code.")] = None,
    host: Annotated[str, _flag("host", "Address to listen on; beyond this machine it takes a key.")] = "127.0.0.1",
    port: Annotated[int, _flag("port", "Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    served_name: Annotated[str | None, _flag("served-name", "Its name in the API; else its own.")] = None,
    api_key: Annotated[list[str] | None, _flag("api-key", "A key that opens every route; may be repeated.")] = None,
    api_key_file: Annotated[Path | None, _flag("api-key-file", "A file with keys, one a line.")] = None,
    admin_key: Annotated[list[str] | None, _flag("admin-key", "What /metrics asks for instead.")] = None,
    without_key: Annotated[bool, _flag("without-key", "Open to the network, keyless.", "--without-key")] = False,
    cors_origin: Annotated[list[str] | None, _flag("cors-origin", "A site whose pages may ask; * is any.")] = None,
    parallel: Annotated[int, _flag("parallel", "Most answers written at once.", min=1, max=1024)] = 32,
    max_queue: Annotated[int, _flag("max-queue", "Most requests that wait; more get 429.", min=0, max=100_000)] = 64,
    request_seconds: Annotated[int, _flag("request-seconds", "Most that a request may take.", min=1)] = 3600,
    drain_seconds: Annotated[int, _flag("drain-seconds", "How long SIGTERM lets answers run.", min=0, max=86_400)] = 30,
    price_per_hour: Annotated[float | None, _flag("price-per-hour", "The machine's price in dollars.", min=0)] = None,
    max_context: Annotated[int | None, _flag("max-context", "Most tokens of prompt and answer.", min=1)] = None,
    threads: Annotated[int | None, _flag("threads", "CPU threads.", min=1, max=1024)] = None,
    pin: Annotated[bool, _flag("pin", "Keep threads that fill the machine apart.", "--pin/--no-pin")] = True,
    log: Annotated[LogKind, _flag("log", "A line for each request, as text or JSON, or none.")] = LogKind.text,
    log_prompts: Annotated[bool, _flag("log-prompts", "Log the bodies of requests too.", "--log-prompts")] = False,
    trace_dir: Annotated[Path | None, _flag("trace-dir", "Record where the tokens go.", metavar="DIR")] = None,
    trace_text: Annotated[bool, _flag("trace-text", "Keep the tokens in those recordings.", "--trace-text")] = False,
) -> None:
    """Serve a model over HTTP with the OpenAI API.

    POST /v1/chat/completions, /v1/completions, /v1/embeddings, /tokenize, /detokenize; GET /v1/models, /health,
    /version, /metrics, /openapi.json, and a page at /. The socket opens before the model is loaded: /health answers 503
    until then. SIGTERM or Ctrl-C finishes the running answers and exits 0. With a key, every route but /health and the
    page's own files asks for it. Beside the default model runs shoal-code, which comes with Shoal: completions that
    have a suffix and name no model are its work.

    [bold]Examples[/bold]
      shoal serve
      shoal serve --model ./DeepSeek-V2-Lite-Chat --port 8080
      shoal serve code
      shoal serve --adapter sql=runs/sql/adapter --adapter mine=runs/mine/adapter
      shoal serve --host 0.0.0.0 --api-key-file keys.txt --log json
      curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": \\[{"role": "user", "content": "Hello"}]}'
    """
    from shoal import hub
    from shoal.cli.trace import Traces
    from shoal.engine import LLM
    from shoal.server.run import bind, places, serve

    model = served or model
    path = hub.resolve(model)  # an unknown name ends here, before a socket is opened
    name = served_name or _name_of(model, path)
    code_name, code_path = _code_model(code, model, name)
    adapters = _adapters(adapter or [], (name, code_name))
    keys = _Keys(api=api_key or [], file=api_key_file, admin=admin_key or [], without=without_key)
    policy = _policy(host, keys, cors_origin or [], log, log_prompts)
    sock = bind(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    say, traces = _Voice(log), Traces(trace_dir, keep_text=trace_text)
    first, others = places(threads, pin)

    def load() -> LLM:
        limits: Any = {"max_context": max_context, "threads": threads, "max_running": parallel, "helpers_on": others}
        llm = LLM(path, **limits)
        for adapter_name, folder in adapters.items():
            llm.load_adapter(adapter_name, folder)
        llm.beside.update({code_name: LLM(code_path, **limits)} if code_name and code_path else {})
        return traces.watch(llm)

    stopped = serve(
        load,
        name=name, sock=sock, adapters=tuple(adapters), code=code_name, parallel=parallel, max_queue=max_queue,
        request_seconds=request_seconds, drain_seconds=drain_seconds, price_per_hour=price_per_hour, policy=policy,
        on_start=lambda: say(f"listening on {address} (loading {name})", "listening", url=address, model=name),
        on_ready=say.ready, engine_on=first, others_on=others,
    )  # fmt: skip
    traces.close()
    say("stopped", "stopped")
    if not stopped:
        sys.stderr.flush()
        os._exit(0)


def _code_model(chosen: str | None, model: str, taken: str) -> tuple[str | None, Path | None]:
    """Name and place of the model that fills gaps beside `model`, whose name is taken."""
    from shoal import hub

    code = chosen or ("shoal-code" if model == DEFAULT_MODEL else "none")
    if code == "none":
        return None, None
    path = hub.resolve(code)
    name = _name_of(code, path)
    if name == taken:
        raise ConfigError("code", f"the name {name!r} is taken by the served model; --served-name gives it another")
    return name, path


def _name_of(model: str, path: Path) -> str:
    """What the API calls a model: its short name, or the last part of its path; clients need not see the rest."""
    return model if not Path(model).exists() else path.stem if path.is_file() else path.resolve().name


def _adapters(given: list[str], taken: tuple[str | None, ...]) -> dict[str, Path]:
    """Folders by name."""
    out: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ConfigError("adapter", f"{text!r} is not NAME=DIR")
        if name in out or name in taken:
            raise ConfigError("adapter", f"the name {name!r} is taken")
        out[name] = Path(folder)
    return out


class _Keys(NamedTuple):
    api: list[str]
    file: Path | None
    admin: list[str]
    without: bool


def _policy(host: str, keys: _Keys, origins: list[str], log: LogKind, log_prompts: bool) -> Policy:
    """Who may ask. ConfigError where that would be everybody on the network, unless that was said."""
    from shoal.server.app import Policy
    from shoal.server.keys import Keys, read_keys
    from shoal.server.run import is_loopback

    known = Keys([*keys.api, *(read_keys(keys.file) if keys.file is not None else [])])
    if not (known or keys.without or is_loopback(host)):
        raise ConfigError("host", f"{host} opens the server to the network: give an --api-key, or say --without-key")
    return Policy(
        keys=known, admin_keys=Keys(keys.admin, name="admin-key"), origins=frozenset(origins), log=log.value,
        log_prompts=log_prompts,
    )  # fmt: skip


class _Voice:
    """Says what happens to the server, in the form of its log."""

    def __init__(self, kind: LogKind) -> None:
        self._kind = kind

    def __call__(self, text: str, event: str, **fields: object) -> None:
        from shoal.server.journal import log as write_log

        if self._kind is LogKind.json:
            write_log("json", event, **fields)
        else:
            note(f"shoal: {text}", dim=False)

    def ready(self, llm: LLM) -> None:
        from shoal.cli.machine import peak_rss_bytes

        memory = peak_rss_bytes()
        text = f"ready, {llm.max_context} tokens of context, {human_bytes(memory)} of memory"
        self(text, "ready", max_context=llm.max_context, memory_bytes=memory)
