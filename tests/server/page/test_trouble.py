"""The page when something is odd: two models, a refusal, a lost connection, no key, no chat format, another tab."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.server.conftest import FakeLLM, Running, running
from tests.server.page.conftest import FACTS, Gate, Tab

from shoal import LLM

Open = Callable[..., Tab]
FOCUSED = "document.activeElement.id"


class Pair(FakeLLM):
    """A scripted model that cannot fill gaps, and beside it Shoal's own small one, which can and has experts."""

    def __init__(self) -> None:
        super().__init__()
        self.max_context = 5000
        self.beside = {"shoal-code": LLM("shoal-code", threads=1, max_context=512)}

    def step(self) -> bool:
        return any([super().step(), *(llm.step() for llm in self.beside.values())])


@pytest.fixture(scope="module")
def pair() -> Iterator[Running]:
    llm = Pair()
    with running(lambda: llm, code="shoal-code") as box:
        yield box


def test_two_models_in_one_server(pair: Running, tab: Open) -> None:
    one = tab(pair.url)
    one.page.evaluate(
        "localStorage.setItem('shoal.settings', JSON.stringify({sampling: {max_tokens: 6}, experts: true}))"
    )
    one.page.reload()
    one.until("document.getElementById('experts-body').textContent.includes('fake has no experts')")
    sent: list[dict[str, Any]] = []
    one.page.on("request", lambda request: sent.append(json.loads(request.post_data)) if request.post_data else None)
    one.page.click("[data-view=complete]")
    one.page.click("#fim summary")
    assert one.page.inner_text("#fim-note") == "shoal-code fills the gap."
    one.page.fill("#prompt", "def add(a, b):\n    return ")
    one.page.fill("#suffix", "\n\n\nprint(add(1, 2))\n")
    with one.page.expect_response("**/v1/shoal"):  # the numbers anew, when the answer is there
        one.page.click("#complete-send")
    one.until("document.getElementById('result-facts').textContent.startsWith('shoal-code: ')")
    one.page.wait_for_load_state("networkidle")
    assert (sent[0]["model"], sent[0]["temperature"], sent[0]["routing"]) == ("shoal-code", 0, True)
    assert one.page.locator(".strip .chip.answer").count() > 0, "its experts stay on show"
    assert one.page.inner_text("#model") == "fake"
    one.page.click("[data-view=chat]")
    assert one.ask("Hello") == "Hello,"
    assert "fake has no experts" in one.page.inner_text("#experts-body")
    assert one.problems == []


def test_a_refusal_is_shown_with_the_offer_to_try_again(server: Running, url: str, tab: Open) -> None:
    one = tab(url)
    busy = {"error": {"message": "the engine is busy; try again in 2 s"}}
    one.context.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=busy), times=1)
    one.page.fill("#question", "Well?")
    one.page.press("#question", "Enter")
    one.page.wait_for_selector("#notice:not([hidden])")
    assert "the engine is busy" in one.page.inner_text("#notice")
    assert one.page.locator(".message.assistant").count() == 0
    one.page.click("#notice button >> text=Try again")
    assert one.answer() == "Hello, wörld"
    assert server.llm.messages == [{"role": "user", "content": "Well?"}]
    assert one.page.is_hidden("#notice")


def test_what_had_come_before_the_connection_was_lost_stays(server: Running, url: str, tab: Open) -> None:
    one = tab(url)
    half = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Half an ans"}}]}
    body = f"data: {json.dumps(half)}\n\n"
    for break_it in (
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
        lambda route: route.abort("connectionreset"),
    ):
        one.context.route("**/v1/chat/completions", break_it, times=1)
        one.page.fill("#question", "Well?")
        one.page.press("#question", "Enter")
        one.page.wait_for_selector("#notice:not([hidden])")
        if one.page.locator(".message.assistant").count():
            assert one.page.inner_text(".message.assistant > .body") == "Half an ans"
        one.page.click("#notice button >> text=Try again")
        one.until("document.querySelector('.message.assistant > .body').textContent === 'Hello, wörld'")
        assert one.page.locator(".message").count() == 2
        one.page.click("#new-chat")


def test_the_settings_can_be_closed_without_a_key(url: str, tab: Open) -> None:
    refused = {"error": {"message": "a valid API key is needed"}}
    one = tab(url, handle=lambda route: route.fulfill(status=401, json=refused))
    one.page.wait_for_selector("#settings[open]")
    with one.page.expect_response("**/v1/shoal"):
        one.page.keyboard.press("Escape")
    one.page.wait_for_selector("#notice:not([hidden])")
    one.page.wait_for_load_state("networkidle")
    assert one.page.locator("#settings[open]").count() == 0
    one.page.click("#open-settings")
    one.page.fill("#key", "not the right one")
    one.page.click("#settings >> text=Close")
    one.page.wait_for_selector("#settings[open]")


def test_a_model_without_a_chat_format_offers_completion(server: Running, url: str, tab: Open) -> None:
    one = tab(url, handle=lambda route: route.fulfill(json={**FACTS, "chat": False}))
    one.page.wait_for_selector("#complete:not([hidden])")
    assert one.page.is_disabled("[data-view=chat]")
    one.page.fill("#prompt", "Once")
    one.page.click("#complete-send")
    one.until("document.getElementById('result-facts').textContent.length > 0")
    assert one.page.text_content("#result") == "Hello, wörld"


def test_the_focus_is_taken_from_nobody_and_never_lost(server: Running, url: str, tab: Open) -> None:
    one = tab(url)
    gate = Gate(server.llm, 3)
    one.page.fill("#question", "x")
    one.page.click("#send")
    one.page.wait_for_selector(".writing")
    one.page.focus("#new-chat")
    gate.open.set()
    one.answer()
    assert one.page.evaluate(FOCUSED) == "new-chat"
    one.page.click("text=Regenerate")
    one.answer()
    one.until(f"{FOCUSED} === 'question'")
    one.page.click("[data-view=complete]")
    one.page.click("#complete-send")
    one.until("document.getElementById('result-facts').textContent.length > 0")
    assert one.page.evaluate(FOCUSED) == "complete-send"


def test_a_screen_reader_hears_of_an_expert_when_asked_and_not_with_every_token(moe: Running, tab: Open) -> None:
    one = tab(moe.url)
    one.page.evaluate(
        "localStorage.setItem('shoal.settings', JSON.stringify("
        "{sampling: {max_tokens: 5, temperature: 0}, experts: true}))"
    )
    one.page.reload()
    one.ask("Where?")
    one.until("document.querySelector('.detail').textContent.length > 0")
    assert one.page.get_attribute(".detail", "aria-live") == "off"
    one.page.locator(".strip").press("ArrowLeft")
    one.until("document.querySelector('.detail').getAttribute('aria-live') === 'polite'")


@pytest.mark.parametrize("mark", ["> ", "1. "])
def test_an_answer_nested_without_end_leaves_the_page_in_order(server: Running, url: str, tab: Open, mark: str) -> None:
    nested = {"choices": [{"index": 0, "delta": {"content": mark * 12_000 + "x"}}]}
    one = tab(url)
    body = f"data: {json.dumps(nested)}\n\ndata: [DONE]\n\n"
    one.context.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
        times=1,
    )
    assert "x" in one.ask("Go on")
    one.page.reload()
    one.page.click("#conversations .title")
    assert one.page.locator(".message.assistant").count() == 1
    one.page.click("#new-chat")
    assert one.ask("And now?") == "Hello, wörld"
    assert one.problems == []


def test_conversations_of_two_tabs_are_all_kept(server: Running, url: str, tab: Open) -> None:
    one = tab(url)
    other = one.context.new_page()
    other.goto(url)
    one.ask("From the first")
    other.wait_for_selector("#conversations li")
    other.fill("#question", "From the second")
    other.press("#question", "Enter")
    other.wait_for_selector(".message.assistant:not(.writing)")
    one.until("document.querySelectorAll('#conversations li').length === 2")
    other.reload()
    titles = other.locator("#conversations .title").all_inner_texts()
    assert sorted(titles) == ["From the first", "From the second"]
