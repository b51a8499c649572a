"""The page in a browser: streams, stops, edits, keeps to itself; by keyboard, on a phone, for a screen reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
from tests.server.conftest import Running, wait_for
from tests.server.page.conftest import FACTS, Gate, Tab

Open = Callable[..., Tab]


def test_an_answer_streams_and_nothing_is_asked_of_anybody_else(server: Running, url: str, tab: Open) -> None:
    server.llm.reply = "One **two** three"
    gate = Gate(server.llm, 8)
    one = tab(url)
    one.page.fill("#question", "Count")
    one.page.press("#question", "Enter")
    one.until("document.querySelector('.message.assistant .body').textContent.startsWith('One')")
    assert "three" not in one.page.inner_text(".message.assistant")
    assert one.page.get_attribute("#messages", "aria-busy") == "true"
    gate.open.set()
    assert one.answer() == "One two three"
    assert one.page.inner_text(".message.assistant strong") == "two"
    facts = one.page.inner_text(".message.assistant .actions .fine")
    assert facts == "17 tokens, 160 a second", "as the server's clock has it: tokens may arrive in one piece"
    assert one.page.inner_text("#status").startswith("Answer: One")
    assert server.llm.messages == [{"role": "user", "content": "Count"}]
    assert all(request.startswith(url) for request in one.requests)
    assert one.problems == []


def test_stop_by_button_and_by_escape_ends_the_work(server: Running, url: str, tab: Open) -> None:
    server.llm.reply = "word " * 900
    one = tab(url)
    for stop in (lambda: one.page.click("#stop"), lambda: one.page.keyboard.press("Escape")):
        gate = Gate(server.llm, 20)
        before = one.page.locator(".message.assistant").count()
        one.page.fill("#question", "Go on")
        one.page.press("#question", "Enter")
        one.page.wait_for_selector(".message.assistant.writing .body p")
        assert gate.reached.wait(10)
        stop()
        gate.open.set()
        assert one.answer(before).startswith("word")
        wait_for(lambda: server.worker.num_running == 0)
        assert "stopped" in one.page.locator(".message.assistant").last.inner_text()
        assert len(one.page.locator(".message.assistant .body").last.inner_text()) < 900


def test_regenerate_edit_system_prompt_sampling_and_conversations(server: Running, url: str, tab: Open) -> None:
    one = tab(url)
    server.llm.reply = "first"
    one.ask("A question")
    server.llm.reply = "second"
    one.page.click(".message.assistant >> text=Regenerate")
    one.until("document.querySelector('.message.assistant .body').textContent === 'second'")
    assert [m["content"] for m in server.llm.messages] == ["A question"]
    one.page.click(".message.user >> text=Edit")
    one.page.fill(".edit textarea", "Another question")
    server.llm.reply = "third"
    one.page.click("text=Send again")
    one.until("document.querySelector('.message.assistant .body').textContent === 'third'")
    one.page.click("#open-settings")
    one.page.fill("#system", "Be brief.")
    one.page.fill("#set-temperature", "0.5")
    one.page.fill("#set-seed", "7")
    one.page.fill("#set-top_p", "3")
    assert one.page.get_attribute("#set-top_p", "aria-invalid") == "true"
    one.page.click("#settings >> text=Close")
    server.llm.reply = "fourth"
    assert one.ask("And now?") == "fourth"
    assert [m["content"] for m in server.llm.messages] == ["Be brief.", "Another question", "third", "And now?"]
    params = server.llm.asked[-1][1]
    assert (params.temperature, params.seed, params.top_p) == (0.5, 7, 1.0)
    one.page.click("#new-chat")
    one.ask("Second talk")
    one.page.reload()
    assert one.page.locator("#conversations li").count() == 2
    one.page.click("#conversations >> text=Another question")
    assert one.page.locator(".message").count() == 4
    one.page.on("dialog", lambda dialog: dialog.accept())
    one.page.hover("#conversations li.current")
    one.page.click("#conversations li.current .remove")
    assert one.page.locator("#conversations li").count() == 1
    assert one.problems == []


ATTACKS = [
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[go](javascript:alert(1))", "[go](JavaScript:f())",
    "[go](data:text/html,<script>alert(1)</script>)", "![x](https://evil.example/a.png)", "<svg onload=alert(1)>",
    "[a](https://a.example/\"onmouseover=alert(1))", "```html\n<script>alert(1)</script>\n```", "<javascript:alert(1)>",
    "| a | b |\n|---|---|\n| <b onclick=alert(1)>x</b> | [x](vbscript:y) |", "[x](\x01javascript:alert(1))",
    "<iframe src=javascript:alert(1)>", "`<img src=x onerror=alert(1)>`", "# <style>*{display:none}</style>",
]  # fmt: skip


def test_markdown_from_a_model_cannot_become_part_of_the_page(server: Running, url: str, tab: Open) -> None:
    server.llm.reply = "\n\n".join(ATTACKS)
    one = tab(url)
    one.page.on("dialog", lambda dialog: one.problems.append("a dialog opened"))
    one.ask("<img src=x onerror=alert(1)> **mine stays text**")
    for selector in ("img", "script", "svg", "iframe", "style", "[onerror]", "[onclick]", "[onload]", "[onmouseover]"):
        assert one.page.locator(f".message {selector}").count() == 0, selector
    links = one.page.eval_on_selector_all(".message a", "links => links.map(link => [link.protocol, link.rel])")
    assert links
    assert {protocol for protocol, _ in links} <= {"https:", "http:", "mailto:"}
    assert all("noopener" in rel and "noreferrer" in rel for _, rel in links)
    shown = one.page.inner_text(".message.assistant")
    assert "<img src=x onerror=alert(1)>" in shown
    assert one.page.inner_text(".message.user .body") == "<img src=x onerror=alert(1)> **mine stays text**"
    assert all(request.startswith(url) for request in one.requests)
    assert one.problems == []
    title = one.page.inner_text("#conversations .title")
    assert title.startswith("<img")


def test_the_browser_itself_refuses_markup_from_strings(url: str, tab: Open) -> None:
    one = tab(url)
    refused = one.page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (e) { return e.name; } }"
    )
    assert refused == "TypeError"
    one.page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x'}))"
    )
    wait_for(lambda: any("Content Security Policy" in problem for problem in one.problems))


MARKDOWN = """# Title

A *word*, a **strong** one, `code`, ~~gone~~, snake_case_name, 2 * 3 * 4, [a link](https://example.org/a_(b)) and https://example.org/x.

1. one
2. two
   - inner
   - more

> quoted
> on

| a | b |
|---|--:|
| 1 | `x|y` |

```python
def f(n):  # why
    return "s" * 2
```
last line"""


def test_markdown_is_shown_as_what_it_means(server: Running, url: str, tab: Open) -> None:
    server.llm.reply = MARKDOWN
    one = tab(url)
    one.ask("Show")
    body = one.page.locator(".message.assistant > .body")

    def texts(selector: str) -> list[str]:
        return list(body.locator(selector).all_inner_texts())

    assert texts("h3") == ["Title"]
    assert (texts("em"), texts("p strong"), texts("del")) == (["word"], ["strong"], ["gone"])
    assert texts("ol > li")[0] == "one"
    assert texts("ol ul > li") == ["inner", "more"]
    assert texts("blockquote") == ["quoted on"]
    assert texts("th") == ["a", "b"]
    assert texts("pre code") == ['def f(n):  # why\n    return "s" * 2']
    assert texts(".tok-k") == ["def", "return"]
    assert "snake_case_name, 2 * 3 * 4" in body.inner_text()
    assert texts("p")[-1] == "last line"
    one.context.grant_permissions(["clipboard-read", "clipboard-write"])
    body.locator(".code button").click()
    assert one.page.evaluate("navigator.clipboard.readText()") == 'def f(n):  # why\n    return "s" * 2'


def test_a_text_that_no_pattern_fits_takes_no_time(url: str, tab: Open) -> None:
    one = tab(url)
    worst = [
        "*" * 5000,
        "[" * 5000,
        "`" * 5001 + "x",
        "_a" * 4000,
        "> " * 2000,
        "**a" * 3000,
        "  " * 5000 + "x",
        "|" * 5000,
    ]
    took = one.page.evaluate(
        """async (texts) => {
            const { blocks, renderBlock } = await import('/page/markdown.js');
            const times = [];
            for (const text of texts) {
                const start = performance.now();
                blocks(text).forEach(renderBlock);
                times.push(performance.now() - start);
            }
            return times;
        }""",
        worst,
    )
    assert max(took) < 5000, "quadratic at most: a hostile answer must not hang the page"


def test_fill_in_the_middle_and_completion(server: Running, url: str, tab: Open) -> None:
    server.llm.reply = " and on"
    one = tab(url)
    one.page.click("[data-view=complete]")
    one.page.fill("#prompt", "Once")
    one.page.click("#complete-send")
    one.until("document.getElementById('result-facts').textContent.length > 0")
    assert one.page.text_content("#result") == " and on"
    one.page.click("#complete-take")
    assert one.page.input_value("#prompt") == "Once and on"
    sent: list[dict[str, Any]] = []
    one.page.on("request", lambda request: sent.append(json.loads(request.post_data)) if request.post_data else None)
    one.page.click("#fim summary")
    one.page.fill("#suffix", "the end")
    one.page.click("text=Fill the gap")
    wait_for(lambda: bool(sent))
    assert sent[0]["suffix"] == "the end"
    assert sent[0]["prompt"] == "Once and on"


def test_a_server_that_wants_a_key_gets_it_from_the_settings(url: str, tab: Open) -> None:
    def guarded(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer open sesame":
            route.fulfill(json=FACTS)
        else:
            route.fulfill(status=401, json={"error": {"message": "a valid API key is needed"}})

    one = tab(url, handle=guarded)
    one.page.wait_for_selector("#settings[open]")
    assert one.page.evaluate("document.activeElement.id") == "key"
    one.page.fill("#key", "open sesame")
    one.page.click("#settings >> text=Close")
    one.until("document.getElementById('model').textContent === 'fake'")
    assert "sesame" not in one.page.evaluate("JSON.stringify(localStorage)")
    other = one.context.new_page()
    other.goto(url)
    other.wait_for_selector("#settings[open]")
    assert other.input_value("#key") == "", "a key lives in its tab only"


def test_an_error_is_said_and_the_next_question_works(server: Running, url: str, tab: Open) -> None:
    one = tab(url)
    server.llm.before_token = lambda produced: (_ for _ in ()).throw(RuntimeError("broken")) if produced == 2 else None
    one.page.fill("#question", "Break")
    one.page.press("#question", "Enter")
    one.page.wait_for_selector("#notice:not([hidden])")
    assert "failed to answer" in one.page.inner_text("#notice")
    server.llm.before_token = lambda produced: None
    server.llm.reply = "well"
    one.page.fill("#question", "Again")
    one.page.press("#question", "Enter")
    one.until("[...document.querySelectorAll('.message.assistant .body')].at(-1).textContent === 'well'")
    assert one.page.is_hidden("#notice")


# ---- experts


def settings(one: Tab, *, experts: bool = True, **sampling: int) -> None:
    kept = json.dumps({"sampling": sampling, "experts": experts})
    one.page.evaluate("kept => localStorage.setItem('shoal.settings', kept)", kept)
    one.page.reload()
    one.until("document.getElementById('model').textContent.length > 0")


def test_every_token_s_experts_are_shown(moe: Running, tab: Open) -> None:
    one = tab(moe.url)
    one.page.evaluate(
        "localStorage.setItem('shoal.settings', JSON.stringify({sampling: {max_tokens: 12}, experts: true}))"
    )
    one.page.reload()
    bodies: list[Any] = []
    one.page.on("response", lambda response: bodies.append(response) if "completions" in response.url else None)
    one.ask("Where does this go?")
    reports = [
        json.loads(line[6:])["routing"]
        for line in bodies[0].text().splitlines()
        if line.startswith("data: {") and "routing" in line
    ]
    tokens = [token for report in reports for token in report["tokens"]]
    chips = one.page.locator(".strip [role=option]")
    one.until(f"document.querySelectorAll('.strip [role=option]').length === {len(tokens)}")
    assert one.page.locator(".chip.answer").count() == 11
    assert one.page.locator(".heat tbody tr").count() == 4
    counts = [0] * 16
    for report in reports:
        for picks in report["experts"][2]:
            for expert in picks:
                counts[expert] += 1
    busiest = counts.index(max(counts))
    label = one.page.locator(".heat tbody canvas").nth(2).get_attribute("aria-label")
    share = f"{100 * counts[busiest] / sum(counts):.1f} %"
    assert label == f"Busiest: expert {busiest} with {share} of the picks; {counts.count(0)} unused"
    chips.nth(3).click()
    first = [layer[3] for layer in reports[0]["experts"]]
    said = "document.querySelector('.detail').textContent"
    one.until(f"{said}.includes({json.dumps(f'layer 1: {str(first[0])[1:-1]}; layer 2')})")
    one.page.locator(".strip").press("ArrowRight")
    one.until("document.querySelector('.strip [data-index=\"4\"]').getAttribute('aria-selected') === 'true'")
    heat = one.page.locator(".heat")
    heat.press("ArrowDown")
    heat.press("End")
    one.until(f"{said}.startsWith('Layer 2, expert 15: ')")
    positions = reports[-1]["first"] + 1
    usage = one.page.inner_text(".cache")
    assert f"{positions * 240 / 1024:.1f} KiB" in usage or f"{(positions + 1) * 240 / 1024:.1f} KiB" in usage
    assert "6.7 times less" in usage
    painted = one.page.evaluate(
        """() => {
            const canvas = document.querySelector('.heat canvas');
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(Array.from({length: data.length / 4}, (_, i) => data.slice(4 * i, 4 * i + 3).join())).size;
        }"""
    )
    assert painted > 3
    assert one.problems == []


# ---- for everybody


def test_by_keyboard_alone(server: Running, url: str, tab: Open) -> None:
    server.llm.reply = "typed"
    one = tab(url)
    focused = "document.activeElement.id || document.activeElement.dataset.view || document.activeElement.className"
    one.page.evaluate("document.activeElement.blur()")
    order = []
    for _ in range(14):
        one.page.keyboard.press("Tab")
        order.append(one.page.evaluate(focused))
        if order[-1] == "question":  # its form shows the focus
            break
        assert one.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", order[-1]
    assert order[:6] == ["skip", "chat", "complete", "toggle-experts", "open-settings", "new-chat"]
    assert order[-1] == "question"
    one.page.keyboard.type("Hello")
    one.page.keyboard.press("Enter")
    assert one.answer() == "typed"
    assert one.page.evaluate(focused) == "question"
    one.page.keyboard.press("Shift+Tab")
    assert "small" in one.page.evaluate(focused)
    one.page.focus("#open-settings")
    one.page.keyboard.press("Enter")
    assert one.page.evaluate("document.getElementById('settings').contains(document.activeElement)")
    one.page.keyboard.press("Escape")
    assert one.page.evaluate(focused) == "open-settings"


def test_dark_and_light(url: str, tab: Open) -> None:
    def lightness(one: Tab) -> float:
        colour = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour[4:-1].split(","))) / 765

    dark, light = tab(url, color_scheme="dark"), tab(url, color_scheme="light")
    assert lightness(dark) < 0.2 < 0.9 < lightness(light)
    light.page.click("#open-settings")
    light.page.click("text=Dark")
    assert lightness(light) < 0.2
    light.page.reload()
    assert lightness(light) < 0.2


@pytest.mark.parametrize("width", [320, 760, 1000, 1360])
def test_nothing_sticks_out_at_any_width(moe: Running, tab: Open, width: int) -> None:
    one = tab(moe.url, viewport={"width": width, "height": 800})
    settings(one, experts=width >= 1100, max_tokens=4)
    one.ask("A" * 200 + " wide")
    sizes = "[document.documentElement.scrollWidth, innerWidth]"
    for view in ("chat", "complete"):
        one.page.click(f"[data-view={view}]")
        scroll, inner = one.page.evaluate(sizes)
        assert scroll <= inner, view
    if width < 1100:
        one.page.click("#toggle-experts")
    box = one.page.locator("#experts").bounding_box()
    assert box["x"] >= -1
    assert box["x"] + box["width"] <= width + 1
    if width <= 760:
        one.page.click("#close-experts")
        one.page.click("#open-list")
        one.page.locator("#new-chat").wait_for()
        one.page.click("#new-chat")
        assert one.page.get_attribute("#open-list", "aria-expanded") == "false"


def test_motion_is_left_out_for_who_wants_none(server: Running, url: str, tab: Open) -> None:
    Gate(server.llm, 3)
    one = tab(url, reduced_motion="reduce")
    one.page.fill("#question", "x")
    one.page.press("#question", "Enter")
    one.page.wait_for_selector(".writing")
    after = "getComputedStyle(document.querySelector('.writing .body'), '::after').animationName"
    assert one.page.evaluate(after) == "none"
    one.page.click("#stop")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(server: Running, moe: Running, url: str, tab: Open, scheme: str) -> None:
    pytest.importorskip("axe_playwright_python")
    source = (resources.files("axe_playwright_python") / "axe.min.js").read_text()
    server.llm.reply = MARKDOWN
    plain, experts = tab(url, color_scheme=scheme, bypass_csp=True), tab(moe.url, color_scheme=scheme, bypass_csp=True)
    experts.page.evaluate(
        "localStorage.setItem('shoal.settings', JSON.stringify({sampling: {max_tokens: 5}, experts: true}))"
    )
    experts.page.reload()

    def check(one: Tab) -> None:
        one.page.evaluate(source + "; null")
        rules = "{}" if scheme == "light" else "{runOnly: ['color-contrast']}"
        found = one.page.evaluate(f"axe.run({rules})")
        assert [(v["id"], [n["target"] for n in v["nodes"]]) for v in found["violations"]] == []

    check(plain)
    plain.ask("Show")
    check(plain)
    plain.page.click("[data-view=complete]")
    check(plain)
    plain.page.click("#open-settings")
    check(plain)
    experts.ask("Where?")
    check(experts)
    narrow = tab(moe.url, color_scheme=scheme, bypass_csp=True, viewport={"width": 390, "height": 800})
    narrow.page.click("#toggle-experts")
    check(narrow)
