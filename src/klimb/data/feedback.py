"""What preference losses learn from: pairs, triples with a gold completion, pairs of single steps, labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from klimb.data.checks import CHECKS
from klimb.data.kinds import Kind, OnBad, Record, Table, read_table
from klimb.data.load import (
    PREFERENCES,
    Options,
    Progress,
    Task,
    Transcripts,
    check_length,
    content_of,
    load_task,
    preference_of,
    render_pairs,
    tools_of,
)
from klimb.data.mix import parts_of
from klimb.data.render import Renderer, Tokens
from klimb.data.report import Loaded
from klimb.data.source import BadRow, Source
from klimb.data.template import RenderError
from klimb.errors import DataError
from klimb.types import Labelled, Preference


def load_feedback(
    data: str,
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
    transcripts: Transcripts = "text",
    cache: bool = False,
    progress: Progress | None = None,
) -> Loaded[Any]:
    """Items of the kind that a loss takes: "pairs", "triples" and "steps" are `Preference`, "labels" are `Labelled`.

    labels: of a pair, the chosen is a desirable completion and the rejected an undesirable one. triples: a column
    `gold` holds a completion better than both. steps: a pair for every place at which two solutions of a prompt, the
    same and right so far, go on rightly and wrongly; the steps are strings, a line each. The rest as `load_prompts`.
    """
    options = Options(max_length, columns or {}, on_bad, transcripts, cache, progress)
    if data != "steps":
        return load_task(cast("Task[Any]", TASKS[data]), source, renderer, options)
    paths = [path for path, _ in parts_of(source) or [(source, 1.0)]]
    tables = [read_table(path, wanted=("steps",), columns=columns, on_bad=on_bad) for path in paths]
    rows = list(step_pairs(tables))
    if not rows:
        raise DataError(
            "no two solutions agree up to a step and then differ in being right", where=tables[0].source,
            why="a pair of steps is a right and a wrong one after the same right steps of one prompt",
            fix="sample several solutions a prompt and label their steps, or use loss=dpo on whole solutions",
        )  # fmt: skip
    return load_task(STEP_PAIRS, rows, renderer, Options(max_length, {}, on_bad, "text", False, progress))


# --- labels ---------------------------------------------------------------------------------------------


def _render_labelled(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    if kind == "preference":
        return render_pairs(renderer, kind, records)
    texts = [(record.values["prompt"], record.values["completion"]) for record in records]
    return list(renderer.completions(texts, tools_of(records)))


def _labelled(record: Record, tokens: Any, id: str, limit: int | None) -> list[Labelled]:
    if isinstance(tokens, Tokens):
        check_length("the row", len(tokens.prompt) + len(tokens.completion), limit)
        return [Labelled(id, tokens.prompt, tokens.completion, tokens.mask, record.values["label"])]
    pair = preference_of(record, tokens, id, limit)
    other = f"{int(id, 16) ^ 1:016x}"
    return [
        Labelled(id, pair.prompt, pair.chosen, pair.chosen_mask, True),
        Labelled(other, pair.prompt, pair.rejected, pair.rejected_mask, False),
    ]


# --- triples --------------------------------------------------------------------------------------------


def _render_triples(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    golds = [_gold(record) for record in records]
    good = [(record, gold) for record, gold in zip(records, golds) if not isinstance(gold, RenderError)]
    texts = [(record.values["prompt"], gold) for record, gold in good]
    rendered = iter(renderer.completions(texts, tools_of([record for record, _ in good])))
    thirds = [gold if isinstance(gold, RenderError) else next(rendered) for gold in golds]
    pairs = render_pairs(renderer, kind, records)
    return [
        next((each for each in (pair, third) if isinstance(each, RenderError)), (pair, third))
        for pair, third in zip(pairs, thirds)
    ]


def _gold(record: Record) -> Any:
    if record.columns.get("gold") is None:
        return RenderError("has no gold", fix="this loss takes a column gold, a completion better than both")
    try:
        return CHECKS["completion"](record.columns["gold"], "gold")
    except BadRow as error:
        return RenderError(str(error))


def _triple(record: Record, tokens: tuple[tuple[Tokens, Tokens], Tokens], id: str, limit: int | None) -> Preference:
    pair, gold = tokens
    check_length("the row", len(gold.prompt) + len(gold.completion), limit)
    made = preference_of(record, pair, id, limit)
    return Preference(
        id, made.prompt, made.chosen, made.rejected, made.chosen_mask, made.rejected_mask, made.margin,
        made.strength, gold.completion, gold.mask,
    )  # fmt: skip


# --- steps ----------------------------------------------------------------------------------------------


def step_pairs(tables: Sequence[Table]) -> Iterator[dict[str, Any]]:
    """Rows of a right and a wrong next step; the steps before them belong to the prompt. A step that does not end its
    solution has no end token."""
    nexts: dict[tuple[str, tuple[str, ...]], dict[bool, dict[str, bool]]] = defaultdict(lambda: {True: {}, False: {}})
    for record in (record for table in tables for record in table.records):
        prompt, steps = record.values["prompt"], record.values["completions"]
        if not isinstance(prompt, str):
            raise DataError("steps after a prompt of messages are not supported", where=record.where,
                            fix="write the prompt as a string")  # fmt: skip
        for place, (step, right) in enumerate(zip(steps, record.values["labels"])):
            nexts[prompt, tuple(steps[:place])][right].setdefault(step, place == len(steps) - 1)
            if not right:
                break
    for (prompt, before), found in nexts.items():
        right, wrong = list(found[True].items()), list(found[False].items())
        for number in range(max(len(right), len(wrong)) if right and wrong else 0):
            (chosen, ends), (rejected, stops) = right[number % len(right)], wrong[number % len(wrong)]
            yield {
                "prompt": prompt + "".join(map(_line, before)),
                "chosen": chosen if ends else _line(chosen), "rejected": rejected if stops else _line(rejected),
                "chosen_ends": ends, "rejected_ends": stops,
            }  # fmt: skip


def _line(step: str) -> str:
    return step if step.endswith("\n") else f"{step}\n"


def _step_pair(record: Record, tokens: tuple[Tokens, Tokens], id: str, limit: int | None) -> Preference:
    sides = [
        side if record.columns[f"{name}_ends"] else Tokens(side.prompt, side.completion[:-1], side.mask[:-1])
        for name, side in zip(("chosen", "rejected"), tokens)
    ]
    return preference_of(record, (sides[0], sides[1]), id, limit)


TRIPLES = Task(Preference, ("preference",), _render_triples, lambda r: [content_of(r), r.columns.get("gold")], _triple)
LABELS = Task(Labelled, ("labelled", "preference"), _render_labelled, content_of, _labelled)
STEP_PAIRS = Task(
    Preference, ("preference",), render_pairs,
    lambda r: [content_of(r), r.columns["chosen_ends"], r.columns["rejected_ends"]], _step_pair,
)  # fmt: skip
TASKS = {"pairs": PREFERENCES, "triples": TRIPLES, "labels": LABELS}
