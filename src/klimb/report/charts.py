"""Charts as SVG of our own: no script, the page's own colours (`currentColor`), sharp in print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from klimb.report.load import Row
from klimb.report.text import number, visible

Points = list[tuple[float, float]]


def _regular(corners: int, radius: float, turn: float = 0.0) -> Points:
    """A regular polygon with its first corner at the top, turned clockwise by `turn` of a full turn."""
    angles = [2 * math.pi * (index / corners + turn) for index in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _star(corners: int, turn: float = 0.0) -> Points:
    """Spikes of length 1.6 with notches between them."""
    outer, inner = _regular(corners, 1.6, turn), _regular(corners, 0.65, turn + 0.5 / corners)
    return [point for pair in zip(outer, inner) for point in pair]


MARKERS: tuple[Points, ...] = (
    _regular(16, 1.1),
    _regular(4, 1.35, 1 / 8),
    _regular(3, 1.5),
    _regular(4, 1.4),
    _regular(3, 1.5, 1 / 2),
    _star(4),
    _star(5),
    _star(4, 1 / 8),
    _regular(6, 1.25),
    _star(3),
)
"""Outlines of unit size, one for each colour, told apart without it."""


@dataclass(frozen=True)
class Frame:
    """Where data coordinates lie on the paper."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> float:
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * self.width

    def py(self, value: float) -> float:
        return self.top + self.height - (value - self.y[0]) / (self.y[1] - self.y[0]) * self.height


def span(values: Iterable[float], pad: float = 0.05) -> tuple[float, float]:
    """Lowest and highest value with some air; never empty."""
    found = list(values)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    return low - pad * (high - low), high + pad * (high - low)


def span_above(values: Iterable[float], base: float | None, pad: float = 0.05) -> tuple[float, float]:
    """As `span`, but no deeper than leaves a fifth of the axis for what lies above `base`: one policy that fell
    very far would else press all others into a line. Whoever draws says what lies below.
    """
    found = list(values)
    above = max(found, default=0.0) - base if base is not None else 0.0
    return span((max(value, base - 4 * above) for value in found) if base is not None and above > 0 else found, pad)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1000:g}k".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def tag(name: str, content: str | Markup = "", **attributes: object) -> Markup:
    """One SVG element; a trailing underscore is dropped (`class_`), others become hyphens."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_coordinate(value))}"' for key, value in attributes.items()
    )
    inner = content if isinstance(content, Markup) else escape(visible(content))
    return Markup(f"<{name}{written}>{inner}</{name}>")


def _coordinate(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def group(parts: Iterable[Markup], **attributes: object) -> Markup:
    return tag("g", Markup("").join(parts), **attributes)


def line(frame: Frame, points: Points, class_: str) -> Markup:
    path = "L".join(f"{frame.px(x):.1f} {frame.py(y):.1f}" for x, y in points)
    return tag("path", d=f"M{path}", class_=class_) if points else Markup("")


def dots(frame: Frame, points: Points) -> Markup:
    """Raw values: one path of round-capped strokes of no length, a third of the size of circles."""
    path = "".join(f"M{frame.px(x):.1f} {frame.py(y):.1f}h0" for x, y in points)
    return tag("path", d=path, class_="dots") if points else Markup("")


def marker(x: float, y: float, colour: int, size: float = 5.0, tip: str = "") -> Markup:
    """The method's own shape, so that colour is never the only difference."""
    corners = [f"{x + size * dx:.1f} {y + size * dy:.1f}" for dx, dy in MARKERS[colour % len(MARKERS)]]
    title = tag("title", tip) if tip else Markup("")
    return tag("path", title, d=f"M{'L'.join(corners)}z", class_=f"mark c{colour}")


def swatch(colour: int) -> Markup:
    """Colour and shape of a method, to stand before its name."""
    inner = tag("path", d="M1 7h24", class_=f"stroke c{colour}") + marker(13, 7, colour, 4.2)
    return tag("svg", inner, class_="swatch", viewBox="0 0 26 14", width=26, height=14, aria_hidden="true")


def svg(parts: Iterable[Markup], width: float, height: float, title: str, class_: str = "") -> Markup:
    content = tag("title", title) + Markup("").join(parts)
    return tag("svg", content, viewBox=f"0 0 {width:g} {height:g}", role="img", class_=f"chart {class_}".strip())


def axes(frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], *, x_labels: bool = True) -> Markup:
    """Grid, tick labels; the zero line is drawn stronger, because signs matter here."""
    bottom, right = frame.top + frame.height, frame.left + frame.width
    parts = []
    for value in y_ticks:
        y = frame.py(value)
        parts.append(tag("path", d=f"M{frame.left:.1f} {y:.1f}H{right:.1f}", class_="zero" if value == 0 else "grid"))
        parts.append(tag("text", tick_label(value), x=frame.left - 7, y=y + 4, class_="tick end"))
    for value in x_ticks:
        x = frame.px(value)
        parts.append(tag("path", d=f"M{x:.1f} {frame.top:.1f}V{bottom:.1f}", class_="grid"))
        if x_labels:
            parts.append(tag("text", tick_label(value), x=x, y=bottom + 16, class_="tick mid"))
    return group(parts)


def small_panel(title: str, lines: Sequence[tuple[int, bool, bool, Points]]) -> Markup:
    """A chart over steps without a script. `lines`: colour, raw?, dashed?, points."""
    width, height = 360.0, 190.0
    thick = [point for _, raw, _, points in lines for point in points if not raw] or [(0.0, 0.0)]
    faint = sorted(y for _, raw, _, points in lines for _, y in points if raw)
    # Single wild steps would flatten every curve: the axis covers the means and 98 % of the raw values.
    middle = faint[len(faint) // 100 : len(faint) - len(faint) // 100]
    frame = Frame(
        46,
        8,
        width - 54,
        height - 34,
        span((x for x, _ in thick), 0.02),
        span([*(y for _, y in thick), *middle], 0.06),
    )
    parts = [axes(frame, ticks(*frame.x, 4), ticks(*frame.y, 4))]
    inside = []
    for colour, raw, dashed, points in sorted(lines, key=lambda entry: not entry[1]):
        drawn = dots(frame, points) if raw else line(frame, points, "curve dashed" if dashed else "curve")
        inside.append(group([drawn], class_=f"c{colour}"))
    parts.append(clip(frame, inside))
    return svg(parts, width, height, title, "static")


def clip(frame: Frame, parts: Iterable[Markup]) -> Markup:
    """A nested viewport instead of a clipPath: no ids, so any number of charts share a page."""
    box = f"{frame.left:g} {frame.top:g} {frame.width:g} {frame.height:g}"
    return tag(
        "svg",
        Markup("").join(parts),
        x=frame.left,
        y=frame.top,
        width=frame.width,
        height=frame.height,
        viewBox=box,
    )


def interval_bar(
    row: Row, colour: int, scale: tuple[float, float], base: Row | None, seeds: Sequence[float] = ()
) -> Markup:
    """Gold with its interval on the table's common scale; the dashed line is the baseline, dots are seeds."""
    frame = Frame(6, 2, 248, 20, scale, (0, 1))
    parts, ends = [], ""
    if base is not None and base.gold is not None:
        parts.append(tag("path", d=f"M{frame.px(base.gold):.1f} 0V24", class_="reference"))
    if row.gold is not None and row.gold < scale[0]:
        parts.append(tag("text", "◀ off the scale", x=frame.left, y=16.0, class_="tick"))
        return svg(parts, 260, 24, f"gold {number(row.gold)}, off the scale", "interval")
    if row.gold_low is not None and row.gold_high is not None:
        low, high = frame.px(row.gold_low), frame.px(row.gold_high)
        bar = f"M{low:.1f} 12H{high:.1f}M{low:.1f} 7v10M{high:.1f} 7v10"
        parts.append(tag("path", d=bar, class_=f"stroke c{colour}"))
        ends = f" [{number(row.gold_low)}, {number(row.gold_high)}]"
    parts += [
        tag("circle", cx=frame.px(seed), cy=20, r=1.8, class_=f"mark c{colour}") for seed in seeds if seed >= scale[0]
    ]
    if row.gold is not None:
        parts.append(marker(frame.px(row.gold), 12, colour, 2.8))
    return svg(parts, 260, 24, f"gold {number(row.gold)}{ends}", "interval")
