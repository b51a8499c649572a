"""`shoal chat` over a scripted engine."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Result, ScriptedLLM

from shoal.formats.checkpoint import GenerationDefaults

Shoal = Callable[..., Result]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def conversation(monkeypatch: pytest.MonkeyPatch, *lines: object) -> None:
    """What the user types; an exception is raised in its place. Ctrl-D at the end."""
    typed = iter([*lines, EOFError()])

    def answer(prompt: str = "") -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)


def test_the_answer_is_all_of_stdout(shoal: Shoal, llm: ScriptedLLM) -> None:
    result = shoal("chat", "What is the capital of France?")
    assert (result.code, result.out) == (0, "Paris.\n")
    assert "prompt 3 tokens, 6.0/s" in result.err
    assert "answer 6 tokens, 20.0/s" in result.err
    assert "peak memory" in result.err
    assert llm.conversations == [[{"role": "user", "content": "What is the capital of France?"}]]


def test_no_stats_leaves_stderr_empty(shoal: Shoal, llm: ScriptedLLM) -> None:
    assert shoal("chat", "--no-stats", "Hi").err == ""


def test_options_reach_the_engine(shoal: Shoal, llm: ScriptedLLM) -> None:
    llm.generation = GenerationDefaults(temperature=0.2, top_p=0.95)
    options = "--model m --adapter a --max-context 64 --threads 2 --top-k 3 --min-p 0.1 --max-tokens 9 --seed 5"
    shoal("chat", *options.split(), "--top-p", "0.5", "--system", "Be brief.", "Hi")
    assert llm.options == {"model": "m", "adapter": Path("a"), "max_context": 64, "threads": 2}
    assert llm.conversations[0][0] == {"role": "system", "content": "Be brief."}
    params = llm.params[0]
    assert (params.top_k, params.min_p, params.max_tokens, params.seed) == (3, 0.1, 9, 5)
    assert (params.temperature, params.top_p) == (0.2, 0.5)  # the model's advice; the command's word over it


def test_without_advice_the_temperature_is_moderate(shoal: Shoal, llm: ScriptedLLM) -> None:
    shoal("chat", "Hi")
    assert llm.params[0].temperature == 0.0
    assert llm.params[0].top_p == 1.0


@pytest.mark.parametrize("args", [["-"], []])
def test_a_pipe_is_the_prompt(shoal: Shoal, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert shoal("chat", *args).out == "Paris.\n"
    assert llm.conversations[0][-1]["content"] == "from a pipe\n"


def test_an_empty_pipe_is_refused(shoal: Shoal, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    result = shoal("chat")
    assert (result.code, result.error) == (2, "prompt: is empty")


def test_reasoning_stays_out_of_stdout(shoal: Shoal, llm: ScriptedLLM) -> None:
    llm.replies = ["<think>hmm</think>\n\nfour"]
    result = shoal("chat", "--no-stats", "2+2")
    assert result.out == "four\n"
    assert result.err == "hmm\n"


def test_json(shoal: Shoal, llm: ScriptedLLM) -> None:
    llm.replies = ["<think>hmm</think>four"]
    result = shoal("chat", "--json", "--no-stats", "2+2")
    data = json.loads(result.out)
    assert (data["text"], data["reasoning"], data["finish_reason"]) == ("four", "hmm", "stop")
    assert (data["prompt_tokens"], data["decode_seconds"]) == (3, 0.25)
    assert data["peak_rss_bytes"] > 1 << 20
    assert result.err == ""


def test_ctrl_c_ends_a_single_answer_with_130(shoal: Shoal, llm: ScriptedLLM) -> None:
    llm.interrupt_after = 2
    result = shoal("chat", "Hi")
    assert (result.code, result.out) == (130, "Pa\n")


def test_a_conversation_remembers(shoal: Shoal, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.replies = ["one", "two", "three"]
    conversation(monkeypatch, "a", "", "b", "/reset", "c")
    result = shoal("chat", "--system", "S", "--no-stats")
    assert (result.code, result.out) == (0, "one\ntwo\nthree\n")
    system = {"role": "system", "content": "S"}
    first, second, third = llm.conversations
    assert first == [system, {"role": "user", "content": "a"}]
    assert second == [*first, {"role": "assistant", "content": "one"}, {"role": "user", "content": "b"}]
    assert third == [system, {"role": "user", "content": "c"}]


def test_exit_leaves(shoal: Shoal, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation(monkeypatch, "/exit", "a")
    assert shoal("chat").code == 0
    assert llm.conversations == []


def test_ctrl_c_stops_a_reply_and_keeps_what_came(
    shoal: Shoal, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.replies, llm.interrupt_after = ["Paris.", "yes"], 3
    conversation(monkeypatch, "a", "b")
    result = shoal("chat", "--no-stats")
    assert (result.code, result.out) == (0, "Par\nyes\n")
    assert "[stopped]" in result.err
    assert llm.conversations[1][1] == {"role": "assistant", "content": "Par"}


def test_ctrl_c_twice_at_the_prompt_leaves(shoal: Shoal, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation(monkeypatch, KeyboardInterrupt(), "a", KeyboardInterrupt(), KeyboardInterrupt(), "b")
    monkeypatch.setattr("shoal.cli.chat.time.monotonic", iter([0.0, 0.0, 100.0, 100.0, 101.0]).__next__)
    assert shoal("chat").code == 130
    assert len(llm.conversations) == 1


def test_a_refused_question_does_not_end_the_conversation(
    shoal: Shoal, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.replies = ["one", "two"]
    conversation(monkeypatch, "a", "too long", "b")
    result = shoal("chat", "--no-stats")
    assert result.out == "one\ntwo\n"
    assert "shoal: error: messages: do not fit (/reset starts over)" in result.err
    assert [message["content"] for message in llm.conversations[1]] == ["a", "one", "b"]


def test_json_needs_a_prompt(shoal: Shoal, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation(monkeypatch)
    result = shoal("chat", "--json")
    assert result.code == 2
    assert "--json needs a prompt" in result.error
