"""The picture of the whole page: proxy and gold against √KL, one above the other on a common axis.

Distance travelled is √KL (Gao et al. 2022, "Scaling laws for reward model overoptimization"):
in it gains start out linear. Where the upper panel climbs on and the lower one falls, the proxy is exploited.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from klimb.report import charts
from klimb.report.charts import Frame, Points
from klimb.report.labels import Box, Label, Space, around, line_boxes
from klimb.report.load import Records, Row
from klimb.report.paths import METRIC, Path, Quantity, paths_of
from klimb.report.text import number

NAMES: dict[Quantity, str] = {"proxy": "Proxy: what training saw", "gold": "Gold: what was meant"}
DOTS = 1500
"""Raw points drawn per panel; more than that are thinned."""
LINE_POINTS = 1500
"""Points of all lines of a panel together."""


def picture(records: Records, colours: dict[str, int], base: Row | None, narrow: bool = False) -> Markup | None:
    """SVG, or None when nothing has both a KL and a score. `narrow` is laid out for a phone."""
    paths = paths_of(records, colours)
    rows = [row for row in records.rows if row.kl is not None]
    shown = [quantity for quantity in METRIC if _worth_showing(quantity, paths, rows)]
    if not shown:
        return None
    width, left, gap = (390.0, 38.0, 44.0) if narrow else (1120.0, 58.0, 52.0)
    heights: dict[Quantity, float] = {"proxy": 190, "gold": 290} if narrow else {"proxy": 250, "gold": 430}
    farthest = max(0.5, *(x for path in paths for x in path.reach), *(math.sqrt(max(row.kl or 0, 0)) for row in rows))
    x_range = (-0.015 * farthest, 1.04 * farthest)
    parts, top = [], 30.0
    for quantity in shown:
        y_range = _height(quantity, paths, rows, base)
        frame = Frame(left, top, width - left - 14, heights[quantity], x_range, y_range)
        parts.append(_panel(frame, quantity, paths, rows, base, narrow, last=quantity == shown[-1]))
        top += heights[quantity] + gap
    title = "Proxy and gold against the square root of the KL divergence from the reference policy"
    return charts.svg(parts, width, top + 12, title, "narrow" if narrow else "wide")


def _worth_showing(quantity: Quantity, paths: Sequence[Path], rows: Sequence[Row]) -> bool:
    drawn = any(line for path in paths for line in path.lines(quantity))
    return drawn or sum(getattr(row, quantity) is not None for row in rows) > 1


def _height(quantity: Quantity, paths: Sequence[Path], rows: Sequence[Row], base: Row | None) -> tuple[float, float]:
    values = [y for path in paths for line in path.lines(quantity) for _, y in line]
    for row in rows:
        ends = (row.proxy,) if quantity == "proxy" else (row.gold, row.gold_low, row.gold_high)
        values += [value for value in ends if value is not None]
    if quantity == "proxy":
        return charts.span(values, 0.08)
    return charts.span_above(values, None if base is None else base.gold, 0.08)


def _panel(
    frame: Frame,
    quantity: Quantity,
    paths: Sequence[Path],
    rows: Sequence[Row],
    base: Row | None,
    narrow: bool,
    last: bool,
) -> Markup:
    x_ticks = [value for value in charts.ticks(*frame.x, 4 if narrow else 8) if value >= 0]
    parts = [charts.axes(frame, x_ticks, charts.ticks(*frame.y, 5), x_labels=last)]
    parts.append(charts.tag("text", NAMES[quantity], x=frame.left, y=frame.top - 10, class_="panel-title"))
    if last:
        parts += _distance_axis(frame, x_ticks, narrow)
    parts.append(charts.clip(frame, _reference(frame, quantity, base) + _lines(frame, quantity, paths)))
    space = Space(frame, crossed=line_boxes(frame, [line for path in paths for line in path.lines(quantity)]))
    colours = {path.method: path.colour for path in paths}
    for row in rows:
        parts += _end(space, quantity, row, colours[row.method])
    for path in paths:
        parts += _curve_marks(space, quantity, path)
        if quantity == "gold":
            parts += _peak(space, path)
        if not any(label.colour == path.colour for label in space.labels):
            space.labels += _path_label(frame, quantity, path)
    return charts.group([*parts, *space.drawn()])


def _distance_axis(frame: Frame, x_ticks: Sequence[float], narrow: bool) -> list[Markup]:
    """√KL is what the axis is linear in; nats are what people quote, so both are written."""
    y = frame.top + frame.height
    parts = [
        charts.tag("text", f"{value * value:.3g}", x=frame.px(value), y=y + 31, class_="tick mid faint")
        for value in x_ticks
    ]
    right = frame.left + frame.width
    name = "√KL (below: nats)" if narrow else "√KL to the reference policy (below: KL in nats per reply)"
    return [*parts, charts.tag("text", name, x=right, y=y + 48, class_="axis end")]


def _reference(frame: Frame, quantity: Quantity, base: Row | None) -> list[Markup]:
    value = None if base is None else getattr(base, quantity)
    if base is None or value is None:
        return []
    y, right = frame.py(value), frame.left + frame.width
    parts = []
    if quantity == "gold" and base.gold_low is not None and base.gold_high is not None:
        top = frame.py(base.gold_high)
        parts.append(
            charts.tag(
                "rect",
                x=frame.left,
                y=top,
                width=frame.width,
                height=frame.py(base.gold_low) - top,
                class_="band",
            )
        )
    return [*parts, charts.tag("path", d=f"M{frame.left:.1f} {y:.1f}H{right:.1f}", class_="reference")]


def _lines(frame: Frame, quantity: Quantity, paths: Sequence[Path]) -> list[Markup]:
    total = sum(len(path.raw.get(quantity, [])) for path in paths)
    stride = max(1, -(-total // DOTS))
    line_stride = max(1, -(-total // LINE_POINTS))
    parts = [
        charts.group([charts.dots(frame, path.raw.get(quantity, [])[::stride])], class_=f"c{path.colour}")
        for path in paths
    ]
    for path in paths:
        thin = len(path.smooth.get(quantity, [])) > 1
        drawn = [
            charts.line(frame, _thinned(points, line_stride), "curve thin" if thin else "curve")
            for points in path.smooth.get(quantity, [])
        ]
        drawn.append(charts.line(frame, [(x, y) for x, y, _ in path.curve.get(quantity, [])], "curve dashed"))
        parts.append(charts.group(drawn, class_=f"c{path.colour}"))
    return parts


def _thinned(points: Points, stride: int) -> Points:
    return points if stride == 1 or not points else [*points[::stride], points[-1]]


def _end(space: Space, quantity: Quantity, row: Row, colour: int) -> list[Markup]:
    """The evaluation of a finished policy, with its interval."""
    value = getattr(row, quantity)
    if value is None or row.kl is None:
        return []
    frame = space.frame
    x, y = frame.px(math.sqrt(max(row.kl, 0.0))), frame.py(value)
    if value < frame.y[0]:
        return _below(space, row, x, f"{row.method} {number(value)} ▼", colour)
    parts, ends = [], ""
    if quantity == "gold" and row.gold_low is not None and row.gold_high is not None:
        low, high = frame.py(row.gold_low), frame.py(row.gold_high)
        bar = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
        parts.append(charts.tag("path", d=bar, class_=f"stroke c{colour}"))
        space.taken.append(Box(x - 7, high, x + 7, low))
        ends = f" [{number(row.gold_low)}, {number(row.gold_high)}]"
    tip = f"{row.method}: {quantity} {number(value)}{ends} at KL {number(row.kl)}"
    parts.append(charts.marker(x, y, colour, 5.5, tip))
    space.taken.append(around(x, y, 7))
    space.labels.append(Label(x, y, row.method, colour))
    return parts


def _below(space: Space, row: Row, x: float, name: str, colour: int) -> list[Markup]:
    """A policy under the panel's floor: its mark lies on the lower edge, and its name says how far down it is."""
    y = space.frame.top + space.frame.height - 6
    space.taken.append(around(x, y, 7))
    space.labels.append(Label(x, y, name, colour))
    return [charts.marker(x, y, colour, 5.5, f"{name}, below the axis, at KL {number(row.kl)}")]


def _curve_marks(space: Space, quantity: Quantity, path: Path) -> list[Markup]:
    parts = []
    for x_value, y_value, name in path.curve.get(quantity, []):
        x, y = space.frame.px(x_value), space.frame.py(y_value)
        tip = charts.tag("title", f"{path.method} {name}: {quantity} {number(y_value)} at KL {number(x_value**2)}")
        parts.append(charts.tag("circle", tip, cx=x, cy=y, r=2.6, class_=f"mark c{path.colour}"))
        box = Box(x - 22, y - 22, x + 22, y - 6)
        if name and quantity == "gold" and space.free(box):
            parts.append(charts.tag("text", name, x=x, y=y - 9, class_="tick mid"))
            space.taken.append(box)
        space.taken.append(around(x, y, 4))
    return parts


def _peak(space: Space, path: Path) -> list[Markup]:
    """A ring where the moving mean of gold was highest, if it fell by more than a tenth of the axis since."""
    lines, frame = path.smooth.get("gold", []), space.frame
    if len(lines) != 1:
        return []
    x_value, y_value = max(lines[0], key=lambda point: point[1])
    if y_value - lines[0][-1][1] < 0.1 * (frame.y[1] - frame.y[0]):
        return []
    x, y = frame.px(x_value), frame.py(y_value)
    space.taken.append(around(x, y, 7))
    space.labels.append(Label(x, y, f"peak {number(y_value)}", path.colour))
    return [charts.tag("circle", cx=x, cy=y, r=6, class_=f"ring c{path.colour}")]


def _path_label(frame: Frame, quantity: Quantity, path: Path) -> list[Label]:
    """Methods without a row of their own (best-of-n, runs that are still going) are named at their end."""
    ends = [line[-1] for line in path.lines(quantity) if line][-1:]
    return [Label(frame.px(x), frame.py(y), path.method, path.colour) for x, y in ends]
