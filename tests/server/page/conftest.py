"""Chromium, if this machine has one, before a server whose answers a test writes, and one with a real tiny model."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.conftest import FakeLLM, Running, running, wait_for
from tests.trace.tiny import tiny_folder

from shoal import LLM
from shoal.server.page import routes

FACTS = {
    "model": "fake", "model_type": "llama", "num_hidden_layers": 2, "max_context": 100, "chat": True, "experts": None,
    "temperature": None,
    "cache": {"bytes_per_token": 100, "full_bytes_per_token": 300, "tokens": 1000, "tokens_in_use": 0},
}  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        # No sandbox: in a container as root there is none, and nothing foreign is loaded.
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])


class Tab:
    """A page with what it did: errors, and requests to anywhere."""

    def __init__(self, browser: Any, url: str, *, handle: Any = None, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1360, "height": 860}, **options})
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        if handle is not None:  # answers to some requests instead of the server
            self.context.route("**/v1/shoal", handle)
        self.page.goto(url)
        if handle is None:
            self.until("document.getElementById('model').textContent.length > 0")

    def until(self, expression: str) -> None:
        """Wait for a condition; not inside the page, whose policy forbids to evaluate strings."""
        wait_for(lambda: bool(self.page.evaluate(expression)), seconds=15)

    def ask(self, text: str) -> str:
        """Type, send, wait for the end; the answer as shown."""
        count = self.page.locator(".message.assistant").count()
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")
        return self.answer(count)

    def answer(self, before: int = 0) -> str:
        done = self.page.locator(".message.assistant:not(.writing)").nth(before)
        done.wait_for()
        self.page.wait_for_selector("#send", state="visible")
        return str(done.locator(":scope > .body").inner_text())


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    tabs: list[Tab] = []

    def open_it(url: str, **options: Any) -> Tab:
        tabs.append(Tab(browser, url, **options))
        return tabs[-1]

    yield open_it
    for one in tabs:
        one.context.close()


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over a random model with experts."""
    llm = LLM(tiny_folder(tmp_path_factory.mktemp("browser") / "tiny"), threads=1)
    with running(lambda: llm) as box:
        yield box


@pytest.fixture(autouse=True)
def facts_of_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted engine has no configuration to compute numbers from."""
    real = routes.facts
    monkeypatch.setattr(routes, "facts", lambda llm, name: FACTS if isinstance(llm, FakeLLM) else real(llm, name))


@pytest.fixture
def url(server: Running) -> str:
    server.llm.max_context = 5000
    return server.url


class Gate:
    """Lets a scripted answer go on only as far as a test wants to see it."""

    def __init__(self, llm: FakeLLM, hold_at: int) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()

        def wait(produced: int) -> None:
            if produced >= hold_at and not self.open.is_set():
                self.reached.set()
                self.open.wait(10)

        llm.before_token = wait
