"""The official Python client, told to reject any answer that is not exactly of its types."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest
from tests.server.conftest import Running

HELLO = [{"role": "user", "content": "Hi"}]


def test_chat(server: Running) -> None:
    answer = server.openai.chat.completions.create(model="fake", messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello, wörld", "stop")
    assert choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 13, 15)
    assert answer.system_fingerprint.startswith("fp_")


def test_chat_stream_spells_the_same_text(server: Running) -> None:
    events = list(server.openai.chat.completions.create(model="fake", messages=HELLO, stream=True))
    assert len({event.id for event in events}) == 1
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == "Hello, wörld"
    assert [event.choices[0].finish_reason for event in events[-2:]] == [None, "stop"]
    assert all(event.usage is None for event in events)


def test_chat_stream_ends_with_usage_on_request(server: Running) -> None:
    events = list(
        server.openai.chat.completions.create(
            model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert events[-1].choices == []
    assert events[-1].usage.total_tokens == 15
    assert all(event.usage is None for event in events[:-1])


def test_chat_splits_reasoning_from_the_answer(server: Running) -> None:
    server.llm.reply = "<think>two and two</think>\n\nfour"
    message = server.openai.chat.completions.create(model="fake", messages=HELLO).choices[0].message
    assert message.content.strip() == "four"
    assert message.reasoning_content.strip() == "two and two"
    events = list(server.openai.chat.completions.create(model="fake", messages=HELLO, stream=True))
    deltas = [event.choices[0].delta for event in events]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content


def test_chat_logprobs(server: Running) -> None:
    choice = (
        server.openai.chat.completions.create(model="fake", messages=HELLO, logprobs=True, top_logprobs=2)
    ).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 13
    assert (entries[0].token, entries[0].bytes, entries[0].logprob) == ("H", [72], -0.25)
    assert [(top.token, top.logprob) for top in entries[0].top_logprobs] == [("A", -0.5), ("B", -1.5)]
    half = next(entry for entry in entries if entry.bytes == [0xC3])
    assert half.token == "bytes:\\xc3"
    assert next(entry for entry in entries if entry.token == "w").logprob == -9999.0  # minus infinity
    streamed = server.openai.chat.completions.create(
        model="fake", messages=HELLO, logprobs=True, top_logprobs=2, stream=True
    )
    parts = [event.choices[0].logprobs for event in streamed]
    assert [entry for part in parts if part for entry in part.content] == entries


def test_chat_choices_have_their_own_seeds_and_share_the_prompt(server: Running) -> None:
    answer = server.openai.chat.completions.create(model="fake", messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [params.seed for _, params in server.llm.asked] == [7, 8, 9]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 39)


def test_chat_passes_sampling_on(server: Running) -> None:
    server.openai.chat.completions.create(
        model="fake",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=4,
        stop=["a", "b"],
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "no_such_field": 1},
    )
    _, params = server.llm.asked[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.max_tokens, params.stop, params.logit_bias) == (4, ("a", "b"), {7: -100.0})
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)


def test_chat_messages_reach_the_template_as_plain_text(server: Running) -> None:
    server.openai.chat.completions.create(
        model="fake",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        extra_body={"chat_template_kwargs": {"thinking": True, "messages": "evil", "tokenize": True}},
    )
    assert server.llm.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]
    assert server.llm.options == {"thinking": True}


def test_a_limit_cuts_with_reason_length(server: Running) -> None:
    choice = server.openai.chat.completions.create(model="fake", messages=HELLO, max_tokens=5).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello", "length")


def test_completion(server: Running) -> None:
    answer = server.openai.completions.create(model="fake", prompt="ab")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "Hello, wörld"
    assert answer.choices[0].finish_reason == "stop"
    assert server.llm.asked[-1][1].max_tokens == 16


def test_completion_takes_ids_and_lists(server: Running) -> None:
    for prompt, expected in (
        ([72, 105], [[72, 105]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ):
        server.llm.asked.clear()
        answer = server.openai.completions.create(model="fake", prompt=prompt)
        assert [ids for ids, _ in server.llm.asked] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert answer.usage.prompt_tokens == sum(map(len, expected))


def test_completion_stream(server: Running) -> None:
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    # The client's own type of a streamed completion forbids the null finish_reason that OpenAI's servers send.
    lenient = server.openai.copy(_extra_kwargs={"_strict_response_validation": False})
    events = list(lenient.completions.create(model="fake", prompt="ab", stream=True))
    assert [event.choices[0].finish_reason for event in events[-2:]] == [None, "stop"]
    assert "".join(event.choices[0].text for event in events) == "Hello, wörld"


def test_completion_logprobs(server: Running) -> None:
    logprobs = server.openai.completions.create(model="fake", prompt="ab", logprobs=1).choices[0].logprobs
    assert logprobs.tokens[:3] == ["H", "e", "l"]
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11]
    assert logprobs.token_logprobs[0] == -0.25
    assert logprobs.top_logprobs[0] == {"A": -0.5, "H": -0.25}


def test_echo_scores_the_prompt(server: Running) -> None:
    response = server.http.post(
        "/v1/completions", json={"prompt": "abx", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    )
    choice = response.json()["choices"][0]
    assert choice["text"] == "abxH"
    assert choice["logprobs"]["tokens"] == ["a", "b", "x", "H"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -22.0, -0.25]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert set(choice["logprobs"]["top_logprobs"][2]) == {"c", "x"}
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_offsets_count_the_characters_of_the_text_and_none_of_tokens_that_it_leaves_out(server: Running) -> None:
    body = {"prompt": [1, 97, 98], "echo": True, "logprobs": 0, "max_tokens": 1}  # 1 is a control token of the fake's
    server.llm.tokenizer.decode = lambda ids: bytes(ids[1:]).decode()  # type: ignore[method-assign]
    choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
    del server.llm.tokenizer.decode
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("abH", [0, 0, 1, 2])


def test_echo_alone_generates_nothing(server: Running) -> None:
    answer = server.openai.completions.create(model="fake", prompt="ab", echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "length")
    assert answer.usage.completion_tokens == 0
    assert server.llm.finished == 0


def test_models(server: Running) -> None:
    cards = list(server.openai.models.list())
    assert [card.id for card in cards] == ["fake"]
    card = server.openai.models.retrieve("fake")
    assert (card.object, card.owned_by, card.max_model_len) == ("model", "shoal", 100)


def test_client_errors_have_the_client_s_types(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        server.openai.chat.completions.create(model="gpt-9", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("../../etc/passwd")
    with pytest.raises(openai.BadRequestError) as bad:
        server.openai.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        server.openai.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x" * 100}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    assert "100" in long.value.message


def test_embeddings_come_in_both_encodings(server: Running) -> None:
    for encoding in ("base64", "float"):
        body = {"input": ["ab", "c"], "encoding_format": encoding}
        answer = server.http.post("/v1/embeddings", json=body).json()
        assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        vectors = [entry["embedding"] for entry in answer["data"]]
        if encoding == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        for vector, token in zip(vectors, (97, 99), strict=True):
            np.testing.assert_allclose(vector, np.array([token, 1, 0, 0]) / np.hypot(token, 1), rtol=1e-6)
    # The client asks for base64 by itself, and its strict mode then looks for numbers before it has decoded them.
    lenient = server.openai.copy(_extra_kwargs={"_strict_response_validation": False})
    assert lenient.embeddings.create(model="fake", input=[7, 8]).data[0].embedding[0] > 0.9
    cut = lenient.embeddings.create(model="fake", input="a", dimensions=1, extra_body={"pooling": "last"})
    assert cut.data[0].embedding == [1.0]


def test_bad_embeddings_are_refused_by_name(server: Running) -> None:
    for param, body in (
        ("input", {}),
        ("input", {"input": ""}),
        ("input", {"input": "x" * 200}),
        ("input", {"input": [300]}),
        ("input", {"input": ["a"] * 3000}),
        ("dimensions", {"input": "a", "dimensions": 5}),
        ("dimensions", {"input": "a", "dimensions": 0}),
        ("encoding_format", {"input": "a", "encoding_format": "hex"}),
        ("pooling", {"input": "a", "pooling": "max"}),
    ):
        answer = server.http.post("/v1/embeddings", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_tokens_to_text_and_back(server: Running) -> None:
    def ask(path: str, **body: object) -> dict[str, object]:
        return server.http.post(path, json=body).json()  # type: ignore[no-any-return]

    assert ask("/tokenize", prompt="aé") == {"tokens": [97, 195, 169], "count": 3, "max_model_len": 100}
    assert ask("/tokenize", content="aé", with_pieces=True)["pieces"] == ["a", [195], [169]]
    assert ask("/tokenize", messages=HELLO)["tokens"] == [72, 105]
    assert ask("/detokenize", tokens=[97, 195, 169]) == {"prompt": "aé", "content": "aé"}
    for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": [256]}), ("/detokenize", {"tokens": [-1]})):
        assert server.http.post(path, json=body).status_code == 400
