"""Charts as inline SVG for pages without scripts: marks have tooltips, colours come from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH = 760
SERIES = 7  # colours that the style sheet has


@dataclass(frozen=True)
class Point:
    """A place on a line, with the ends of an interval around it if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(content)}</text>'


def tooltip(content: str) -> str:
    return f"<title>{html.escape(content)}</title>"


def svg(height: float, marks: Sequence[str], label: str, width: float = WIDTH) -> str:
    """A drawing that fills its column."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{html.escape(label)}">'
        + "".join(marks)
        + "</svg>"
    )


def number(value: float) -> str:
    """1234567 → `1.23 M`; 0.0123 → `0.0123`."""
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == " k" else limit)
            return f"{scaled:.3g}{unit}" if scaled < 1000 else f"{scaled:.0f}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def legend(names: Sequence[str]) -> str:
    """Names beside their colours, as HTML to stand above a chart."""
    items = "".join(f'<span><i class="fill{i % SERIES}"></i>{html.escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{items}</p>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str, height: float = 300, log_x: bool = False
) -> str:
    """Lines with markers, and bands where points have intervals.

    Args:
        series: points by name, in rising x.
        log_x: equal ratios of x at equal distances.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    place = math.log10 if log_x else float
    low_x, high_x = min(place(p.x) for p in points), max(place(p.x) for p in points)
    values = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    low_y, high_y = min(values), max(values)
    room = (high_y - low_y) * 0.08 or abs(high_y) * 0.1 or 1.0
    low_y, high_y = low_y - room, high_y + room
    left, right, top, bottom = 62.0, WIDTH - 16.0, 12.0, height - 44

    def at(x: float, y: float) -> tuple[float, float]:
        across = (place(x) - low_x) / ((high_x - low_x) or 1)
        return left + across * (right - left), bottom - (y - low_y) / (high_y - low_y) * (bottom - top)

    marks = []
    for value in ticks(low_y, high_y):
        y = at(points[0].x, value)[1]
        marks += [f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>']
        marks += [text(left - 8, y + 4, number(value), "tick", "end")]
    xs = sorted({p.x for p in points}) if log_x or len({p.x for p in points}) <= 6 else ticks(low_x, high_x, 7)
    marks += [text(at(x, low_y)[0], bottom + 18, number(x), "tick", "middle") for x in xs]
    marks += [text((left + right) / 2, height - 6, x_label, "axis", "middle")]
    marks += [f'<text transform="translate(14 {(top + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle" class="axis">'
              f"{html.escape(y_label)}</text>"]  # fmt: skip
    for i, (name, line) in enumerate(series.items()):
        marks += _line(name, line, i % SERIES, at)
    return legend(list(series)) + svg(height, marks, f"{y_label} by {x_label}")


def _line(name: str, line: Sequence[Point], colour: int, at) -> list[str]:  # type: ignore[no-untyped-def]
    marks = []
    band = [p for p in line if p.low is not None and p.high is not None]
    if len(band) > 1:
        corners = [at(p.x, p.high) for p in band] + [at(p.x, p.low) for p in reversed(band)]
        marks.append(f'<polygon points="{_points(corners)}" class="fill{colour} band"/>')
    marks.append(f'<polyline points="{_points([at(p.x, p.y) for p in line])}" class="stroke{colour} line"/>')
    for p in line:
        x, y = at(p.x, p.y)
        interval = "" if p.low is None or p.high is None else f" ({p.low:.4g} to {p.high:.4g})"
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="fill{colour}">'
                     f"{tooltip(f'{name}: {p.y:.4g}{interval} at {number(p.x)}')}</circle>")  # fmt: skip
    return marks


def _points(corners: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


def histogram(
    counts: Mapping[str, Sequence[int]], *, low: float, high: float, x_label: str, log: bool = False,
    limits: Sequence[float] = (), height: float = 210, width: float = WIDTH,
) -> str:  # fmt: skip
    """Counts over equal bins as areas, one behind the other: what came in and what stayed.

    Args:
        counts: by name, the largest first.
        low, high: where the first bin begins and the last ends; powers of ten if `log`.
        limits: values to mark with a dashed line.
    """
    most = max((max(row) for row in counts.values() if len(row)), default=0) or 1
    bins = max((len(row) for row in counts.values()), default=0)
    if not bins:
        return ""
    left, right, top, bottom = 46.0, width - 12.0, 10.0, height - 40

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    marks = []
    for value in ticks(0, most, 3):
        y = bottom - value / most * (bottom - top)
        marks += [f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>']
        marks += [text(left - 6, y + 4, number(value), "tick", "end")]
    step = (right - left) / bins
    for i, (name, row) in enumerate(counts.items()):
        corners = [(left, bottom)]
        for j, count in enumerate(row):
            y = bottom - count / most * (bottom - top)
            corners += [(left + j * step, y), (left + (j + 1) * step, y)]
        corners.append((left + len(row) * step, bottom))
        marks.append(f'<polygon points="{_points(corners)}" class="fill{i % SERIES} area">{tooltip(name)}</polygon>')
    for value in _decades(low, high) if log else ticks(low, high, 6):
        label = number(round(10**value)) if log else f"{value:.3g}"
        marks.append(text(across(value), bottom + 16, label, "tick", "middle"))
    for value in limits:
        x = across(min(max(value, low), high))
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" class="limit">'
                     f"{tooltip(f'{value:.4g}')}</line>")  # fmt: skip
    marks.append(text((left + right) / 2, height - 6, x_label, "axis", "middle"))
    return svg(height, marks, x_label, width)


def _decades(low: float, high: float) -> list[float]:
    """Logarithms of 1, 3, 10, 30, … from `low` to `high`."""
    places = [power + half for power in range(math.floor(low), math.ceil(high)) for half in (0, math.log10(3))]
    return [place for place in [*places, math.ceil(high)] if low <= place <= high]


def bars(rows: Sequence[tuple[str, Sequence[float]]], *, width: float = WIDTH, label: float = 190) -> str:
    """A group of horizontal bars for each (name, values), one bar a value, in the colours of their places."""
    most = max((max(values) for _, values in rows), default=0) or 1
    thick, gap = (14.0, 12.0) if rows and len(rows[0][1]) == 1 else (8.0, 12.0)
    marks, y = [], 6.0
    for name, values in rows:
        middle = y + thick * len(values) / 2 + 4
        shown = name if len(name) <= label / 6.4 else name[: int(label / 6.4) - 1] + "…"
        marks.append(f"<g>{tooltip(name)}{text(label - 10, middle, shown, 'name', 'end')}</g>")
        for i, value in enumerate(values):
            size = max(value / most * (width - label - 110), 1 if value else 0)
            marks.append(f'<rect x="{label}" y="{y:.1f}" width="{size:.1f}" height="{thick - 1}" rx="1.5" '
                         f'class="fill{i % SERIES}">{tooltip(f"{name}: {value:,.0f}")}</rect>')  # fmt: skip
            y += thick
        widest = max(values) / most * (width - label - 110)
        marks.append(text(label + widest + 6, middle, " → ".join(map(number, values)), "tick"))
        y += gap
    return svg(y, marks, "bars", width)


@dataclass(frozen=True)
class Stage:
    """One step of a flow: what stays after it, and what it takes out for which reason (amounts in one unit)."""

    name: str
    stays: float
    drops: Mapping[str, float]
    note: str = ""


def flow(start: tuple[str, float], stages: Sequence[Stage], *, unit: str, width: float = 1080) -> str:
    """A stream from left to right that loses an arm at each step; widths are amounts."""
    total = start[1] or 1
    height, top, thick = 330.0, 46.0, 150.0
    columns = len(stages) + 1
    step = (width - 150) / max(columns - 1, 1)
    scale = thick / total
    marks, x, amount = [], 20.0, start[1]
    marks += [text(x, 18, start[0], "stage"), text(x, 34, f"{number(start[1])} {unit}", "tick")]
    marks.append(_node(x, top, amount * scale, f"{start[0]}: {amount:,.0f} {unit}"))
    for i, stage in enumerate(stages):
        after = x + step
        lost = sum(stage.drops.values())
        kept = stage.stays * scale
        marks.append(_ribbon(x + 10, after, top, top, kept, "stream", f"{stage.name}: {stage.stays:,.0f} {unit} stay"))
        if lost > 0:
            marks += _arm(x + 10, after, top + kept, max(lost * scale, 1.2), stage, lost, unit, lane=i % 2)
        marks.append(_node(after, top, kept, f"after {stage.name}: {stage.stays:,.0f} {unit}"))
        marks += [text(after, 18, stage.name, "stage"), text(after, 34, stage.note or number(stage.stays), "tick")]
        x, amount = after, stage.stays
    return svg(height, marks, f"flow of {unit}", width)


def _node(x: float, y: float, height: float, label: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="10" height="{max(height, 1):.1f}" class="node">{tooltip(label)}</rect>'
    )


def _ribbon(x1: float, x2: float, y1: float, y2: float, thick: float, kind: str, label: str) -> str:
    bend = (x1 + x2) / 2
    path = (f"M{x1:.1f},{y1:.1f} C{bend:.1f},{y1:.1f} {bend:.1f},{y2:.1f} {x2:.1f},{y2:.1f} "
            f"L{x2:.1f},{y2 + thick:.1f} C{bend:.1f},{y2 + thick:.1f} {bend:.1f},{y1 + thick:.1f} "
            f"{x1:.1f},{y1 + thick:.1f} Z")  # fmt: skip
    return f'<path d="{path}" class="{kind}">{tooltip(label)}</path>'


def _arm(x1: float, x2: float, y: float, thick: float, stage: Stage, lost: float, unit: str, lane: int) -> list[str]:
    """What a step takes out, bending down to a label."""
    low = 236.0 + 44 * lane
    end = x2 - 26
    reasons = "; ".join(f"{reason}: {number(value)}" for reason, value in list(stage.drops.items())[:6])
    marks = [_ribbon(x1, end, y, low - 18 - thick, thick, "drop", f"{stage.name} drops {lost:,.0f} {unit}. {reasons}")]
    marks.append(text(end, low, f"−{number(lost)}", "lost", "end"))
    top = next(iter(stage.drops), "")
    shown = top if len(top) <= 30 else top.split(": ", 1)[-1]
    marks.append(text(end, low + 15, shown if len(shown) <= 30 else shown[:29] + "…", "tick", "end"))
    return marks
