"""The answer in words: did the policy really get better? Each sentence follows from the rows by a rule."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from klimb.report.load import Records, Row, Run
from klimb.report.text import finite, number
from klimb.report.tracks import WINDOW, trend

Verdict = Literal["baseline", "better", "worse", "not shown", "no gold"]
TRAINED = ("rl", "preference", "online_preference", "distill")
_NO_LEASH = re.compile(r"β\s*=\s*0(?:\.0*)?(?![\d.])")


@dataclass(frozen=True)
class Headline:
    """`answer` is the first sentence, `details` the rest; `tone` colours the edge and adds nothing."""

    answer: str
    details: list[str]
    tone: Literal["better", "worse", "open"]


def baseline(rows: list[Row]) -> Row | None:
    """The policy before it was trained on a reward: the first SFT row."""
    return next((row for row in rows if row.stage == "sft" or row.method.upper().startswith("SFT")), None)


def verdict(row: Row, base: Row | None, paired: dict[str, tuple[float, float]] | None = None) -> Verdict:
    """Intervals apart: better or worse. Overlapping, or no interval: not shown.

    Where the interval of the paired difference over seeds is known it decides, because seeds vary together.
    """
    if base is not None and row.method == base.method:
        return "baseline"
    if row.gold is None:
        return "no gold"
    low, high = (paired or {}).get(row.method, (None, None))
    if low is not None and high is not None:
        return "better" if low > 0 else "worse" if high < 0 else "not shown"
    if base is None:
        return "not shown"
    if _above(row, base):
        return "better"
    return "worse" if _above(base, row) else "not shown"


def paired_differences(summary: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Method -> interval of gold minus the baseline's gold over seeds, from summary["paired"]."""
    found: dict[str, tuple[float, float]] = {}
    entries = summary.get("paired")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            low, high = finite(entry.get("low")), finite(entry.get("high"))
            if low is not None and high is not None:
                found[str(entry.get("method"))] = (low, high)
    return found


def decimals(rows: list[Row]) -> int:
    """Three for shares such as accuracies, two otherwise."""
    golds = [abs(row.gold) for row in rows if row.gold is not None]
    return 3 if golds and max(golds) <= 1 else 2


def headline(records: Records, peaks: dict[str, tuple[float, float, float | None]]) -> Headline:
    """`peaks`: method -> (highest moving mean of gold, its step, the KL there), of single runs."""
    rows, base = records.rows, baseline(records.rows)
    places = decimals(rows or records.seed_rows)
    if not rows:
        return _without_rows(records)
    trained = [row for row in rows if _trained(row, base)]
    with_gold = [row for row in trained if row.gold is not None]
    if not with_gold:
        return _without_gold(trained, base)
    paired = paired_differences(records.summary)
    best = max(with_gold, key=lambda row: row.gold or 0.0)
    if base is None or base.gold is None:
        answer = f"{_gold(best, places)}{_at(best)}; there is no baseline here to be better than."
        return Headline(answer, _trends(records.runs), "open")
    against = f"against {_interval(base, places)} after {base.method}"
    result = verdict(best, base, paired)
    shown = {"better": "Better", "worse": "Worse"}.get(result, "Not shown to be better")
    why = _why_not(best, base, result)
    answer = f"{shown}. {_gold(best, places)} {against}{_at(best)}{why}."
    details = [
        *_others(best, with_gold, base, paired),
        *_over_optimised(best if result == "better" else base, with_gold, base, paired, places, peaks, records),
        *_yardsticks(best, rows, base, places),
        *_seeds(records, base),
    ]
    tone: Literal["better", "worse", "open"] = (
        "better" if result == "better" else "worse" if result == "worse" else "open"
    )
    return Headline(answer, details, tone)


def _above(a: Row, b: Row) -> bool:
    return a.gold_low is not None and b.gold_high is not None and a.gold_low > b.gold_high


def _trained(row: Row, base: Row | None) -> bool:
    """A policy that was trained on a reward or on preferences: neither the baseline nor a yardstick."""
    return not (base is not None and row.method == base.method) and not _yardstick(row, base)


def _yardstick(row: Row, base: Row | None) -> bool:
    """What needs no training on a reward: best-of-n, more SFT."""
    if base is not None and row.method == base.method:
        return False
    return row.stage in ("sample", "sft") or row.method.lower().startswith("best-of")


def _interval(row: Row, places: int) -> str:
    ends = [row.gold_low, row.gold_high]
    if None in ends:
        return number(row.gold, places)
    return f"{number(row.gold, places)} [{number(row.gold_low, places)}, {number(row.gold_high, places)}]"


def _gold(row: Row, places: int) -> str:
    return f"{row.method}: gold {_interval(row, places)}"


def _at(row: Row) -> str:
    return "" if row.kl is None else f", at KL {number(row.kl, 1)}"


def _why_not(row: Row, base: Row, result: Verdict) -> str:
    if result != "not shown":
        return ""
    known = None not in (row.gold_low, row.gold_high, base.gold_low, base.gold_high)
    return ": the intervals overlap" if known else ": without intervals nothing is shown"


def _others(best: Row, rows: list[Row], base: Row, paired: dict[str, tuple[float, float]]) -> list[str]:
    """The other methods by verdict; the best of several was chosen by looking, and the reader is told so."""
    rest = [row for row in rows if row is not best]
    if not rest:
        return []
    better = [row.method for row in rest if verdict(row, base, paired) == "better"]
    unclear = [row.method for row in rest if verdict(row, base, paired) == "not shown"]
    sentences = [f"It is the highest of {len(rows)} trained policies, picked after the fact."]
    if better:
        sentences.append(f"Also better than {base.method}: {', '.join(better)}.")
    if unclear:
        sentences.append(f"Not shown to be better: {', '.join(unclear)}.")
    return [" ".join(sentences)]


def _over_optimised(
    against: Row,
    rows: list[Row],
    base: Row,
    paired: dict[str, tuple[float, float]],
    places: int,
    peaks: dict[str, tuple[float, float, float | None]],
    records: Records,
) -> list[str]:
    """Worse than the baseline on gold; with a higher proxy than `against` the proxy was climbed."""
    climbed = "reward model" if any(run.stage == "reward" for run in records.runs) else "reward"
    sentences = []
    for row in rows:
        if verdict(row, base, paired) != "worse":
            continue
        subject = f"Without a leash ({row.method})" if _NO_LEASH.search(row.method) else f"With {row.method}"
        if row.proxy is None or against.proxy is None or row.proxy <= against.proxy:
            sentences.append(f"{row.method} is worse than {base.method}: gold {_interval(row, places)}{_at(row)}.")
            continue
        peak = ""
        if row.method in peaks and row.gold is not None and peaks[row.method][0] > row.gold:
            gold, step, kl = peaks[row.method]
            where = f"step {step:.0f}" + ("" if kl is None else f" (KL {number(kl, 1)})")
            peak = f" after a peak of {number(gold, places)} at {where}"
        sentences.append(
            f"{subject} the proxy ends higher ({number(row.proxy)} against {number(against.proxy)}) and gold "
            f"ends at {_interval(row, places)}{peak}: the {climbed} was climbed, not the task."
        )
    return sentences


def _yardsticks(best: Row, rows: list[Row], base: Row, places: int) -> list[str]:
    """Best-of-n and more SFT are what training on a reward has to beat."""
    sentences = []
    for row in rows:
        if _yardstick(row, base) and row.gold is not None:
            place = "below" if _above(row, best) else "above" if _above(best, row) else "not told apart from"
            told = f"{row.method} with gold {_interval(row, places)}"
            sentences.append(f"To beat without training on the reward: {told}; {best.method} is {place} it.")
    return sentences


def _seeds(records: Records, base: Row) -> list[str]:
    """On how many seeds each trained method was above the baseline, intervals apart."""
    seeds = {row.seed for row in records.seed_rows}
    if len(seeds) < 2:
        return []
    counts: dict[str, int] = {}
    bases = {row.seed: row for row in records.seed_rows if row.method == base.method}
    for row in records.seed_rows:
        if _trained(row, base):
            counts[row.method] = counts.get(row.method, 0) + (row.seed in bases and _above(row, bases[row.seed]))
    if not counts:
        return []
    told = ", ".join(f"{method} {count} of {len(seeds)}" for method, count in counts.items())
    return [f"Seeds on which gold is above {base.method} with intervals apart: {told}."]


def _trends(runs: list[Run]) -> list[str]:
    """From where to where the batches of training went: no held-out evaluation, and said to be none."""
    named = {"reward/mean": "proxy", "gold/mean": "gold", "loss": "loss"}
    sentences = []
    for run in runs:
        keys = ("reward/mean", "gold/mean") if run.stage == "rl" else ("loss",)
        moves = [(named[key], ends) for key in keys if (ends := trend(run, key)) is not None]
        told = ", ".join(f"{name} {number(first)} → {number(last)}" for name, (first, last) in moves)
        if told:
            sentences.append(f"{run.method}, training batches, first to last {WINDOW} steps: {told}.")
    return sentences


def accuracies(run: Run) -> list[tuple[str, float, float, float]]:
    """(who, accuracy, low, high) on held-out pairs: of the reward model first, then of what it has to beat."""
    beside = run.result.get("baselines")
    beside = beside if isinstance(beside, dict) else {}
    told = {run.method: run.result, **{str(name).replace("_", " "): found for name, found in beside.items()}}
    found = []
    for name, result in told.items():
        values = (
            [finite(result.get(f"accuracy{end}")) for end in ("", "_low", "_high")] if isinstance(result, dict) else []
        )
        if values and None not in values:
            found.append((name, *values))
    return found  # type: ignore[return-value]


def _accuracy(run: Run) -> list[str]:
    """How often the reward model is right on held-out pairs, and whether simpler judges are shown to be worse."""
    found = accuracies(run)
    if not found or found[0][0] != run.method:
        return []
    (_, own, low, high), *beside = found
    name = run.method if run.seed is None else f"{run.method}, seed {run.seed}"
    pairs, rows = run.result.get("held_out_pairs"), run.result.get("held_out_rows")
    asked = f"{pairs} held-out pairs in the right order" if rows is None else f"what {rows} held-out rows ask"
    sentences = [f"{name}: {own:.3f} [{low:.3f}, {high:.3f}] of {asked}."]
    for other, value, below, above in beside:
        verdict = "worse" if above < low else "better" if below > high else "not told apart from it"
        sentences.append(f"{other} alone: {value:.3f} [{below:.3f}, {above:.3f}], {verdict}.")
    return [" ".join(sentences)]


def _without_gold(trained: list[Row], base: Row | None) -> Headline:
    if not trained:
        return Headline("Nothing has been trained on a reward here, so there is nothing to compare.", [], "open")
    told = ", ".join(f"{row.method} {number(row.proxy)}" for row in trained if row.proxy is not None)
    start = f", from {number(base.proxy)} after {base.method}" if base and base.proxy is not None else ""
    proxies = f" The proxy ends at: {told}{start}." if told else ""
    answer = "Not shown: no gold was given, so nothing here says whether the policy got better, only its reward."
    return Headline(answer + proxies, [], "open")


def _without_rows(records: Records) -> Headline:
    base = baseline(records.seed_rows)
    if base is not None:
        counted = _seeds(records, base)
        return Headline("The seeds are not summarised yet.", counted, "open")
    going = [f"{run.method} (step {run.steps})" for run in records.runs if not run.result and run.metrics]
    done = [f"{run.method}: {run.steps} steps" for run in records.runs if run.result]
    if going:
        answer = f"No result yet: {', '.join(going)} left no result.json so far."
    elif done:
        told = [sentence for run in records.runs for sentence in _accuracy(run)]
        if told:
            return Headline("No policy was trained on a reward here; of the reward model this is known.", told, "open")
        answer = f"Finished: {'; '.join(done)}. Nothing was evaluated, so nothing is claimed."
    else:
        answer = "Nothing has been written here yet."
    return Headline(answer, _trends(records.runs), "open")
