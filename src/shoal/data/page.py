"""A page that is one file: style inside, charts as SVG, no scripts, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5c6b7a; --line: #dfe5ea; --paper: #ffffff; --ground: #f5f7f9;
  --c0: #9db8cf; --c1: #1f6fb2; --c2: #d9773a; --c3: #3f9a6b; --c4: #8a64b5; --c5: #b8902b; --c6: #c24f6b;
  --stream: #b9d3e6; --drop: #f0c9ad; --node: #1f4e79; --lost: #a9501c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9ee; --soft: #93a3b2; --line: #2b3641; --paper: #161c22;
  --ground: #0f1418; --c0: #4f6b82; --c1: #5aa9e6; --c2: #e8935a; --c3: #5fbf8f; --c4: #b092dc; --c5: #d9b45a;
  --c6: #e27c95; --stream: #24455f; --drop: #5b3a25; --node: #8cc4ee; --lost: #f0a878; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 28px 80px; }
h1 { font-size: 27px; letter-spacing: -0.01em; margin: 0 0 2px; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
p { margin: 0 0 12px; max-width: 78ch; }
.sub, .hint { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin-top: 20px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 22px; }
.facts div { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 12px 18px;
  flex: 1 1 150px; }
.facts b { display: block; font-size: 23px; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: 13px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 22px 32px; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { fill: var(--ink); font-size: 12px; font-family: inherit; }
svg .tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .axis { fill: var(--soft); font-size: 12px; }
svg .stage { font-weight: 600; font-size: 13px; }
svg .lost { fill: var(--lost); font-weight: 600; font-size: 13px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .limit { stroke: var(--c2); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .band { opacity: 0.16; }
svg .area { opacity: 0.85; }
svg .stream { fill: var(--stream); } svg .drop { fill: var(--drop); } svg .node { fill: var(--node); }
svg .drop:hover, svg .stream:hover { opacity: 0.75; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line);
  padding: 5px 14px 5px 0; }
td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.n, th.n { text-align: right; white-space: nowrap; }
td .bar { display: inline-block; height: 9px; border-radius: 2px; background: var(--c2); vertical-align: middle; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 13px; margin: 0 0 6px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
details { border-top: 1px solid var(--line); padding: 8px 0; }
details:last-child { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; }
summary .count { color: var(--soft); margin-left: 8px; font-size: 13px; }
figure { margin: 10px 0 14px; }
figcaption { color: var(--soft); font-size: 12.5px; margin-bottom: 3px; overflow-wrap: anywhere; }
pre { margin: 0; padding: 10px 12px; background: var(--ground); border: 1px solid var(--line); border-radius: 6px;
  font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 250px; overflow-y: auto; }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
COLOURS = "".join(
    f".fill{i} {{ fill: var(--c{i}); background: var(--c{i}); }} svg .stroke{i} {{ stroke: var(--c{i}); }}\n"
    for i in range(7)
)


@dataclass(frozen=True)
class Section:
    """A headed part of a page; `body` is HTML."""

    title: str
    body: str
    hint: str = ""


def page(title: str, subtitle: str, facts: Mapping[str, str], sections: Iterable[Section], foot: str = "") -> str:
    """The whole document. `facts` are the few numbers at the top: what it is → how much."""
    tiles = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in facts.items()
    )
    parts = "".join(
        f"<section><h2>{html.escape(one.title)}</h2>"
        + (f'<p class="hint">{html.escape(one.hint)}</p>' if one.hint else "")
        + f"{one.body}</section>"
        for one in sections
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{COLOURS}</style></head>\n<body><main><h1>{html.escape(title)}</h1>"
        f'<p class="sub">{html.escape(subtitle)}</p><div class="facts">{tiles}</div>{parts}'
        f"<footer>{html.escape(foot)}</footer></main></body></html>\n"
    )


class Markup(str):
    """HTML of our own, for a cell of a table; every other string is text, whatever stands in it."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table. `numeric`: columns set to the right."""
    right = set(numeric)

    def cell(tag: str, at: int, content: str) -> str:
        inner = content if isinstance(content, Markup) else html.escape(content)
        return f"<{tag}{' class=n' if at in right else ''}>{inner}</{tag}>"

    head = "".join(cell("th", at, name) for at, name in enumerate(columns))
    body = "".join(f"<tr>{''.join(cell('td', at, one) for at, one in enumerate(row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def excerpt(where: str, content: str) -> str:
    """A piece of text with where it stands."""
    shown = content if content.strip() else "(nothing but white space)"
    return f"<figure><figcaption>{html.escape(where)}</figcaption><pre>{html.escape(shown)}</pre></figure>"


def folded(title: str, count: str, body: str, *, unfolded: bool = False) -> str:
    """A part that opens when its title is clicked."""
    attribute = " open" if unfolded else ""
    return (
        f'<details{attribute}><summary>{html.escape(title)}<span class="count">{html.escape(count)}</span></summary>'
        f"{body}</details>"
    )
