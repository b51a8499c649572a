"""The page: well-formed, self-contained, nothing of the texts can become markup, and its numbers are the ledger's."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from tests.data import texts

from shoal.data import charts, page
from shoal.data.charts import Point
from shoal.data.plan import Source
from shoal.data.prepare import prepare
from shoal.data.recipe import Recipe
from shoal.data.report import write_report
from shoal.data.run import Machine
from shoal.errors import FileError

NASTY = "</pre><script>alert('x')</script> & <b>bold</b>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checker(HTMLParser):
    """Every tag is closed in order; collects tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_the_page_of_a_run(tmp_path):
    rows = [{"text": text} for text in texts.english()[:60]] + [{"text": NASTY}, {"text": NASTY * 3}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(sources=(Source(path=tmp_path / "in.jsonl", name=NASTY),), vocab_size=400, band=(0.1, 0.9))
    result = prepare(recipe, tmp_path / "out", Machine(workers=1))
    shown = (tmp_path / "out/report.html").read_text()
    found = check(shown)
    assert "script" not in found.tags
    assert found.addresses == []
    assert "url(" not in shown and "@import" not in shown
    assert found.tags.count("svg") >= 6
    text = re.sub("<[^>]+>", " ", shown)
    summary = json.loads((tmp_path / "out/summary.json").read_bytes())
    for step in (summary["clean"], summary["pack"]):
        for reasons in step["dropped"].values():
            for reason, (documents, _) in reasons.items():
                assert re.search(rf"{re.escape(reason)}\s+{documents:,}\s+{documents / 62:.2%}", text), reason
    assert f"{result.kept}" in text
    assert "The two tails" in text
    assert write_report(tmp_path / "out").read_text() == shown
    with pytest.raises(FileError, match=r"holds no summary\.json"):
        write_report(tmp_path)


def test_cells_are_text_whatever_they_hold():
    """Ids of rows and names of sources stand in tables, and both may come from a stranger's file."""
    found = check(
        page.table((NASTY, "<img src=x onerror=alert(1)>"), [["<script>alert(1)</script>", page.Markup("<b>x</b>")]])
    )
    assert found.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "b"]


def test_lines_pass_through_their_points():
    lines = {"a <b>": [Point(1, 2.0, 1.5, 2.5), Point(10, 4.0, 3.0, 5.0)], "c": [Point(1, 1.0), Point(10, 3.0)]}
    drawing = charts.line_chart(lines, x_label="tokens", y_label="loss", log_x=True)
    check(drawing)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    assert len(places) == 4
    (x1, y1), (x2, y2), (x3, y3), (_, y4) = places
    assert x1 == x3 < x2
    assert y2 < y4 < y1 < y3  # 4, 3, 2, 1: upwards
    assert (y3 - y1) == pytest.approx(y1 - y4, abs=0.2)
    assert "a &lt;b&gt;: 2 (1.5 to 2.5) at 1" in drawing
    assert drawing.count("<polygon") == 1  # a band for the line that has intervals
    assert charts.line_chart({}, x_label="", y_label="") == ""


def test_bars_flow_and_histogram_are_to_scale():
    drawing = charts.bars([("a", [100, 50]), ("b", [25, 0])])
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', drawing)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert widths[0] == pytest.approx(4 * widths[2], rel=0.01)
    assert widths[3] == 0
    drawing = charts.flow(("read", 100), [charts.Stage("half", 50, {"bad": 30, "worse": 20})], unit="words")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="node"', drawing)]
    assert heights[0] == pytest.approx(2 * heights[1])
    assert "half drops 50 words. bad: 30; worse: 20" in drawing
    check(charts.histogram({"x": [1, 5, 2]}, low=0, high=3, x_label="size", limits=[1.5]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (9999, "9,999"),
        (12345, "12.3 k"),
        (1.5e6, "1.5 M"),
        (0.01234, "0.0123"),
        (7846.9, "7,847"),
        (2e9, "2 B"),
    ],
)
def test_numbers(value, shown):
    assert charts.number(value) == shown


def test_ticks_are_round():
    assert charts.ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(3, 3) == [3]
    drawing = charts.histogram({"x": [1, 1]}, low=1.2, high=4.1, x_label="size", log=True)
    assert re.findall(r'text-anchor="middle" class="tick">([^<]+)<', drawing) == [
        "30",
        "100",
        "300",
        "1,000",
        "3,000",
        "10 k",
    ]
