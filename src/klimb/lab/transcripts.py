"""Human comparisons of transcripts, and a small model made from their own words.

Rows with `chosen` and `rejected` (transcripts of ``Human:`` and ``Assistant:`` turns, as those of hh-rlhf, or any other
comparisons of text) are split by a hash of their prompt, so that no dialogue is on both sides and the held-out part is
the same for every seed. Tokens are made from the training part alone; the model starts from random numbers.

hh-rlhf: Bai et al. (2022), "Training a Helpful and Harmless Assistant with RLHF", arXiv 2204.05862.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from klimb.data.kinds import read_table
from klimb.errors import DataError

HELD_OUT = 0.25
VOCABULARY = 2_000
CONTEXT = 1_024


def prepare(out: Path, *, data: str = "Anthropic/hh-rlhf", seed: int) -> dict[str, str]:
    """Writes the parts and an untrained model of 0.9 M parameters into `out`; `data` is a file or a hub name.

    Returns the paths "model" · "comparisons" and "held_out" (prompt, chosen, rejected) · "dialogues" (the training
    part's chosen transcripts as plain text), and a "summary". Raises DataError where a part would be empty.
    """
    from klimb.lab.scratch import make_model, piece_tokenizer

    table = read_table(data, wanted=("preference",), on_bad="drop")
    if table.conversational:
        raise DataError("holds messages", where=data, why="this world reads comparisons of text",
                        fix="use the reward stage with a model of your own")  # fmt: skip
    rows = [record.values for record in table.records]
    held_out = [row for row in rows if _is_held_out(row["prompt"])]
    training = [row for row in rows if not _is_held_out(row["prompt"])]
    if not (training and held_out):
        raise DataError(f"{len(rows)} comparisons are too few to hold some out", where=data, fix="give more rows")
    out.mkdir(parents=True, exist_ok=True)
    dialogues = [{"text": row["prompt"] + row["chosen"]} for row in training]
    tokenizer = piece_tokenizer(_texts(training), VOCABULARY)
    model = make_model(
        out / "model", tokenizer=tokenizer, architecture="llama", hidden=128, layers=3, heads=4, mlp=344,
        context=CONTEXT, seed=seed, tie=True,
    )  # fmt: skip
    dropped = f", {len(table.problems)} left out, the first: {table.problems[0]}" if table.problems else ""
    return {
        "model": str(model),
        "comparisons": _write(out / "comparisons.jsonl", training),
        "held_out": _write(out / "held_out.jsonl", held_out),
        "dialogues": _write(out / "dialogues.jsonl", dialogues),
        "summary": f"{len(rows):,} comparisons: {len(training):,} to learn from, {len(held_out):,} held out{dropped}",
    }


def _is_held_out(prompt: str) -> bool:
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT


def _texts(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    for row in rows:
        yield row["prompt"] + row["chosen"]
        yield row["rejected"]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
