"""What a stage trains on: prompts, examples or preferences out of a source, with a report of what it held."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from klimb.data.formats import BadRow, Problem, Source, read_rows, source_name
from klimb.data.kinds import Kind, OnBad, Record, Table, refuse_bad, typed
from klimb.data.render import Renderer, Tokens
from klimb.data.template import RenderError
from klimb.errors import DataError
from klimb.types import Example, Preference, Prompt, Text

Item = TypeVar("Item", Prompt, Example, Preference)
Rendered = TypeVar("Rendered")

CHUNK = 1024
EXAMPLE_KINDS: tuple[Kind, ...] = ("prompt-completion", "messages", "text")


@dataclass(frozen=True)
class Report:
    """What a source held. Lengths are in tokens."""

    source: str
    type: str
    rows: int
    dropped: list[Problem]
    lengths: dict[str, list[int]] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def spread(self, name: str) -> tuple[int, int, int]:
        """(min, median, max)"""
        lengths = self.lengths[name]
        return min(lengths), statistics.median_low(lengths), max(lengths)

    def __str__(self) -> str:
        spreads = [
            f"{name} {low}…{middle}…{high}" for name in self.lengths for low, middle, high in [self.spread(name)]
        ]
        lines = [f"{self.source}: {self.rows:,} rows, {self.type}; tokens (min…median…max): {', '.join(spreads)}"]
        if self.dropped:
            lines.append(f"  {len(self.dropped):,} of them dropped, the first: {self.dropped[0]}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True)
class Loaded(Generic[Item]):
    items: list[Item]
    report: Report
    conversational: bool


def load_prompts(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
) -> Loaded[Prompt]:
    """The prompts of rows that have one; all else in a row stays with it, for the reward function.

    max_length: of a prompt, in tokens. Raises BadRows or DataError.
    """
    table = typed(*read_rows(source, columns), source_name(source), prompts_only=True)
    texts = [record.values["prompt"] for record in table.records]

    def build(record: Record, tokens: list[int], id: str) -> Prompt:
        _check_length("the prompt", len(tokens), max_length)
        return Prompt(id, tokens, record.values["prompt"], record.columns)

    content = [[record.values["prompt"], record.columns] for record in table.records]
    return _load(table, renderer, _chunked(renderer.prompts, texts), content, build, on_bad)


def load_examples(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
) -> Loaded[Example]:
    """Demonstrations: from prompt and completion, from messages (every assistant turn), or from plain text.

    max_length: of prompt and completion together, in tokens. Raises BadRows or DataError.
    """
    table = typed(*read_rows(source, columns), source_name(source), EXAMPLE_KINDS)
    rows = [record.values for record in table.records]
    if table.kind == "prompt-completion":
        pairs = [(values["prompt"], values["completion"]) for values in rows]
        rendered = _chunked(renderer.completions, pairs)
    elif table.kind == "messages":
        rendered = _chunked(renderer.conversations, [values["messages"] for values in rows])
    else:
        rendered = _chunked(renderer.documents, [values["text"] for values in rows])

    def build(record: Record, tokens: Tokens, id: str) -> Example:
        _check_length("the row", len(tokens.prompt) + len(tokens.completion), max_length)
        return Example(id, tokens.prompt, tokens.completion, tokens.mask)

    return _load(table, renderer, rendered, rows, build, on_bad)


def load_preferences(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
) -> Loaded[Preference]:
    """Comparisons; a column `margin` (a number) says by how much the chosen one is better.

    max_length: of the prompt and either completion, in tokens. Raises BadRows or DataError.
    """
    table = typed(*read_rows(source, columns), source_name(source), ["preference"])
    rows = [record.values for record in table.records]
    sides = (
        _chunked(renderer.completions, [(values["prompt"], values[side]) for values in rows])
        for side in ("chosen", "rejected")
    )

    def build(record: Record, tokens: tuple[Tokens, Tokens], id: str) -> Preference:
        chosen, rejected = tokens
        longer = max(len(chosen.completion), len(rejected.completion))
        _check_length("the row", len(chosen.prompt) + longer, max_length)
        if chosen.completion == rejected.completion:
            raise BadRow("chosen and rejected are the same tokens")
        return Preference(
            id,
            chosen.prompt,
            chosen.completion,
            rejected.completion,
            chosen.mask,
            rejected.mask,
            _margin(record.columns.get("margin")),
        )

    pairs = (_first_error(pair) for pair in zip(*sides))
    return _load(table, renderer, pairs, rows, build, on_bad)


def _load(
    table: Table,
    renderer: Renderer,
    rendered: Iterator[Rendered | RenderError],
    content: Sequence[Any],
    build: Callable[[Record, Rendered, str], Item],
    on_bad: OnBad,
) -> Loaded[Item]:
    """The items of the good rows. `content` is what an id is a hash of."""
    items: list[Item] = []
    problems = list(table.problems)
    repeats: Counter[str] = Counter()
    for record, tokens, values in zip(table.records, rendered, content):
        try:
            if isinstance(tokens, RenderError):
                raise tokens
            items.append(build(record, tokens, _unique_id(values, repeats)))
        except (BadRow, RenderError) as error:
            problems.append(Problem(record.where, str(error)))
    refuse_bad(table.source, problems, len(items), on_bad)
    notes = [*_repeats(repeats), *_control_strings(table, renderer)]
    report = Report(table.source, table.type, len(items) + len(problems), problems, _lengths(items), notes)
    return Loaded(items, report, table.conversational)


def _chunked(
    render: Callable[[list[Any]], list[Rendered | RenderError]], values: Sequence[Any]
) -> Iterator[Rendered | RenderError]:
    for start in range(0, len(values), CHUNK):
        yield from render(list(values[start : start + CHUNK]))


def _first_error(pair: tuple[Any, ...]) -> tuple[Any, ...] | RenderError:
    return next((side for side in pair if isinstance(side, RenderError)), pair)


def _check_length(what: str, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise BadRow(f"{what} has {length} tokens, where at most {limit} fit")


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise BadRow(f"margin is {value!r:.40}, not a number")
    return float(value)


def _unique_id(content: Any, repeats: Counter[str]) -> str:
    """A hash of the content; an exact repeat gets a number: it shall not share the first one's randomness."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    id = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    repeats[id] += 1
    return id if repeats[id] == 1 else f"{id}-{repeats[id]}"


def _repeats(repeats: Counter[str]) -> list[str]:
    repeated = sum(count - 1 for count in repeats.values())
    return [f"{repeated:,} rows repeat an earlier one exactly"] if repeated else []


def _control_strings(table: Table, renderer: Renderer) -> list[str]:
    found = []
    for record in table.records:
        texts: list[Text] = [value for value in record.values.values() if isinstance(value, str | list)]
        literal = next((name for text in texts if (name := renderer.control_string(text))), None)
        if literal:
            found.append(f"{literal!r} at {record.where}")
    if not found:
        return []
    return [f"{len(found):,} rows spell out a control token, which is read as plain text; the first: {found[0]}"]


def _lengths(items: Sequence[Prompt | Example | Preference]) -> dict[str, list[int]]:
    lengths: dict[str, list[int]] = {}
    for item in items:
        if isinstance(item, Prompt):
            parts = {"prompt": item.tokens}
        elif isinstance(item, Example):
            parts = {"prompt": item.prompt, "completion": item.completion}
        else:
            parts = {"prompt": item.prompt, "chosen": item.chosen, "rejected": item.rejected}
        for name, tokens in parts.items():
            lengths.setdefault(name, []).append(len(tokens))
    return lengths


# --- evaluation part -----------------------------------------------------------------------------------


def split_by_prompt(items: Sequence[Item], eval_fraction: float, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """(train, eval), by a hash of each item's prompt: no prompt is on both sides, nor in any later file.

    Raises DataError where a side would be empty.
    """
    if eval_fraction == 0:
        return list(items), []
    if not 0 < eval_fraction < 1:
        raise DataError(f"eval_fraction is {eval_fraction}", fix="choose one between 0 and 1")
    train: list[Item] = []
    held_out: list[Item] = []
    for item in items:
        (held_out if _draw(_prompt_key(item), seed) < eval_fraction else train).append(item)
    if not train or not held_out:
        empty = "training" if held_out else "evaluation"
        raise DataError(
            f"no prompt of {len(items)} items falls into the {empty} part",
            why=f"eval_fraction is {eval_fraction}",
            fix="choose another, or give eval_data",
        )
    return train, held_out


def _prompt_key(item: Prompt | Example | Preference) -> list[int]:
    if isinstance(item, Prompt):
        return item.tokens
    if isinstance(item, Example) and len(item.prompt) <= 1:
        # Plain text has no prompt but BOS or its own first token: it is told apart by all of it.
        return item.prompt + item.completion
    return item.prompt


def _draw(key: list[int], seed: int) -> float:
    """Uniform in [0, 1), from the content alone."""
    digest = hashlib.sha256(json.dumps([seed, key]).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
