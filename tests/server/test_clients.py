"""Real clients and conformance suites against a running server. They are heavy: `make test-clients` installs them, and
each test says why it is skipped where its client is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tests.server.conftest import Running

HELLO = [{"role": "user", "content": "Hi"}]
REPLY = "Hello, wörld"
NODE_CLIENT = """
const OpenAI = require("openai").default;
(async () => {
  const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
  const messages = [{ role: "user", content: "Hi" }];
  const whole = await client.chat.completions.create({ model: "fake", messages });
  let streamed = "";
  const stream = await client.chat.completions.create({ model: "fake", messages, stream: true });
  for await (const chunk of stream) streamed += chunk.choices[0]?.delta?.content ?? "";
  let refusal = null;
  try { await client.chat.completions.create({ model: "fake", messages, temperature: -1 }); }
  catch (error) { refusal = [error.status, error.param]; }
  const models = (await client.models.list()).data.map((model) => model.id);
  console.log(JSON.stringify([whole.choices[0].message.content, streamed, refusal, models]));
})();
"""


def test_openai_for_node(server: Running) -> None:
    node = shutil.which("node")
    modules = Path(os.environ.get("NODE_MODULES", ".node/node_modules")).resolve()
    if node is None or not (modules / "openai").is_dir():
        pytest.skip("needs node, and the npm package openai in .node (make test-clients)")
    done = subprocess.run(
        [node, "-e", NODE_CLIENT, "client", f"{server.url}/v1"],
        env={**os.environ, "NODE_PATH": str(modules)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [REPLY, REPLY, [400, "temperature"], ["fake"]]


def test_litellm(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a price list
    litellm = pytest.importorskip("litellm")
    options = {"model": "openai/fake", "messages": HELLO, "api_base": f"{server.url}/v1", "api_key": "none"}
    answer = litellm.completion(**options)
    assert (answer.choices[0].message.content, answer.usage.total_tokens) == (REPLY, 15)
    events = list(litellm.completion(**options, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == REPLY
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**options, temperature=-1)


def test_langchain(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("langchain_openai")
    monkeypatch.setattr(server.llm, "max_context", 1000)  # tools are described in words
    chat = module.ChatOpenAI(model="fake", base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = chat.invoke("Hi")
    assert (answer.content, answer.usage_metadata["output_tokens"]) == (REPLY, 13)
    assert "".join(chunk.content for chunk in chat.stream("Hi")) == REPLY
    assert chat.bind_tools([{"name": "f", "description": "f", "parameters": {"type": "object"}}]).invoke("Hi").content


def test_lm_eval(server: Running, tmp_path: Path) -> None:
    """A multiple-choice task of its own: `echo` with `logprobs`. The fake model holds the alphabet's next letter to be
    likeliest, so it answers every question right."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    rows = [{"q": "a", "choices": ["b", "x"], "gold": 0}, {"q": "m", "choices": ["c", "n"], "gold": 1}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        "task: next_letter\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n"
    )
    # It brings a tokenizer of its own: bytes, as the fake model has them. Those that do not print have letters from 256
    # on, in their order.
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printed]
    alphabet = {chr(byte if byte in printed else 256 + hidden.index(byte)): byte for byte in range(256)}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}')
    options = (
        f"model=fake,base_url={server.url}/v1/completions,num_concurrent=1,max_retries=1,"
        f"tokenizer_backend=huggingface,tokenizer={tmp_path}"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", options, "--tasks",
            "next_letter", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert results["results"]["next_letter"]["acc,none"] == 1.0


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis(server: Running, tmp_path: Path, mode: str) -> None:
    """Requests made from our own document: those that fit it are never a fault of the server, and those that do not are
    refused; every answer is one that the document tells of."""
    pytest.importorskip("schemathesis")
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "schemathesis.cli"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    if mode == "negative":
        checks += ",negative_data_rejection"
    done = subprocess.run(
        [
            *command, "run", f"{server.url}/openapi.json", "--mode", mode, "--phases", "examples,coverage,fuzzing",
            "--max-examples", "25", "--checks", checks, "--request-timeout", "20", "--no-color",
        ],
        capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-500:]
    assert server.http.get("/health").status_code == 200
