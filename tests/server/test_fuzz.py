"""Bodies nobody thought of: whatever comes, the answer is a success or a client's error with its body, never a fault of
the server's, and the next request is served."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.conftest import Running

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20).filter(lambda text: text.isprintable()), st.sampled_from(["user", "text", "function", "auto"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=10,
)
MESSAGE = {"role": "user", "content": "Hi"}
SOUND: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [MESSAGE], "max_tokens": 2, "temperature": 0, "top_p": 1, "n": 1, "stop": ["x"], "stream": False,
        "logprobs": True, "top_logprobs": 1, "logit_bias": {"1": 1}, "seed": 1, "response_format": {"type": "text"},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto", "stream_options": None, "chat_template_kwargs": {"thinking": True}, "timeout": 20,
        "structured_outputs": None, "parallel_tool_calls": False, "modalities": ["text"], "routing": None,
    },
    "/v1/completions": {
        "prompt": "Hi", "max_tokens": 2, "echo": True, "logprobs": 1, "suffix": None, "n": 1, "min_p": 0.1,
        "best_of": 1, "presence_penalty": 0, "repetition_penalty": 1, "top_k": 3, "ignore_eos": False,
    },
    "/tokenize": {"prompt": "Hi", "add_special_tokens": True, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/embeddings": {"input": "Hi", "encoding_format": "float", "dimensions": 2, "pooling": "mean"},
}  # fmt: skip


def test_every_route_that_takes_a_body_is_here(server: Running) -> None:
    document = server.http.get("/openapi.json").json()
    assert {path for path, methods in document["paths"].items() if "post" in methods} == set(SOUND)


@pytest.mark.parametrize("path", SOUND)
def test_any_field_may_hold_anything(server: Running, path: str) -> None:
    sound = SOUND[path]

    @settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(sorted(sound)), VALUES, min_size=1, max_size=3))
    def ask(changed: dict[str, Any]) -> None:
        answer = server.http.post(path, content=orjson.dumps({**sound, **changed}))
        assert answer.status_code < 500, (answer.text, changed)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(error["message"]) < 1000

    ask()
    assert server.http.get("/health").json()["running"] == 0


@pytest.mark.parametrize("path", SOUND)
def test_any_body_at_all(server: Running, path: str) -> None:
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(VALUES.map(orjson.dumps), st.binary(max_size=60)))
    def ask(body: bytes) -> None:
        assert server.http.post(path, content=body).status_code in (200, 400, 404)

    ask()
