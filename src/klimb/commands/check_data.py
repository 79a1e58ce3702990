"""What a source holds: its type, every bad row, repeats, lengths, balance; in tokens where a model says what those are.

Rows are read and rendered by the loaders of training, and kept where those find them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from klimb.config import StageConfig
from klimb.data.formats import BadRows, Problem, no_rows, rows_of
from klimb.data.kinds import Detector, Kind, OnBad, Record
from klimb.data.load import Progress, Transcripts, load_as
from klimb.data.readers import open_source
from klimb.data.render import Renderer
from klimb.data.report import Loaded
from klimb.data.shapes import TURN
from klimb.errors import DataError

SHOWN = 20
"""Bad rows on the screen; where there are more, a file gets all."""
_WIDTH = 14
"""Of the names of lines."""
QUANTILES = {"least": 0.0, "5 %": 0.05, "half": 0.5, "95 %": 0.95, "99 %": 0.99, "most": 1.0}


class CheckConfig(StageConfig):
    """What `klimb check DATA` can be told."""

    data: str = Field(description="a file, a directory of datasets, or a hub name")
    model: str | None = Field(None, description="directory or hub name: its tokenizer and chat template are used")
    columns: dict[str, str] = Field({}, description="names of your columns: {prompt: question}")
    transcripts: Transcripts = Field("text", description="chat: texts of Human: and Assistant: turns are messages")
    on_bad: OnBad = Field("error", description="drop: bad rows would be left out, and are no reason to stop")
    max_tokens: int | None = Field(None, ge=1, description="longest row, in tokens; default: the model's context")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt, in tokens")


@dataclass
class Held:
    """What a source holds. unit: of the lengths. limits: (over it, at most) by what is limited."""

    source: str
    type: str
    rows: int
    used: int
    problems: list[Problem]
    repeats: int
    prompts: int
    """Different ones."""
    unit: str
    lengths: dict[str, np.ndarray] = field(repr=False)
    labels: Mapping[str, int] = field(default_factory=dict)
    columns: Sequence[str] = ()
    limits: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cache: str = ""

    def facts(self) -> dict[str, Any]:
        """As JSON, without the lengths of each row."""
        return {
            "source": self.source, "type": self.type, "rows": self.rows, "used": self.used,
            "bad": {"rows": len(self.problems), "reasons": reasons(self.problems),
                    "first": [list(problem) for problem in self.problems[:SHOWN]]},
            "repeats": self.repeats, "prompts": self.prompts, "columns": [*self.columns],
            "lengths": {"unit": self.unit, **{part: quantiles(values) for part, values in self.lengths.items()}},
            "over": {what: {"rows": over, "at_most": most} for what, (over, most) in self.limits.items()},
            "balance": balance(self), "notes": self.notes, "cache": self.cache,
        }  # fmt: skip


def first_good(config: CheckConfig) -> tuple[Kind, Record]:
    """The first row that can be used, and its type. Raises BadRows where none can, DataError where nothing is read."""
    opened, detector = open_source(config.data), Detector(transcripts=config.transcripts == "chat")
    problems = []
    for row in rows_of(opened, config.columns):
        found = detector.attempt(row)
        if isinstance(found, Problem):
            problems.append(found)
        elif detector.kind is not None:
            return detector.kind, found
    raise BadRows(opened.name, problems, len(problems)) if problems else no_rows(opened.name)


def in_tokens(
    config: CheckConfig, kind: Kind, renderer: Renderer, context: int | None, progress: Progress
) -> tuple[Held, Loaded[Any]]:
    """context: what the model takes, where that is known."""
    loaded = load_as(
        kind, config.data, renderer, columns=config.columns, transcripts=config.transcripts, progress=progress
    )
    report = loaded.report
    held = Held(
        report.source, report.type, report.rows, report.used, report.dropped, report.repeats,
        len(np.unique(loaded.items.keys())), "tokens", report.lengths, report.labels, report.columns,
        notes=report.notes, cache=report.cache,
    )  # fmt: skip
    longest = min((limit for limit in (config.max_tokens, context) if limit is not None), default=None)
    too_long = {"the row": _over(_whole(report.lengths), longest, held.limits, "rows")}
    too_long["the prompt"] = _over(report.lengths.get("prompt"), config.max_prompt_tokens, held.limits, "prompts")
    held.problems = sorted([*held.problems, *_named(config, held, loaded, too_long)], key=_number)
    return held, loaded


def _number(problem: Problem) -> int:
    """Of its row: the last in its place."""
    return int(([0, *re.findall(r"\d+", problem.where)])[-1])


def _whole(lengths: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of each row what training holds at once: of a comparison the prompt with its longer side."""
    replies = [lengths[part] for part in ("completion", "chosen", "rejected") if part in lengths]
    return lengths["prompt"] + (np.maximum.reduce(replies) if replies else 0)


def _over(
    lengths: np.ndarray | None, limit: int | None, limits: dict[str, tuple[int, int]], what: str
) -> dict[int, str]:
    """By number of the row: why it is too long."""
    if lengths is None or limit is None:
        return {}
    over = np.flatnonzero(lengths > limit)
    limits[what] = len(over), limit
    return {int(at): f"has {lengths[at]} tokens, where at most {limit} fit" for at in over}


def holds_transcripts(record: Record) -> bool:
    """Human: and Assistant: within a text."""
    return any(isinstance(value, str) and TURN.search(f"\n\n{value}") for value in record.values.values())


def _named(
    config: CheckConfig, held: Held, loaded: Loaded[Any], too_long: Mapping[str, Mapping[int, str]]
) -> list[Problem]:
    """The lines of rows that are good but too long: what was kept knows rows by their number alone."""
    if not any(too_long.values()):
        return []
    bad = {problem.where for problem in held.problems}
    good = (where for where, _ in open_source(config.data).pairs if where not in bad)
    return [Problem(where, f"{what} {rows[at]}")
            for at, where in enumerate(good) for what, rows in too_long.items() if at in rows]  # fmt: skip


def in_characters(config: CheckConfig) -> Held:
    """Without a model: what can be said of rows as they stand. Raises DataError for a second type in one file."""
    opened, detector = open_source(config.data), Detector(transcripts=config.transcripts == "chat")
    problems: list[Problem] = []
    lengths: dict[str, list[int]] = {}
    seen: Counter[bytes] = Counter()
    prompts: set[bytes] = set()
    labels: Counter[str] = Counter()
    columns: dict[str, None] = {}
    for row in rows_of(opened, config.columns):
        each = detector.attempt(row)
        if isinstance(each, Problem):
            problems.append(each)
            continue
        prompt = each.values.get("prompt", each.values.get("messages", each.values.get("text")))
        seen[_digest(each.values if detector.kind != "prompt" else [each.values, each.columns])] += 1
        prompts.add(_digest(prompt))
        columns |= dict.fromkeys(each.columns)
        _measure(each, lengths, labels)
    rows = len(problems) + seen.total()
    return Held(
        opened.name, detector.type, rows, seen.total(), problems, seen.total() - len(seen), len(prompts), "characters",
        {part: np.array(values) for part, values in lengths.items()}, labels, [*columns],
    )  # fmt: skip


def _measure(record: Record, lengths: dict[str, list[int]], labels: Counter[str]) -> None:
    for name, value in record.values.items():
        if name in ("label", "labels"):
            labels.update("true" if each else "false" for each in (value if name == "labels" else [value]))
        elif name != "scores":
            lengths.setdefault(name, []).append(len("".join(_texts(value))))


def _texts(value: Any) -> Iterable[str]:
    return [value] if isinstance(value, str) else [each if isinstance(each, str) else each["content"] for each in value]


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    ordered = np.sort(lengths)
    return {name: int(ordered[round(share * (len(ordered) - 1))]) for name, share in QUANTILES.items()}


def reasons(problems: Sequence[Problem]) -> dict[str, int]:
    """How often each, most frequent first; numbers in them as n."""
    return dict(Counter(re.sub(r"\d+", "n", problem.reason) for problem in problems).most_common())


def balance(held: Held) -> dict[str, float]:
    """Shares that a learner could live on without learning anything."""
    found: dict[str, float] = {}
    if {"chosen", "rejected"} <= held.lengths.keys() and held.used:
        chosen, rejected = held.lengths["chosen"], held.lengths["rejected"]
        found["chosen is longer"] = float((chosen > rejected).mean())
        found["both are as long"] = float((chosen == rejected).mean())
        same = sum("are the same" in problem.reason for problem in held.problems)
        found["both are the same"] = same / held.rows
    if held.labels:
        found["labels are true"] = held.labels.get("true", 0) / sum(held.labels.values())
    return found


def write_problems(problems: Sequence[Problem], source: str) -> Path:
    """All of them, one a line, in a file beside whoever asks. Raises DataError where it cannot be written."""
    path = Path(f"bad-rows-{Path(source.rstrip('/')).name or 'data'}.txt".replace(":", "-"))
    try:
        path.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
    except OSError as error:
        raise DataError("cannot be written", where=path, why=error.strerror or error, fix="stand elsewhere") from error
    return path


def bad_lines(problems: Sequence[Problem], file: Path | None) -> Iterator[str]:
    """How many, why, and the first of them."""
    if not problems:
        yield line_of("bad rows", "none")
        return
    why = "; ".join(f"{count:,} × {reason}" for reason, count in list(reasons(problems).items())[:8])
    yield line_of("bad rows", f"{len(problems):,}: {why}")
    yield from (f"  {problem}" for problem in problems[:SHOWN])
    if file is not None:
        yield f"  and {len(problems) - SHOWN:,} more; all of them are in {file}"


def line_of(name: str, text: str) -> str:
    return f"{name:{_WIDTH}} {text}"
