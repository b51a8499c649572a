"""The page's files over HTTP, and the routing feed of a real tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources

import numpy as np
import openai
import pytest
from tests.server.conftest import Running, running
from tests.server.test_bad_requests import error_of
from tests.trace.tiny import CONFIG, tiny_folder

from shoal import LLM
from shoal.engine import SamplingParams
from shoal.server.page.routes import FILES, TYPES

FOLDER = resources.files("shoal.server.page")


def test_every_file_is_served_whole_typed_and_under_the_policy(server: Running) -> None:
    names = {entry.name for entry in FOLDER.iterdir() if entry.name.rpartition(".")[2] in TYPES}
    assert {"index.html", "style.css", "main.js", "icon.svg"} <= names
    assert len(FILES) == len(names)
    for path, file in FILES.items():
        response = server.http.get(path)
        assert response.status_code == 200
        assert response.content == (FOLDER / (path.rpartition("/")[2] or "index.html")).read_bytes()
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        again = server.http.get(path, headers={"if-none-match": file.tag})
        assert (again.status_code, again.content) == (304, b"")
        assert server.http.head(path).status_code == 200
        assert server.http.post(path).status_code == 405


def test_the_files_name_no_other_place_and_use_no_markup_from_strings() -> None:
    for entry in FOLDER.iterdir():
        if entry.name.rpartition(".")[2] not in TYPES:
            continue
        text = entry.read_text()
        addresses = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}
        assert addresses == set(), entry.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        assert not re.search(r"<[^>]+\s(on\w+|style)=", text), entry.name


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(tiny_folder(tmp_path_factory.mktemp("page") / "tiny"), threads=1)


@pytest.fixture(scope="module")
def box(llm: LLM) -> Iterator[Running]:
    with running(lambda: llm) as box:
        yield box


ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0, "stream": True}


def test_the_stream_says_where_each_token_went(box: Running, llm: LLM) -> None:
    ids = llm.encode_chat([{"role": "user", "content": "Hello"}])
    params = SamplingParams(temperature=0, max_tokens=6, routing=True)
    expected = [routing for chunk in llm.stream(ids, params) for routing in chunk.routing]
    box.openai.base_url = f"{box.url}/v1"  # a strict client reads the same stream
    events = list(
        box.openai.chat.completions.create(model="fake", **ASK, extra_body={"routing": True})  # type: ignore[call-overload]
    )
    reports = [event.routing for event in events if getattr(event, "routing", None)]
    assert len({event.id for event in events}) == 1
    assert events[-1].choices[0].finish_reason is not None, "routing comes before the end"
    assert [report["first"] for report in reports] == [routing.first for routing in expected]
    for report, routing in zip(reports, expected, strict=True):
        assert report["prompt_tokens"] == len(ids)
        assert report["experts"] == routing.experts_LTK.tolist()
        np.testing.assert_allclose(report["weights"], routing.weights_LTK, atol=6e-5)
        np.testing.assert_allclose(report["entropy"], routing.entropy_LT, atol=6e-5)
        assert report["tokens"] == [
            llm.tokenizer.token_bytes(token).decode(errors="replace") for token in routing.tokens
        ]


def test_text_completions_report_too_and_choices_are_told_apart(box: Running) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 4, "stream": True, "n": 2, "routing": True, "seed": 1}
    with box.http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    reports = re.findall(r'"routing":\{"index":(\d),"first":(\d+)', "\n".join(lines))
    for index in ("0", "1"):  # the prompt, which may be read once for both, and all but the last token of the answer
        assert len([first for i, first in reports if i == index]) >= 3


def test_nothing_is_said_unasked_and_only_streams_can_be_asked(box: Running, server: Running) -> None:
    with box.http.stream("POST", "/v1/chat/completions", json=ASK) as response:
        assert "routing" not in response.read().decode()
    error = error_of(box.http.post("/v1/chat/completions", json={**ASK, "stream": False, "routing": True}), 400)
    assert error["param"] == "routing"
    with server.http.stream("POST", "/v1/chat/completions", json={**ASK, "routing": True}) as response:
        assert response.status_code == 200, "a model without experts has nothing to report"


def test_the_facts(box: Running, llm: LLM) -> None:
    facts = box.http.get("/v1/shoal").json()
    assert CONFIG.moe is not None
    assert facts["experts"] == {
        "layers": [1, 2, 3, 4], "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1,
    }  # fmt: skip
    # bf16: five layers of a latent of 16 and a rotary key of 8; four heads of keys (24) and values (16).
    assert facts["cache"]["bytes_per_token"] == 5 * (16 + 8) * 2
    assert facts["cache"]["full_bytes_per_token"] == 5 * 4 * (24 + 16) * 2
    assert facts["cache"]["tokens"] == llm.cache_tokens
    assert 0 <= facts["cache"]["tokens_in_use"] <= facts["cache"]["tokens"]
    assert facts["model"] == "fake"


def test_openai_s_client_is_undisturbed(box: Running) -> None:
    assert isinstance(box.openai, openai.OpenAI)
    answer = box.openai.chat.completions.create(model="fake", **{**ASK, "stream": False})  # type: ignore[call-overload]
    assert answer.usage.completion_tokens == 6
