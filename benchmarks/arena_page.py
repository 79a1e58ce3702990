"""The arena's rows as a page and a picture: docs/ARENA.md, docs/arena.svg."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from klimb.report import charts
from klimb.report.charts import Frame
from klimb.report.text import number
from klimb.watch.statistics import Interval, seeds_interval

TITLES = {
    "countdown": "Mini-countdown: every online method",
    "clerk": "The clerk, against a learned reward",
    "digits": "GSM8K digits",
    "offline": "The clerk, from comparisons alone",
}
BASES = {"countdown": "grpo", "clerk": "grpo", "digits": "grpo", "offline": "dpo"}
"""What the others of a contest are compared with, seed by seed."""
CLAIMS = (
    ("grpo, clip-higher", "grpo", "the same weights"),
    ("grpo, shuffled rewards", "sft", "not above"),
    ("grpo, stale", "sft", "not below"),
    ("grpo, stale, TIS", "sft", "not below"),
    ("grpo, stale, no ratio", "sft", "below"),
    ("grpo, one batch", "sft", "not below"),
    ("grpo, one batch, TIS", "sft", "not below"),
    ("grpo, one batch, no ratio", "sft", "below"),
    ("gdpo", "grpo, two rewards", "unknown"),
)
"""Controls of mini-countdown: what is compared with what, and what has to come out."""
STYLE = (
    "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd}.start{stroke:#888;stroke-dasharray:4 3}"
    ".bar{stroke:#0b5f9e;stroke-width:1.5}.seed{fill:#0b5f9e;opacity:.55}"
)
ONLINE = ("pass@1", "pass@16", "kl", "entropy", "length", "seconds", "drawn")
OFFLINE = ("pass@1", "pass@16", "kl", "chosen_log_ratio", "displaced", "length", "seconds")
LINE = 19.0
"""Height of a method in the picture."""
LABELS = {"chosen_log_ratio": "chosen drift", "kl": "KL"}
GOLD = {"pass@1": "gold", "pass@16": "gold of 16"}
"""In the clerk's world; of 16 replies the one that the learned reward likes best."""


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    (folder / "arena.svg").write_text(picture(rows), encoding="utf-8")
    found = [section(name, [row for row in rows if row["contest"] == name]) for name in TITLES]
    marks = "<!-- tables -->"
    page = folder / "ARENA.md"
    head, _, tail = page.read_text(encoding="utf-8").partition(marks)
    _, _, tail = tail.partition(marks)
    page.write_text("\n\n".join([head + marks, *filter(None, found), marks + tail]), encoding="utf-8")


def section(contest: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table, best first, with intervals over seeds (t, 95 %), and what can be said of it."""
    ran = _by_method([row for row in rows if "error" not in row])
    if not ran:
        return ""
    columns = OFFLINE if contest == "offline" else ONLINE
    labels = LABELS | (GOLD if contest in ("clerk", "offline") else {})
    base = BASES[contest]
    heads = [labels.get(column, column) for column in columns]
    heads.insert(1, f"− {base}")
    lines = [f"| method | {' | '.join(heads)} | seeds |", "|---" * (len(heads) + 2) + "|"]
    for method in sorted(ran, key=lambda method: -_mean(ran[method], "pass@1")):
        own = ran[method]
        cells = [_cell(own, column) for column in columns]
        cells.insert(1, "" if method == base else _told(difference(own, ran.get(base, []))))
        lines.append(f"| {method} | {' | '.join(cells)} | {len(own)} |")
    failed = sorted({f"{row['method']} ({row['error']})" for row in rows if "error" in row})
    told = [verdict(ran, base), *([f"Did not run: {', '.join(failed)}."] if failed else [])]
    found = controls(ran) if contest == "countdown" else []
    return "\n".join([f"### {TITLES[contest]}", "", *lines, "", *told, *found])


def difference(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> Interval | None:
    """Of pass@1, seed by seed: what both owe to their start cancels. None: no seed has both."""
    theirs = {row["seed"]: row["pass@1"] for row in others}
    found = [row["pass@1"] - theirs[row["seed"]] for row in rows if row["seed"] in theirs]
    return seeds_interval(found) if found else None


def same_weights(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> bool:
    theirs = {row["seed"]: row["weights"] for row in others}
    shared = [row for row in rows if row["seed"] in theirs]
    return bool(shared) and all(row["weights"] == theirs[row["seed"]] for row in shared)


def judged(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    """above, below, open (no difference shown), the same weights; unknown with fewer than two seeds."""
    if same_weights(rows, others):
        return "the same weights"
    found = difference(rows, others)
    if found is None or math.isnan(found.low):
        return "unknown"
    return "above" if found.low > 0 else "below" if found.high < 0 else "open"


def verdict(ran: Mapping[str, Sequence[dict[str, Any]]], base: str) -> str:
    """What the table shows, in words."""
    outcomes: dict[str, list[str]] = {}
    for method in ran:
        if method not in (base, "sft"):
            outcomes.setdefault(judged(ran[method], ran.get(base, [])), []).append(method)
    several = {name: methods for name, methods in outcomes.items() if name not in ("unknown", "the same weights")}
    compared = sum(map(len, several.values()))
    lines = []
    if compared:
        lines.append(
            f"Of {compared} methods compared with {base} seed by seed (paired t, 95 %, each on its own: about "
            f"{number(compared / 20, 1)} of them stand out by chance alone),"
        )
        for name, words in (("above", "are above it"), ("below", "are below it")):
            lines.append(f"{len(several.get(name, []))} {words}{_listed(several.get(name, []))};")
        lines.append(
            f"for {len(several.get('open', []))} **no difference is shown**{_listed(several.get('open', []))}."
        )
    if same := outcomes.get("the same weights"):
        lines.append(f"To the bit the weights of {base}{_listed(same)}.")
    if unknown := outcomes.get("unknown"):
        lines.append(f"Not compared, as fewer than two seeds have both{_listed(unknown)}.")
    return "\n".join(lines)


def controls(ran: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    rows = [claim for claim in CLAIMS if claim[0] in ran and claim[1] in ran]
    if not rows:
        return []
    lines = [
        "",
        "#### Controls",
        "",
        "| control | compared with | difference | expected | found |",
        "|---|---|---|---|---|",
    ]
    for method, other, expected in rows:
        found = judged(ran[method], ran[other])
        told = "no difference shown" if found == "open" else found
        lines.append(f"| {method} | {other} | {_told(difference(ran[method], ran[other]))} | {expected} | {told} |")
    return lines


def _listed(methods: Sequence[str]) -> str:
    return f" ({'; '.join(methods)})" if methods else ""


def _told(found: Interval | None) -> str:
    if found is None:
        return "–"
    signed = [f"{value:+.3f}" for value in found if not math.isnan(value)]
    return signed[0] + (f" [{', '.join(signed[1:])}]" if signed[1:] else "")


def _by_method(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


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
    if column == "pass@1" and len(values) > 1:
        interval = seeds_interval(values)
        return f"**{told}** [{number(interval.low, 3)}, {number(interval.high, 3)}]"
    return told


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """A column a contest: every method's first figure, seed by seed, with its interval; dashed: the start. What lies so
    far off that the others could not be told apart stands at the edge with its mean."""
    rows = [row for row in rows if "error" not in row]
    contests = [name for name in TITLES if any(row["contest"] == name for row in rows)]
    tallest = max((len({row["method"] for row in rows if row["contest"] == name}) for name in contests), default=1)
    width, height = 420.0, 60.0 + LINE * tallest
    parts = [charts.tag("style", STYLE)]
    for place, name in enumerate(contests):
        parts += _column(
            name, _by_method([row for row in rows if row["contest"] == name]), place * width, width, height
        )
    drawn = charts.svg(parts, width * max(len(contests), 1), height, "The arena: every method on equal terms")
    return str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _column(
    contest: str, ran: Mapping[str, Sequence[dict[str, Any]]], left: float, width: float, height: float
) -> list[Any]:
    means = {method: _mean(own, "pass@1") for method, own in ran.items()}
    low, high = _usual(list(means.values()), means.get("sft"))
    inside = [row["pass@1"] for method, own in ran.items() for row in own if low <= means[method] <= high]
    frame = Frame(left + 150, 40, width - 170, height - 60, charts.span(inside), (0, 1))
    parts = [charts.tag("text", TITLES[contest], x=left + 8, y=18.0)]
    for tick in charts.ticks(*frame.x, 4):
        x = frame.px(tick)
        parts.append(charts.tag("path", d=f"M{x:.1f} 34V{height - 20:.1f}", class_="grid"))
        parts.append(charts.tag("text", charts.tick_label(tick), x=x - 8, y=height - 6))
    if "sft" in means:
        parts.append(charts.tag("path", d=f"M{frame.px(means['sft']):.1f} 34V{height - 20:.1f}", class_="start"))
    for index, method in enumerate(sorted(means, key=lambda method: -means[method])):
        y = 46 + LINE * index
        parts.append(charts.tag("text", method, x=left + 8, y=y + 4))
        found = [row["pass@1"] for row in ran[method]]
        if not low <= means[method] <= high:
            below, told = means[method] < low, number(means[method], 3)
            x = frame.px(frame.x[0]) - 4 if below else frame.px(frame.x[1]) - 44
            parts.append(charts.tag("text", f"← {told}" if below else f"{told} →", x=x, y=y + 4))
            continue
        if len(found) > 1:
            interval = seeds_interval(found)
            ends = (frame.px(min(max(v, frame.x[0]), frame.x[1])) for v in (interval.low, interval.high))
            parts.append(charts.tag("path", d="M{:.1f} {y:.1f}H{:.1f}".format(*ends, y=y), class_="bar"))
        parts += [charts.tag("circle", cx=frame.px(value), cy=y, r=3.0, class_="seed") for value in found]
    return parts


def _usual(means: Sequence[float], start: float | None) -> tuple[float, float]:
    """Three interquartile ranges beyond the quartiles (Tukey's outer fences), or twice the way from the start."""
    if len(means) < 4:
        return -math.inf, math.inf
    first, middle, third = statistics.quantiles(means, n=4)
    reach = max(3 * (third - first), 0.0 if start is None else 2 * abs(middle - start))
    return first - reach, third + reach
