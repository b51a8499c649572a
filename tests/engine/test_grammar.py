"""Answers under a grammar: random models, which say anything, say what the grammar wants and stop where it ends."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from tests.engine.conftest import V3, Checkpoint, TinyTokenizer, assert_idle, open_tiny, tiny

from shoal import LLM, SamplingParams
from shoal.errors import RequestError


class GrammarTokenizer(TinyTokenizer):
    """All of printable ASCII, a piece of a character, and a control token, `<96>`."""

    def __init__(self) -> None:
        self._bytes = [bytes([32 + i]) for i in range(95)] + [b"\xc3", b"<96>"]

    def encode_piece(self, text: str) -> list[int]:
        return [self._bytes.index(bytes([byte])) for byte in text.encode() if bytes([byte]) in self._bytes]

    def is_control(self, token: int) -> bool:
        return token == 96


def checkpoint() -> Checkpoint:
    return replace(tiny(V3)[1], load_tokenizer=GrammarTokenizer)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return open_tiny(checkpoint(), speculate=3)


PROMPT = [5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}, "n": {"enum": [1, 23]}},
    "required": ["on", "kind", "n"],
    "additionalProperties": False,
}
LARK = f"start: %json {json.dumps(SCHEMA)}"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_json_keeps_to_its_schema_and_ends_there(llm: LLM, seed: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=seed, grammar=LARK, max_tokens=200)
    done = llm.generate(PROMPT, params)
    if done.finish_reason == "length":  # white space between the parts is free, and hot models like it
        assert temperature > 0 and not done.text.strip().endswith("}")
        return
    value = json.loads(done.text)
    assert set(value) == {"on", "kind", "n"} and value["kind"] in ("cat", "dog") and value["n"] in (1, 23)
    assert done.text.endswith("}")
    assert_idle(llm)


def test_a_regex_is_matched_whole_without_an_end_token(llm: LLM) -> None:
    """The model has no end-of-text token at all: the grammar's end is the text's."""
    for seed in range(10):
        done = llm.generate(PROMPT, SamplingParams(seed=seed, grammar="start: /[0-9]{4}-[01][0-9]/", max_tokens=50))
        assert re.fullmatch(r"[0-9]{4}-[01][0-9]", done.text)
        assert (done.finish_reason, len(done.token_ids)) == ("stop", 7)


def test_speculation_and_neighbours_change_no_constrained_answer(llm: LLM) -> None:
    plain = open_tiny(checkpoint())
    params = SamplingParams(seed=3, grammar='start: ("abc" /[xyz]/)+', max_tokens=40)
    assert llm.generate(PROMPT * 9, params).token_ids == plain.generate(PROMPT * 9, params).token_ids


def test_a_limit_cuts_a_grammar_with_reason_length(llm: LLM) -> None:
    done = llm.generate(PROMPT, SamplingParams(grammar="start: /[0-9]{40}/", max_tokens=6))
    assert (done.finish_reason, len(done.text)) == ("length", 6)


def test_a_grammar_may_begin_behind_a_token(llm: LLM) -> None:
    bias = {96: 100.0}  # the token comes at once; from then on the bias cannot force it
    params = SamplingParams(grammar="start: /[ab]{3}/", grammar_after=96, logit_bias=bias, max_tokens=20)
    done = llm.generate(PROMPT, params)
    assert done.token_ids[0] == 96
    assert re.fullmatch("[ab]{3}", done.text.removeprefix("<96>"))
    assert done.finish_reason == "stop"


def test_control_tokens_come_only_where_a_grammar_names_them(llm: LLM) -> None:
    assert llm.generate(PROMPT, SamplingParams(grammar='start: "a" <[96]> "b"')).token_ids[1] == 96
    spelt = llm.generate(PROMPT, SamplingParams(grammar='start: "<96>"')).token_ids
    assert 96 not in spelt and len(spelt) == 4


def test_log_probabilities_stay_the_model_s_own(llm: LLM) -> None:
    free = llm.generate(PROMPT, SamplingParams(temperature=0, logprobs=1, max_tokens=1)).logprobs[0]
    held = llm.generate(PROMPT, SamplingParams(temperature=0, logprobs=1, grammar='start: "Q"')).logprobs[0]
    assert held.top[0] == free.top[0]
    assert held.logprob < free.logprob


@pytest.mark.parametrize(
    "grammar", ["", "start: (", "start: /(?<=a)b/", "start: /(/", "start: %json false", "start: start", "nonsense"]
)
def test_a_bad_grammar_is_refused_before_anything_runs(llm: LLM, grammar: str) -> None:
    with pytest.raises(RequestError) as bad:
        llm.generate(PROMPT, SamplingParams(grammar=grammar))
    assert (bad.value.param, bad.value.code) == ("grammar", "invalid_grammar")
    assert len(str(bad.value)) < 400 and "\n" not in str(bad.value)


def test_a_grammar_that_the_vocabulary_cannot_write_fails_by_name(llm: LLM) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate(PROMPT, SamplingParams(grammar='start: "snow ☃"'))
    assert_idle(llm)


def test_a_grammar_and_ignore_eos_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(grammar='start: "a"', ignore_eos=True)
