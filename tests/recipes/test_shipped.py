"""The model that comes with Shoal, as it lies in the package: it knows Python, fills gaps, and others read it."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
import xllamacpp

from shoal import hub
from shoal.engine import LLM, SamplingParams
from shoal.formats.convert import convert
from shoal.formats.fim import fim_prompt

PROMPTS = [
    "import os\n\n\ndef read_file(path):\n    with open(path, ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.",
    "for i in range(",
    "def main():\n    parser = argparse.ArgumentParser(",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def exact() -> LLM:
    """Without rounding of its own: what others compute from the same file."""
    return LLM("code", weights="f32", cache="f32", threads=2)


@pytest.fixture(scope="module")
def expected(exact: LLM) -> list[list[int]]:
    return [ids_of(exact, prompt) for prompt in PROMPTS]


def ids_of(llm: LLM, prompt: str) -> list[int]:
    return [token for chunk in llm.stream(prompt, GREEDY) for token in chunk.token_ids]


def test_it_is_here_small_and_says_what_it_is():
    folder = hub.resolve("code")
    assert folder == hub.resolve("shoal-code") == hub.pull("code")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "license: apache-2.0" in card


def test_it_knows_python():
    """Bits a byte on text that it has not seen, Python's own textwrap: noise costs 8, its tokens by frequency 4."""
    llm = LLM("code")
    ids = llm.tokenizer.encode(inspect.getsource(textwrap))[: llm.max_context]
    lost = -sum(entry.logprob for entry in llm.score(ids)[1:])
    bits = lost / math.log(2) / len(llm.tokenizer.decode(ids).encode())
    assert bits < 2.0


def test_rounding_changes_little(exact):
    """The packed kernels against exact arithmetic on the same weights, in nats a token."""
    llm = LLM("code")
    ids = llm.tokenizer.encode(inspect.getsource(textwrap))[:256]
    one, two = (sum(entry.logprob for entry in model.score(ids)[1:]) / len(ids) for model in (llm, exact))
    assert abs(one - two) < 0.02


@pytest.mark.parametrize(
    ("prefix", "suffix", "line"),
    [
        ("import logging\n\nlogger = logging.get", "\n\n\ndef main():\n    logger.info('x')\n", "Logger(__name__)"),
        (
            "def load(self, key, default=None):\n    try:\n        return self._data[key]\n    except Key",
            "\n        return default\n",
            "Error:",
        ),
    ],
)
def test_it_fills_gaps_that_everybody_would_fill_alike(prefix, suffix, line):
    llm = LLM("code")
    ids = fim_prompt(llm.tokenizer, *(llm.tokenizer.encode(text, add_bos=False) for text in (prefix, suffix)))
    assert ids is not None
    assert llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=16, stop=("\n",))).text == line


def test_llama_cpp_writes_the_same(expected, tmp_path: Path):
    convert(hub.resolve("code"), tmp_path / "code.gguf", dtype="F32")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(tmp_path / "code.gguf"), 256, False
    params.n_parallel, params.cpuparams.n_threads = 1, 2
    server = xllamacpp.Server(params)
    llm = LLM(tmp_path / "code.gguf", weights="f32", cache="f32", threads=2)
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        body = {"prompt": llm.tokenizer.encode(prompt), "n_predict": 16, "temperature": 0, "return_tokens": True}
        answer = server.handle_completions({**body, "cache_prompt": False})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        text = answer.get("content", answer.get("choices", [{}])[0].get("text"))
        assert text == llm.tokenizer.decode(ids) == llm.tokenizer.decode(ids_of(llm, prompt))


def test_transformers_writes_the_same(expected, tmp_path: Path):
    convert(hub.resolve("code"), tmp_path / "code", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "code", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "code")
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        asked = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            out = theirs.generate(asked, max_new_tokens=16, do_sample=False, pad_token_id=2)
        written = out[0, asked.shape[1] :].tolist()
        assert written[: len(ids)] == ids
