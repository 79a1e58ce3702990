"""Metrics as lines to draw: every raw value, and beside it a moving mean that is named as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from klimb.report.load import Run

WINDOW = 9
"""Steps of the moving mean: one batch of 128 samples is too noisy to read a peak from."""
BUDGET = 15_000
"""Values embedded per section, over all lines; more steps are thinned, and the page says so."""

Values = list[float | None]


@dataclass(frozen=True)
class Panel:
    """One chart over steps. A second key is drawn dashed."""

    title: str
    keys: tuple[str, ...]
    about: str
    unit: str = ""


PANELS: dict[str, tuple[Panel, ...]] = {
    "rl": (
        Panel("Reward (proxy)", ("reward/mean",), "what training climbs"),
        Panel("Gold", ("gold/mean",), "same completions, a judge training never sees"),
        Panel("KL to the reference", ("kl",), "how far the policy has moved", "nats/reply"),
        Panel("Entropy", ("entropy",), "what is left to explore", "nats/token"),
        Panel("Length", ("length/mean",), "mean completion", "tokens"),
        Panel("Truncated", ("finish/length",), "share of completions ended by the length limit"),
        Panel("Clip fraction", ("clip_fraction",), "share of tokens whose ratio left the trust region"),
        Panel("Explained variance", ("critic/explained_variance",), "of the returns, by the critic"),
        Panel("Gradient norm", ("grad_norm",), "before clipping"),
        Panel("Groups without variance", ("groups/no_variance",), "share of prompts that teach nothing"),
        Panel("β", ("beta",), "the KL coefficient"),
    ),
    "preference": (
        Panel("Loss", ("loss", "eval/loss"), "per pair"),
        Panel("Accuracy", ("accuracy", "eval/accuracy"), "pairs in the right order"),
        Panel("Margin", ("margin",), "implicit reward, chosen minus rejected", "nats"),
        Panel(
            "Log-ratio to the reference",
            ("chosen_log_ratio", "rejected_log_ratio"),
            "chosen; dashed: rejected",
            "nats",
        ),
        Panel("Log-probability", ("chosen_logps", "rejected_logps"), "chosen; dashed: rejected", "nats"),
        Panel("Displaced pairs", ("displaced",), "share whose chosen fell below the reference as the margin grew"),
    ),
    "online_preference": (
        Panel("Reward (proxy)", ("reward/mean",), "what ranks the pairs"),
        Panel("Gold", ("gold/mean",), "same completions, a judge training never sees"),
        Panel("Loss", ("loss",), "per pair"),
        Panel("Margin", ("margin",), "implicit reward, chosen minus rejected", "nats"),
        Panel("Log-ratio to the reference", ("chosen_log_ratio", "rejected_log_ratio"), "dashed: rejected", "nats"),
        Panel("Length", ("length/mean",), "mean completion", "tokens"),
    ),
    "distill": (
        Panel("Divergence from the teacher", ("loss",), "what training lowers", "nats per token"),
        Panel("Length", ("length/mean",), "mean completion", "tokens"),
        Panel("Gradient norm", ("grad_norm",), "before clipping"),
    ),
    "reward": (
        Panel("Accuracy", ("accuracy", "eval/accuracy"), "pairs in the right order"),
        Panel("Loss", ("loss", "eval/loss"), "Bradley–Terry, nats per pair"),
        Panel("Margin", ("margin",), "score of chosen minus rejected"),
    ),
    "sft": (
        Panel("Loss", ("loss", "eval/loss"), "nats per token"),
        Panel("Token accuracy", ("accuracy", "eval/accuracy"), "share of tokens that are the likeliest one"),
    ),
}


@dataclass
class Track:
    """One line per metric over common x values. `raw` ones are drawn faint, the others thick."""

    label: str
    colour: int
    raw: bool
    x: dict[str, Values]
    """"step", "tokens", "seconds"; an axis that the run did not record holds None."""
    values: dict[str, Values]


def moving_mean(values: Sequence[float | None], window: int = WINDOW) -> Values:
    """Centred mean over at most `window` steps, fewer at both ends; None where the value itself is None."""
    half = window // 2
    smooth: Values = []
    for index, value in enumerate(values):
        near = [v for v in values[max(0, index - half) : index + half + 1] if v is not None]
        smooth.append(None if value is None else sum(near) / len(near))
    return smooth


def column(run: Run, key: str) -> Values:
    return [step.get(key) for step in run.metrics]


_UNSCORED = ("/abstain", "/timeout", "/error")
"""Ends of metrics that count rows; drawn where there was one."""


def panels_of(stage: str, runs: Sequence[Run]) -> list[Panel]:
    """The panels with something to show, and one for every component of the reward."""
    names = sorted({name for run in runs for step in run.metrics for name in step})
    known = [
        replace(panel, about=f"{panel.about}; dashed: held out") if f"eval/{panel.keys[0]}" in names else panel
        for panel in PANELS.get(stage, ())
        if any(key in names for key in panel.keys)
    ]
    components = [name for name in names if name.startswith("reward/") and name not in ("reward/mean", "reward/std")]
    if stage == "rl" and len(components) > 1:
        known += [Panel(f"Reward: {name.removeprefix('reward/')}", (name,), "one component") for name in components]
    unscored = [name for name in names if name.startswith("verdict/") and name.endswith(_UNSCORED)]
    known += [
        Panel(f"Unscored: {name.removeprefix('verdict/')}", (name,), "rows of a step without a score")
        for name in unscored if any(step.get(name) for run in runs for step in run.metrics)
    ]  # fmt: skip
    return known


def tracks_of(runs: Sequence[Run], panels: Sequence[Panel], colours: dict[str, int]) -> tuple[list[Track], int]:
    """Tracks of all runs of a stage kind, and the stride they were thinned by (1: every step is there).

    Per method: each seed's values as they are, and one thick line, the moving mean; with several seeds the
    mean of theirs, as far as all of them have come.
    """
    keys = [key for panel in panels for key in panel.keys]
    total = 2 * len(keys) * sum(len(run.metrics) for run in runs)
    stride = max(1, -(-total // BUDGET))
    tracks = []
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        if run.metrics:
            by_method.setdefault(run.method, []).append(run)
    for method, group in by_method.items():
        colour = colours[method]
        smooth = [_track(run, keys, colour, raw=False) for run in group]
        for run in group:
            tracks.append(_thinned(_track(run, keys, colour, raw=True), stride))
        tracks.append(_thinned(_mean(smooth), stride))
    return tracks, stride


def peaks(runs: Sequence[Run]) -> dict[str, tuple[float, float, float | None]]:
    """Method -> (highest moving mean of gold, its step, moving mean of KL there); methods with one run only.

    The maximum of a noisy mean is biased upwards (by about half its standard error): for describing only.
    """
    found: dict[str, tuple[float, float, float | None]] = {}
    methods = [run.method for run in runs]
    for run in runs:
        gold, kl = moving_mean(column(run, "gold/mean")), moving_mean(column(run, "kl"))
        known = [(value, index) for index, value in enumerate(gold) if value is not None]
        if known and methods.count(run.method) == 1:
            value, index = max(known)
            found[run.method] = (value, run.metrics[index]["step"], kl[index])
    return found


def trend(run: Run, key: str) -> tuple[float, float] | None:
    """Means of the first and of the last `WINDOW` logged values; None with fewer than two windows of them."""
    logged = [value for value in column(run, key) if value is not None]
    if len(logged) < 2 * WINDOW:
        return None
    return sum(logged[:WINDOW]) / WINDOW, sum(logged[-WINDOW:]) / WINDOW


def embedded(tracks: Sequence[Track], panels: Sequence[Panel]) -> dict[str, Any]:
    """What the page's script draws from: methods by their place in the section's list, never by a text."""
    methods = list(dict.fromkeys(track.label for track in tracks))
    return {
        "panels": [list(panel.keys) for panel in panels],
        "tracks": [
            {
                "method": methods.index(track.label),
                "colour": track.colour,
                "raw": track.raw,
                "x": _rounded(track.x),
                "values": _rounded(track.values),
            }
            for track in tracks
        ],
    }


def _rounded(columns: dict[str, Values]) -> dict[str, Values]:
    return {
        key: [None if value is None else float(f"{value:.5g}") for value in values]
        for key, values in columns.items()
        if any(value is not None for value in values)
    }


def _track(run: Run, keys: Sequence[str], colour: int, raw: bool) -> Track:
    """Values logged on less than every second step (evaluations) are drawn as they are, without a mean."""
    seconds: Values = []
    for step in run.metrics:
        took = step.get("time/step")
        before = seconds[-1] if seconds else 0.0
        seconds.append(None if took is None or before is None else before + took)
    values = {}
    for key in keys:
        logged = column(run, key)
        sparse = 2 * sum(value is not None for value in logged) < len(logged)
        values[key] = logged if raw or sparse else moving_mean(logged)
    return Track(
        run.method,
        colour,
        raw,
        {"step": column(run, "step"), "tokens": column(run, "tokens"), "seconds": seconds},
        values,
    )


def _mean(tracks: list[Track]) -> Track:
    shortest = min(len(track.x["step"]) for track in tracks)

    def across(columns: list[Values]) -> Values:
        rows = zip(*(values[:shortest] for values in columns))
        return [None if None in row else sum(v for v in row if v is not None) / len(row) for row in rows]

    first = tracks[0]
    return Track(
        first.label,
        first.colour,
        False,
        {axis: across([track.x[axis] for track in tracks]) for axis in first.x},
        {key: across([track.values[key] for track in tracks]) for key in first.values},
    )


def _thinned(track: Track, stride: int) -> Track:
    """Every `stride`-th step, and the last one, where a run's end is read."""
    if stride == 1:
        return track
    length = len(track.x["step"])
    kept = sorted({*range(0, length, stride), length - 1})

    def thin(columns: dict[str, Values]) -> dict[str, Values]:
        return {key: [values[i] for i in kept] for key, values in columns.items()}

    return Track(track.label, track.colour, track.raw, thin(track.x), thin(track.values))
