"""The arena's rows as a page and a picture: docs/ARENA.md, docs/arena.svg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klimb.report import charts
from klimb.report.charts import Frame
from klimb.report.text import number
from klimb.watch.statistics import seeds_interval

TITLES = {
    "countdown": "Mini-countdown: every online method",
    "digits": "GSM8K digits",
    "clerk": "The clerk, against a learned reward (gold)",
    "offline": "The clerk, from comparisons alone (gold)",
}
STYLE = (
    "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd}.start{stroke:#888;stroke-dasharray:4 3}"
    ".bar{stroke:#0b5f9e;stroke-width:1.5}.seed{fill:#0b5f9e;opacity:.55}"
)
COLUMNS = ("pass@1", "pass@16", "kl", "entropy", "length", "seconds", "drawn")


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    (folder / "arena.svg").write_text(picture(rows), encoding="utf-8")
    found = [section(title, [row for row in rows if row["contest"] == name]) for name, title in TITLES.items()]
    marks = "<!-- tables -->"
    page = folder / "ARENA.md"
    head, _, tail = page.read_text(encoding="utf-8").partition(marks)
    _, _, tail = tail.partition(marks)
    page.write_text("\n\n".join([head + marks, *filter(None, found), marks + tail]), encoding="utf-8")


def section(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table, best first, with the interval over seeds (t, 95 %)."""
    methods = dict.fromkeys(row["method"] for row in rows)
    if not methods:
        return ""
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    order = sorted(methods, key=lambda method: -_mean(by_method[method], COLUMNS[0]))
    lines = [f"| method | {' | '.join(COLUMNS)} | seeds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method in order:
        own = by_method[method]
        cells = [_cell(own, column) for column in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join([f"### {title}", "", *lines])


def _values(rows: Sequence[dict[str, Any]], column: str) -> list[float]:
    return [row[column] for row in rows if row.get(column) is not None]


def _mean(rows: Sequence[dict[str, Any]], column: str) -> float:
    values = _values(rows, column)
    return sum(values) / len(values) if values else float("nan")


def _cell(rows: Sequence[dict[str, Any]], column: str) -> str:
    values = _values(rows, column)
    if not values:
        return "–"
    if column == "drawn":
        return f"{_mean(rows, column):,.0f}"
    told = number(_mean(rows, column), 1 if column in ("seconds", "length") else 3)
    if column == COLUMNS[0] and len(values) > 1:
        interval = seeds_interval(values)
        return f"**{told}** [{number(interval.low, 3)}, {number(interval.high, 3)}]"
    return told


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """A column a contest: every method's first figure, seed by seed, with its interval; dashed: the start."""
    contests = [name for name in TITLES if any(row["contest"] == name for row in rows)]
    tallest = max((len({row["method"] for row in rows if row["contest"] == name}) for name in contests), default=1)
    width, height, line = 420.0, 60.0 + 19 * tallest, 19.0
    parts = [charts.tag("style", STYLE)]
    for place, name in enumerate(contests):
        own = [row for row in rows if row["contest"] == name]
        values = [row["pass@1"] for row in own]
        frame = Frame(place * width + 150, 40, width - 170, height - 60, charts.span(values), (0, 1))
        parts.append(charts.tag("text", TITLES[name], x=place * width + 8, y=18.0))
        for tick in charts.ticks(*frame.x, 4):
            x = frame.px(tick)
            parts.append(charts.tag("path", d=f"M{x:.1f} 34V{height - 20:.1f}", class_="grid"))
            parts.append(charts.tag("text", charts.tick_label(tick), x=x - 8, y=height - 6))
        start = [row["pass@1"] for row in own if row["method"] == "sft"]
        if start:
            x = frame.px(sum(start) / len(start))
            parts.append(charts.tag("path", d=f"M{x:.1f} 34V{height - 20:.1f}", class_="start"))
        scores: dict[str, list[float]] = {}
        for row in own:
            scores.setdefault(row["method"], []).append(row["pass@1"])
        for index, (method, found) in enumerate(sorted(scores.items(), key=lambda item: -sum(item[1]) / len(item[1]))):
            y = 46 + line * index
            parts.append(charts.tag("text", method, x=place * width + 8, y=y + 4))
            if len(found) > 1:
                interval = seeds_interval(found)
                low, high = (frame.px(min(max(v, frame.x[0]), frame.x[1])) for v in (interval.low, interval.high))
                parts.append(charts.tag("path", d=f"M{low:.1f} {y:.1f}H{high:.1f}", class_="bar"))
            parts += [charts.tag("circle", cx=frame.px(value), cy=y, r=3.0, class_="seed") for value in found]
    drawn = charts.svg(parts, width * max(len(contests), 1), height, "The arena: every method on equal terms")
    return str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
