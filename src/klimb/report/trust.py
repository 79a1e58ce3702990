"""How far a reward can be trusted, as pictures on the page and as plain tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from klimb.report.charts import Frame, axes, line, marker, span, svg, tag, tick_label, ticks
from klimb.report.load import Run
from klimb.report.text import clipped, columns, finite, number, visible

_LABEL = 150.0
_ROW = 24.0


class Bar(NamedTuple):
    """A figure with its interval, of `n` cases. flagged: it is a reason for concern."""

    label: str
    value: float
    low: float
    high: float
    n: int
    flagged: bool = False


@dataclass(frozen=True)
class Chart:
    """Bars on one scale. reference: where nothing would be to be seen."""

    title: str
    about: str
    bars: list[Bar]
    reference: float

    def drawn(self) -> Markup:
        return interval_rows(self)


@dataclass(frozen=True)
class Trust:
    """One measured reward."""

    name: str
    sentences: list[str]
    reliability: Markup | None
    charts: list[Chart]


def trusts(runs: Sequence[Run]) -> list[Trust]:
    """Of every run that measured a reward."""
    found = []
    for run in runs:
        trust = run.result.get("trust")
        if isinstance(trust, Mapping):
            name = run.method if run.seed is None else f"{run.method}, seed {run.seed}"
            calibration = trust.get("calibration")
            bins = calibration.get("bins") if isinstance(calibration, Mapping) else None
            known = [point for bin in bins if (point := _point(bin))] if isinstance(bins, list) else []
            picture = reliability(known) if known else None
            found.append(Trust(name, [*sentences(run.result)], picture, [*charts(trust)]))
    return found


def told(result: Mapping[str, Any]) -> str:
    """The same as text, for a terminal."""
    trust = result["trust"]
    blocks = [visible(sentence) for sentence in sentences(result)]
    calibration = trust.get("calibration")
    if calibration:
        points = [point for bin in calibration["bins"] if (point := _point(bin))]
        blocks.append(columns([{"calibration: confidence": f"{sure:.3f}", **_cells(bar)} for sure, bar in points]))
    for chart in charts(trust):
        blocks.append(columns([{chart.title.lower(): visible(clipped(bar.label, 60)), **_cells(bar)}
                               for bar in chart.bars]))  # fmt: skip
    return "\n\n".join(blocks)


def _cells(bar: Bar) -> dict[str, str]:
    flag = {" ": "flagged" if bar.flagged else ""}
    return {"mean": f"{bar.value:.3f}", "low": f"{bar.low:.3f}", "high": f"{bar.high:.3f}", "n": str(bar.n), **flag}


# What there is to say -------------------------------------------------------------------------------------------------


def sentences(result: Mapping[str, Any]) -> Iterator[str]:
    trust, right = result["trust"], _bar("", result)
    if right is not None:
        yield f"{_share(right)} of {result.get('held_out_pairs')} pairs in the right order."
    if (calibration := _of(trust, "calibration")) and (ece := finite(calibration.get("ece"))) is not None:
        over = finite(calibration.get("overconfidence")) or 0.0
        yield (f"Expected calibration error {number(ece, 3)}; on average it is "
               f"{'too' if over > 0 else 'not too'} sure of itself ({number(over, 3)}).")  # fmt: skip
    if length := _of(trust, "length"):
        plain, partial = (number(finite(length.get(key)), 2) for key in ("correlation", "partial"))
        given = {"gold": "gold", "label": "which reply was chosen"}.get(str(length.get("given")), "the label")
        yield (f"Correlation of score and length {plain}, given {given} {partial} (of {length.get('given')} and length "
               f"{number(finite(length.get('of_labels')), 2)}).")  # fmt: skip
    if agreed := _bar("", _of(trust, "agreement"), "agreement"):
        yield f"It agrees with the other reward on {_share(agreed)} of the pairs."
    if members := _of(trust, "members"):
        each = [bar for found in members.get("accuracies") or () if (bar := _bar("", found))]
        apart = number(finite(members.get("detects_errors")), 2)
        yield (f"{len(each)} members, alone {', '.join(number(bar.value, 3) for bar in each)}; two of them agree on "
               f"{number(finite(members.get('agreement')), 3)}. A wrong pair has the larger disagreement than a right "
               f"one with probability {apart} (0.5: it says nothing).")  # fmt: skip
    if drift := _of(trust, "drift"):
        for name in ("length", "score"):
            if moved := _of(drift, name):
                yield _drifted(name, moved)
        if then := _bar("", _of(drift, "accuracy_then")):
            yield f"On the pairs that it was trained on {_share(then)} are in the right order."


def _drifted(name: str, moved: Mapping[str, Any]) -> str:
    then, now, ks, low, high = (number(finite(moved.get(key)), 2) for key in ("then", "now", "ks", "ks_low", "ks_high"))
    verdict = "more than chance gives" if moved.get("flagged") else "no more than chance gives"
    return (f"Since it was trained the mean {name} of replies went from {then} to {now}: Kolmogorov–Smirnov distance "
            f"{ks} [{low}, {high}], {verdict}.")  # fmt: skip


def charts(trust: Mapping[str, Any]) -> Iterator[Chart]:
    spans = {
        "by_length": ("Accuracy by length", "characters that the chosen reply has more than the rejected one"),
        "by_margin": ("Accuracy by margin", "how much better the labellers found the chosen reply"),
        "by_disagreement": ("Accuracy by disagreement", "std over the members of a pair's difference"),
    }
    places: dict[str, Any] = {**trust, "by_disagreement": _of(trust, "members").get("by_disagreement")}
    for key, (title, about) in spans.items():
        bins = places.get(key)
        bars = [bar for bin in bins if (bar := _bar(_range(bin), bin))] if isinstance(bins, list) else []
        if len(bars) > 1:
            yield Chart(title, about, bars, 0.5)
    parts = [bar for name, part in _of(trust, "by").items() if (bar := _bar(str(name), part))]
    if parts:
        column = str(trust.get("column", "part"))
        mean = number(finite(trust.get("mean_of_parts")), 3)
        yield Chart(f"Accuracy by {column}", f"mean of the {len(parts)} parts {mean}", parts, 0.5)
    probes = [bar for name, probe in _of(trust, "probes").items() if (bar := _bar(str(name), probe, "gain"))]
    if probes:
        yield Chart("Probes", "what a change that makes a reply no better adds to its score", probes, 0.0)


def _of(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = holder.get(key)
    return found if isinstance(found, Mapping) else {}


def _bar(label: str, found: Any, name: str = "accuracy") -> Bar | None:
    """None where a figure is missing: files of runs may be damaged."""
    if not isinstance(found, Mapping):
        return None
    value, low, high = (finite(found.get(f"{name}{end}")) for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return None
    return Bar(label, value, low, high, int(finite(found.get("n")) or 0), bool(found.get("flagged")))


def _point(bin: Any) -> tuple[float, Bar] | None:
    """How sure the reward is, and how right."""
    sure, bar = finite(bin.get("confidence")) if isinstance(bin, Mapping) else None, _bar("", bin)
    return None if sure is None or bar is None else (sure, bar)


def _range(bin: Any) -> str:
    low, high = (finite(bin.get(key)) if isinstance(bin, Mapping) else None for key in ("from", "to"))
    ends = [tick_label(float(f"{end:.3g}")) for end in (low, high) if end is not None]
    return " to ".join(dict.fromkeys(ends))


def _share(bar: Bar) -> str:
    return f"{number(bar.value, 3)} [{number(bar.low, 3)}, {number(bar.high, 3)}]"


# Drawn ----------------------------------------------------------------------------------------------------------------


def reliability(bars: Sequence[tuple[float, Bar]]) -> Markup:
    """How often pairs are in the right order against how sure the reward is of them; on the diagonal it is honest."""
    width, height = 360.0, 250.0
    frame = Frame(46, 8, width - 58, height - 50, (0.48, 1.02), (min([0.45, *(bar.low for _, bar in bars)]), 1.02))
    parts = [axes(frame, ticks(0.5, 1.0, 5), ticks(*frame.y, 5))]
    parts.append(tag("path", d=f"M{frame.px(0.5):.1f} {frame.py(0.5):.1f}L{frame.px(1):.1f} {frame.py(1):.1f}",
                     class_="reference"))  # fmt: skip
    for sure, bar in bars:
        x = frame.px(sure)
        parts.append(tag("path", d=f"M{x:.1f} {frame.py(bar.low):.1f}V{frame.py(bar.high):.1f}", class_="stroke c2"))
    parts.append(tag("g", line(frame, [(sure, bar.value) for sure, bar in bars], "curve thin"), class_="c2"))
    for sure, bar in bars:
        tip = f"sure to {number(sure, 3)}: {_share(bar)} of {bar.n} pairs in order"
        parts.append(marker(frame.px(sure), frame.py(bar.value), 2, 4.0, tip))
    parts.append(tag("text", "σ(difference): how sure it is", x=frame.left + frame.width / 2, y=height - 6,
                     class_="axis mid"))  # fmt: skip
    return svg(parts, width, height, "Reliability: share in the right order by confidence")


def interval_rows(chart: Chart) -> Markup:
    """One line a bar: its label, its value and interval on a common scale."""
    width, height = 400.0, _ROW * len(chart.bars) + 30
    ends = [end for bar in chart.bars for end in (bar.low, bar.high)]
    frame = Frame(_LABEL, 4, width - _LABEL - 12, height - 30, span([*ends, chart.reference]), (0, len(chart.bars)))
    parts = [axes(frame, ticks(*frame.x, 4), [])]
    x = frame.px(chart.reference)
    parts.append(tag("path", d=f"M{x:.1f} {frame.top:.1f}V{frame.top + frame.height:.1f}", class_="reference"))
    for place, bar in enumerate(chart.bars):
        y, colour = frame.top + _ROW * (place + 0.5), 3 if bar.flagged else 2
        text = f"{bar.label} ⚑" if bar.flagged else bar.label
        parts.append(tag("text", clipped(text, 22) if len(text) > 24 else text, x=_LABEL - 10, y=y + 4,
                         class_="tick end"))  # fmt: skip
        parts.append(tag("path", d=f"M{frame.px(bar.low):.1f} {y:.1f}H{frame.px(bar.high):.1f}",
                         class_=f"stroke c{colour}"))  # fmt: skip
        tip = f"{bar.label}: {number(bar.value, 3)} [{number(bar.low, 3)}, {number(bar.high, 3)}], n = {bar.n}"
        parts.append(marker(frame.px(bar.value), y, colour, 3.6, tip))
    return svg(parts, width, height, chart.title)
