"""Replies to read side by side: from replies.json, else from the samples that the runs left.

replies.json, next to summary.json, is a list of prompts, each answered by several methods; all but `prompt`,
`method` and `completion` may be missing, and `bill` is how the gold judge arrived at its number::

    [{"prompt": "tea ?", "replies": [{"method": "SFT", "completion": "it is hot", "proxy": 0.2, "gold": 1.0,
                                      "bill": [["hot", 1.0, "true of tea"]]}]}]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klimb.report.load import Records, Run
from klimb.report.text import clipped, finite, plain

PROMPTS = 8
PER_PROMPT = 6
TEXT_LIMIT = 1200


@dataclass(frozen=True)
class Reply:
    method: str
    completion: str
    proxy: float | None
    gold: float | None
    bill: list[tuple[str, float, str]]


@dataclass(frozen=True)
class Asked:
    prompt: str
    replies: list[Reply]


def replies(records: Records) -> tuple[list[Asked], str]:
    """The prompts with their replies, and where they come from in words."""
    written = [asked for entry in records.replies if (asked := _written(entry)) is not None]
    if written:
        left = len(written) - PROMPTS
        more = f" {left} further prompts are in replies.json." if left > 0 else ""
        return written[:PROMPTS], "The same prompts, answered by each method." + more
    first = records.seeds[0] if records.seeds else None
    runs = [run for run in records.runs if run.stage == "rl" and run.samples and run.seed in (None, first)]
    sampled = _sampled(runs, records.notes)
    return (
        sampled,
        "The first sample of each prompt from the last step that each run saved; none was picked by hand.",
    )


def _written(entry: Any) -> Asked | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("replies"), list):
        return None
    found = [_reply(reply) for reply in entry["replies"][:PER_PROMPT] if isinstance(reply, dict)]
    return Asked(clipped(plain(entry.get("prompt", "")), TEXT_LIMIT), found) if found else None


def _reply(entry: dict[str, Any]) -> Reply:
    bill = []
    for item in entry.get("bill") or []:
        if isinstance(item, list | tuple) and len(item) == 3 and (points := finite(item[1])) is not None:
            bill.append((clipped(str(item[0]), 80), points, clipped(str(item[2]), 160)))
    return Reply(
        method=str(entry.get("method", "?")),
        completion=clipped(plain(entry.get("completion", "")), TEXT_LIMIT),
        proxy=finite(entry.get("proxy")),
        gold=finite(entry.get("gold")),
        bill=bill,
    )


def _sampled(runs: Sequence[Run], notes: list[str]) -> list[Asked]:
    by_prompt: dict[str, Asked] = {}
    for run in runs:
        for prompt_id, prompt, reply in _last_samples(run, notes):
            asked = by_prompt.setdefault(prompt_id, Asked(prompt, []))
            if len(asked.replies) < PER_PROMPT and all(known.method != reply.method for known in asked.replies):
                asked.replies.append(reply)
    # Prompts that most runs have answered are the ones worth comparing; the sort is stable.
    return sorted(by_prompt.values(), key=lambda asked: -len(asked.replies))[:PROMPTS]


def _last_samples(run: Run, notes: list[str]) -> list[tuple[str, str, Reply]]:
    """The first completion of each prompt in the run's last readable samples file, ordered by prompt id."""
    import pyarrow  # takes a tenth of a second, and most pipelines bring their replies.json
    from pyarrow import parquet

    for path in reversed(run.samples):
        try:
            rows = parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            notes.append(f"{_place(path)} cannot be read and was left out: {clipped(str(error), 200)}")
            continue
        rows.sort(key=lambda row: (str(row.get("prompt_id")), finite(row.get("sample")) or 0.0))
        chosen: dict[str, tuple[str, str, Reply]] = {}
        for row in rows:
            prompt_id = str(row.get("prompt_id"))
            reply = _reply({**row, "method": run.method, "proxy": row.get("score")})
            chosen.setdefault(prompt_id, (prompt_id, clipped(plain(row.get("prompt", "")), TEXT_LIMIT), reply))
        return list(chosen.values())
    return []


def _place(path: Path) -> str:
    return f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
