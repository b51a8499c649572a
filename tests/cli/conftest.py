"""Runs the command line in this process, with a scripted engine where no model is needed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.cli.main import main
from shoal.engine import Chunk, SamplingParams, Stats
from shoal.errors import RequestError
from shoal.formats.checkpoint import GenerationDefaults


class Format:
    def starts_in_reasoning(self, tokenizer: object, ids: Sequence[int]) -> bool:
        return False


class ScriptedLLM:
    """Answers with the next of `replies`; `interrupt_after` chunks, the user presses Ctrl-C."""

    name = "scripted"
    tokenizer = None
    chat_format = Format()
    replies: list[str]
    generation = GenerationDefaults()

    def __init__(self, model: Any = None, **options: Any) -> None:
        self.options = options
        self.replies = ["Paris."]
        self.interrupt_after: int | None = None
        self.conversations: list[list[dict[str, str]]] = []
        self.params: list[SamplingParams] = []

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if messages[-1]["content"] == "too long":
            raise RequestError("messages", "do not fit", code="context_length_exceeded")
        self.conversations.append([dict(message) for message in messages])
        return [1, 2, 3]

    def prepare(self, ids: list[int], params: SamplingParams, *, continuing: bool) -> SimpleNamespace:
        assert not continuing, "an answer is a text of its own"
        self.params.append(params)
        reply = self.replies.pop(0)
        return SimpleNamespace(chunks=lambda: self._run(reply))

    def _run(self, reply: str) -> Generator[Chunk, None, None]:
        for count, char in enumerate(reply):
            if count == self.interrupt_after:
                self.interrupt_after = None
                raise KeyboardInterrupt
            yield Chunk(text=char, token_ids=(ord(char),))
        stats = Stats(prompt_tokens=3, completion_tokens=len(reply), prompt_seconds=0.5, decode_seconds=0.25)
        yield Chunk(finish_reason="stop", stats=stats)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> ScriptedLLM:
    """The engine that `shoal chat` will get."""
    scripted = ScriptedLLM()

    def open_it(model: Any, **options: Any) -> ScriptedLLM:
        scripted.options = {"model": model, **options}
        return scripted

    monkeypatch.setattr("shoal.engine.LLM", open_it)
    return scripted


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The one line that a failed command prints, and nothing else anywhere."""
        assert self.out == ""
        assert self.err.startswith("shoal: error: ")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("shoal: error: ").rstrip("\n")


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*args: str) -> Result:
        with pytest.raises(SystemExit) as end:
            main(args)
        code = end.value.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
