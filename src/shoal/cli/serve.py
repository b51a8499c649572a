"""`shoal serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.console import DEFAULT_MODEL, human_bytes, note

if TYPE_CHECKING:
    from shoal.engine import LLM


def run(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, Hugging Face folder or GGUF file.")
    ] = DEFAULT_MODEL,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A LoRA (PEFT folder) to run with it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    served_name: Annotated[
        str | None, typer.Option(help="The model's name in the API. Default: the short name, or the file's name.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=1024, help="Most answers that are written at once, token by token together.")
    ] = 32,
    max_queue: Annotated[
        int, typer.Option(min=0, max=100_000, help="Most requests that wait; more get 429 and Retry-After.")
    ] = 64,
    drain_seconds: Annotated[
        int, typer.Option(min=0, max=86_400, help="After SIGTERM, how long running answers may take to finish.")
    ] = 30,
    max_context: Annotated[int | None, typer.Option(min=1, help="Most tokens of prompt and answer together.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.")] = None,
    trace_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Record which experts the tokens go to (see `shoal trace`).")
    ] = None,
    trace_text: Annotated[bool, typer.Option("--trace-text", help="Keep the tokens in those recordings.")] = False,
) -> None:
    """Serve a model over HTTP with the OpenAI API.

    POST /v1/chat/completions and /v1/completions, GET /v1/models, /health, /version. The socket opens before the model
    is loaded: /health answers 503 until then. SIGTERM or Ctrl-C finishes the running answers and exits 0. With
    SHOAL_API_KEY set, every route but /health asks for that key.

    [bold]Examples[/bold]
      shoal serve
      shoal serve --model ./DeepSeek-V2-Lite-Chat --port 8080
      curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": \\[{"role": "user", "content": "Hello"}]}'
    """
    from shoal import hub, settings
    from shoal.cli.trace import Traces
    from shoal.engine import LLM
    from shoal.server.run import bind, serve

    path = hub.resolve(model)  # an unknown name ends here, before a socket is opened
    name = served_name or (model if not Path(model).exists() else path.stem if path.is_file() else path.resolve().name)
    sock = bind(host, port)
    traces = Traces(trace_dir, keep_text=trace_text)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{sock.getsockname()[1]}"

    def ready(llm: LLM) -> None:
        from shoal.cli.machine import peak_rss_bytes

        note(f"shoal: ready, {llm.max_context} tokens of context, {human_bytes(peak_rss_bytes())} of memory", dim=False)

    stopped = serve(
        lambda: traces.watch(
            LLM(
                path,
                adapter=adapter,
                max_context=max_context,
                threads=threads or settings.threads(),
                max_running=parallel,
            )
        ),
        name=name,
        sock=sock,
        parallel=parallel,
        max_queue=max_queue,
        drain_seconds=drain_seconds,
        api_key=settings.api_key(),
        on_start=lambda: note(f"shoal: listening on {address} (loading {name})", dim=False),
        on_ready=ready,
    )
    traces.close()
    note("shoal: stopped", dim=False)
    if not stopped:
        sys.stderr.flush()
        os._exit(0)
