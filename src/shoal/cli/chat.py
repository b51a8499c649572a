"""`shoal chat`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal import settings
from shoal.cli.console import DEFAULT_MODEL, aside, human_bytes, note, write_json
from shoal.errors import RequestError

if TYPE_CHECKING:
    from shoal.engine import LLM, SamplingParams, Stats

# Used where neither the command nor the model's own generation_config.json says anything.
TEMPERATURE = 0.0
HELP = "/reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops a reply"


def run(
    prompt: Annotated[
        str | None, typer.Argument(help="The question; - or a pipe reads it from stdin; none starts a conversation.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, Hugging Face folder or GGUF file.")
    ] = DEFAULT_MODEL,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A LoRA (PEFT folder) to run with it.")] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="Instructions before the conversation.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: what the model recommends, else 0.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus: keep the likeliest tokens up to this sum.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Most tokens of a whole conversation.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: answer, counts, speeds.")] = False,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Speed and memory on stderr.")] = True,
) -> None:
    """Talk to a model, one question or a conversation.

    The answer goes to stdout as it is made; reasoning, speed and memory go to stderr.

    [bold]Examples[/bold]
      shoal chat "What is the capital of France?"
      git diff | shoal chat --system "Write a commit message for this diff."
      shoal chat --model ./DeepSeek-V2-Lite-Chat --temperature 0
      shoal chat --json --no-stats "Name three primes" | jq -r .text
    """
    question = _question(prompt)
    if question is None and as_json:
        raise typer.BadParameter("--json needs a prompt")
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    _sampling(given)  # a wrong number is cheaper to find before the model is loaded
    llm = _load(model, adapter=adapter, max_context=max_context, threads=threads or settings.threads())
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if given[name] is None:
            given[name] = getattr(llm.generation, name)
    if given["temperature"] is None:
        given["temperature"] = TEMPERATURE
    params = _sampling(given)
    messages = [{"role": "system", "content": system}] if system else []
    if question is None:
        _conversation(llm, messages, params, stats=stats)
        return
    reply = _Reply(llm, [*messages, {"role": "user", "content": question}], params, quiet=as_json)
    reply.take()
    if as_json:
        write_json(reply.as_json(llm.name))
    if stats:
        note(reply.summary())


def _question(prompt: str | None) -> str | None:
    """The prompt from the command line or from stdin; None where a conversation is wanted."""
    if prompt is None and sys.stdin.isatty():
        return None
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    assert text is not None
    if not text.strip():
        raise RequestError("prompt", "is empty")
    return text


def _sampling(given: dict[str, Any]) -> SamplingParams:
    from shoal.engine import SamplingParams

    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _load(model: str, **options: Any) -> LLM:
    from rich.console import Console
    from rich.markup import escape

    from shoal.engine import LLM

    with Console(stderr=True).status(escape(f"loading {model}")):  # shows on a terminal, and passes
        return LLM(model, **options)


class _Reply:
    """One answer: shown as it comes unless `quiet`, and kept. RequestError at once if it cannot be given."""

    def __init__(
        self, llm: LLM, messages: list[dict[str, str]], params: SamplingParams, *, quiet: bool = False
    ) -> None:
        from shoal.formats.reasoning import ReasoningSplitter

        ids = llm.encode_chat(messages)
        assert llm.chat_format is not None  # encode_chat has seen to that
        self._splitter = ReasoningSplitter(llm.chat_format.starts_in_reasoning(llm.tokenizer, ids))
        self._chunks = llm.prepare(ids, params, continuing=False).chunks()
        self.text = ""
        self.reasoning = ""
        self.finish_reason: str | None = None
        self.stats: Stats | None = None
        self._quiet = quiet

    def take(self) -> None:
        """Run the generation to its end. Ctrl-C closes it and comes through; what had come by then is kept."""
        try:
            for chunk in self._chunks:
                pieces = self._splitter.push(chunk.text)
                if chunk.finish_reason is not None:
                    pieces += self._splitter.flush()
                    self.finish_reason, self.stats = chunk.finish_reason, chunk.stats
                for part, text in pieces:
                    self._show(part, text)
        finally:
            self._chunks.close()
            if not self._quiet:
                sys.stdout.write("\n")
                sys.stdout.flush()

    def _show(self, part: str, text: str) -> None:
        if part == "reasoning":
            self.reasoning += text
            if not self._quiet:
                aside(text)
            return
        if not self._quiet:
            if self.reasoning and not self.text:
                aside("\n")
            sys.stdout.write(text)
            sys.stdout.flush()
        self.text += text

    def as_json(self, model: str) -> dict[str, Any]:
        from shoal.cli.machine import peak_rss_bytes

        assert self.stats is not None
        return {
            "model": model,
            "text": self.text,
            "reasoning": self.reasoning or None,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.stats.prompt_tokens,
            "completion_tokens": self.stats.completion_tokens,
            "prompt_seconds": self.stats.prompt_seconds,
            "decode_seconds": self.stats.decode_seconds,
            "prompt_tokens_per_second": self.stats.prompt_tok_s,
            "decode_tokens_per_second": self.stats.decode_tok_s,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def summary(self) -> str:
        from shoal.cli.machine import peak_rss_bytes

        assert self.stats is not None
        stats = self.stats
        known = f" ({stats.cached_tokens} known already)" if stats.cached_tokens else ""
        parts = [
            f"prompt {stats.prompt_tokens} tokens{known}, {stats.prompt_tok_s:.1f}/s",
            f"answer {stats.completion_tokens} tokens, {stats.decode_tok_s:.1f}/s",
            f"first token {stats.first_token_seconds:.2f} s",
            f"peak memory {human_bytes(peak_rss_bytes())}",
        ]
        if self.finish_reason == "length":
            parts.append("cut off at the token limit")
        return f"[{' · '.join(parts)}]"


def _conversation(llm: LLM, messages: list[dict[str, str]], params: SamplingParams, *, stats: bool) -> None:
    """Questions from the terminal until /exit, Ctrl-D, or two Ctrl-C in a row at the prompt."""
    import contextlib

    with contextlib.suppress(ImportError):  # line editing and the questions so far on the arrow keys
        import readline  # noqa: F401
    opening = list(messages)
    note(f"{llm.name}: {HELP}")
    interrupted_at = -10.0
    while True:
        try:
            line = _ask().strip()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            if time.monotonic() - interrupted_at < 2:
                raise
            interrupted_at = time.monotonic()
            note("\nCtrl-C again leaves")
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages[:] = opening
            note("a new conversation")
        elif line.startswith("/"):
            note(HELP)
        elif line:
            _turn(llm, messages, line, params, stats=stats)


def _ask() -> str:
    """A line from the user. Only a terminal sees the prompt: stdout may be a file."""
    if sys.stdout.isatty():
        return input("> ")
    aside("> ")
    return input()


def _turn(llm: LLM, messages: list[dict[str, str]], line: str, params: SamplingParams, *, stats: bool) -> None:
    """One question and its answer, both added to `messages`; a refused question is not."""
    question = {"role": "user", "content": line}
    try:
        reply = _Reply(llm, [*messages, question], params)
    except RequestError as error:
        note(f"shoal: error: {error}" + (" (/reset starts over)" if messages else ""), dim=False)
        return
    try:
        reply.take()
    except KeyboardInterrupt:
        note("[stopped]")
    messages += [question, {"role": "assistant", "content": reply.text}]
    if stats and reply.stats is not None:
        note(reply.summary())
