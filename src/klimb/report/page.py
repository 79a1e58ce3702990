"""Puts the page together: numbers from the files, every text escaped, style and script pinned by hash."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from klimb.report import charts
from klimb.report.definitions import definitions
from klimb.report.headline import TRAINED, Verdict, baseline, decimals, headline, paired_differences, verdict
from klimb.report.load import Records, Row, Run, load
from klimb.report.picture import picture
from klimb.report.replies import replies
from klimb.report.text import clipped, duration, finite, number, visible, without_credentials
from klimb.report.tracks import WINDOW, Panel, Track, embedded, panels_of, peaks, tracks_of
from klimb.report.trust import trusts

HERE = Path(__file__).parent
COLOURS = 10
STATIC_POINTS = 200
EVENTS = 60
DOCUMENT_LIMIT = 8_000
SECTIONS = {
    "rl": ("Reinforcement learning, step by step", "every online run"),
    "preference": ("Preference optimisation", "pairs, no sampling"),
    "online_preference": ("Preference optimisation on own samples", "pairs ranked by a reward"),
    "distill": ("Distillation", "towards a teacher"),
    "reward": ("Reward model", "what the proxy was fitted to"),
    "sft": ("Supervised fine-tuning", "the start, and the reference of every KL"),
}
VERDICTS: dict[Verdict, str] = {
    "baseline": "baseline",
    "better": "▲ better",
    "worse": "▼ worse",
    "not shown": "≈ not shown",
    "no gold": "",
}


@dataclass(frozen=True)
class TableRow:
    row: Row
    colour: int
    verdict: Verdict
    verdict_text: str
    bar: Markup


@dataclass(frozen=True)
class Section:
    """Time series of one kind of stage."""

    kind: str
    title: str
    about: str
    methods: list[tuple[str, int]]
    panels: list[tuple[Panel, Markup]]
    seeds: int
    stride: int


def write_report(directory: Path) -> Path:
    """Writes `directory`/report.html and returns its path: one file under 1 MB, no network, no torch.

    `directory` is a run (metrics.jsonl, result.json, ...) or a pipeline (summary.json and one run per stage,
    several seeds below seed-N/). Missing or damaged pieces shorten the report, damaged ones are named in it.
    Raises NotADirectoryError, and OSError where the page cannot be written.
    """
    path = directory / "report.html"
    page = render(load(directory))
    partial = directory / ".report.html.partial"
    partial.write_text(page, encoding="utf-8", newline="\n")
    os.replace(partial, path)
    return path


def render(records: Records) -> str:
    """The whole page as text."""
    colours = method_colours(records)
    base = baseline(records.rows)
    asked, replies_source = replies(records)
    style = _asset("vendor/uPlot.min.css") + _asset("style.css")
    script = _asset("vendor/uPlot.iife.min.js") + _asset("report.js")
    sections, data = _sections(records, colours)
    peak = peaks([run for run in records.runs if run.stage == "rl"])
    events = sorted(
        ({"run": run, **_event(event)} for run in records.runs for event in run.events),
        key=lambda event: event["kind"] != "alarm",
    )
    return _environment().get_template("template.html.jinja").render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        records=records,
        simulated=bool(records.summary.get("simulated_labels")),
        headline=headline(records, peak),
        base=base,
        table=_table(records, base, colours),
        has_gold=any(row.gold is not None for row in records.rows),
        has_n=any(row.n is not None for row in records.rows),
        decimals=decimals(records.rows),
        picture_wide=picture(records, colours, base),
        picture_narrow=picture(records, colours, base, narrow=True),
        picture_methods=_picture_methods(records, colours),
        trusts=trusts(records.runs),
        sections=sections,
        series=data,
        asked=asked,
        replies_source=replies_source,
        colours=colours,
        events=events[:EVENTS],
        events_left=max(0, len(events) - EVENTS),
        definitions=definitions(records),
        documents=_documents(records),
        total_seconds=_total_seconds(records),
        window=WINDOW,
    )  # fmt: skip


def method_colours(records: Records) -> dict[str, int]:
    """Method -> colour, the same everywhere: 0 (grey) the start, 1 (black) best-of-n, then by row."""
    base = baseline(records.rows)
    colours: dict[str, int] = {} if base is None else {base.method: 0}
    named: list[Row | Run] = [
        *records.rows,
        *(run for run in records.runs if run.stage in TRAINED),
        *records.runs,
    ]
    for entry in named:
        if entry.stage == "sample" and 1 not in colours.values():
            colours.setdefault(entry.method, 1)
    for method in (entry.method for entry in named):
        if method not in colours:
            taken = sum(colour > 1 for colour in colours.values())
            colours[method] = 2 + taken % (COLOURS - 2)
    return colours


def _table(records: Records, base: Row | None, colours: dict[str, int]) -> list[TableRow]:
    rows, paired = records.rows, paired_differences(records.summary)
    seeds = [row for row in records.seed_rows if row.gold is not None]
    ends = [value for row in rows for value in (row.gold, row.gold_low, row.gold_high) if value is not None]
    golds = [*ends, *(row.gold for row in seeds if row.gold is not None)]
    scale = charts.span_above(golds, None if base is None else base.gold)
    table = []
    for row in rows:
        result = verdict(row, base, paired)
        own = [seed.gold for seed in seeds if seed.method == row.method and seed.gold is not None]
        bar = charts.interval_bar(row, colours[row.method], scale, base, own)
        table.append(TableRow(row, colours[row.method], result, VERDICTS[result] if base else "", bar))
    return table


def _picture_methods(records: Records, colours: dict[str, int]) -> list[tuple[str, int]]:
    drawn = {row.method for row in records.rows if row.kl is not None}
    drawn |= {
        run.method for run in records.runs if run.result.get("curve") or any("kl" in step for step in run.metrics)
    }
    return [(method, colour) for method, colour in colours.items() if method in drawn]


def _sections(records: Records, colours: dict[str, int]) -> tuple[list[Section], dict[str, Any]]:
    sections, data = [], {}
    for kind, (title, about) in SECTIONS.items():
        runs = [run for run in records.runs if run.stage == kind and run.metrics]
        panels = panels_of(kind, runs)
        if not panels:
            continue
        tracks, stride = tracks_of(runs, panels, colours)
        methods = [(method, colours[method]) for method in dict.fromkeys(run.method for run in runs)]
        drawn = [(panel, _static(panel, tracks)) for panel in panels]
        seeds = max(sum(run.method == method for run in runs) for method, _ in methods)
        sections.append(Section(kind, title, about, methods, drawn, seeds, stride))
        data[kind] = embedded(tracks, panels)
    return sections, data


def _static(panel: Panel, tracks: Sequence[Track]) -> Markup:
    raw = sum(track.raw for track in tracks) or 1
    lines = []
    for track in tracks:
        for index, key in enumerate(panel.keys):
            pairs = zip(track.x["step"], track.values[key])
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            most = max(20, 3 * STATIC_POINTS // raw) if track.raw else STATIC_POINTS
            lines.append((track.colour, track.raw, index > 0, points[:: max(1, -(-len(points) // most))]))
    return charts.small_panel(panel.title, lines)


def _event(event: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in event.items() if key not in ("step", "kind", "message")}
    told = str(event.get("message", ""))
    return {
        "kind": clipped(str(event.get("kind", "event")), 40),
        "step": finite(event.get("step")),
        "message": clipped(told or str(rest), 600),
    }


def _documents(records: Records) -> list[tuple[str, str]]:
    """Title and YAML of everything that was configured and recorded, to fold away."""
    found = [("Pipeline: config.yaml", records.config), ("Pipeline: manifest", _yaml(records.manifest))]
    for run in records.runs:
        where = run.name if run.seed is None else f"{run.name}, seed {run.seed}"
        # The other seeds' configurations differ in the seed alone.
        if run.seed is None or run.seed == records.seeds[0]:
            found += [(f"{where}: config.yaml", run.config), (f"{where}: manifest", _yaml(run.manifest))]
    return [(title, without_credentials(clipped(text, DOCUMENT_LIMIT))) for title, text in found if text.strip()]


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False) if value else ""


def _total_seconds(records: Records) -> float | None:
    found = [seconds for run in records.runs if (seconds := finite(run.result.get("seconds"))) is not None]
    return sum(found) if found else None


@cache
def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    """Autoescape for every value, and whatever a reader could not see is made visible before that."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"number": number, "duration": duration, "swatch": charts.swatch, "finite": finite}
    return environment
