"""What a stage trains on: prompts, examples or preferences out of a source, with a report of what it held."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic

import numpy as np

from klimb.data import cache as kept
from klimb.data.formats import Problem, no_rows, rows_of
from klimb.data.kinds import Detector, Kind, OnBad, Record, refuse_bad
from klimb.data.readers import BadRow, Opened, Source, open_source
from klimb.data.render import Renderer, Tokens
from klimb.data.store import Chosen, Item, Stored, Writer, occurrences, prompt_tokens
from klimb.data.template import RenderError
from klimb.errors import DataError
from klimb.types import Example, Preference, Prompt, Text

CHUNK = 1024
EXAMPLE_KINDS: tuple[Kind, ...] = ("prompt-completion", "messages", "text")

Progress = Callable[[int, float | None], None]
"""Told now and then how many rows were prepared, and which share of the source that is, where it is known."""


@dataclass(frozen=True)
class Report:
    """What a source held. Lengths are in tokens. `cache`: "hit", "miss", or nothing where none was asked for."""

    source: str
    type: str
    rows: int
    dropped: list[Problem]
    lengths: dict[str, np.ndarray] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    repeats: int = 0
    cache: str = ""

    def spread(self, name: str) -> tuple[int, int, int]:
        """(min, median, max)"""
        lengths = np.sort(self.lengths[name])
        return int(lengths[0]), int(lengths[(len(lengths) - 1) // 2]), int(lengths[-1])

    def facts(self) -> dict[str, Any]:
        """For a manifest: what was there, what was dropped and why (the numbers in a reason as n)."""
        reasons = Counter(re.sub(r"\d+", "n", problem.reason) for problem in self.dropped)
        return {
            "source": self.source, "type": self.type, "rows": self.rows, "used": self.rows - len(self.dropped),
            "dropped": dict(reasons.most_common()), "repeats": self.repeats, "notes": self.notes,
            "tokens": {name: list(self.spread(name)) for name in self.lengths}, "cache": self.cache,
        }  # fmt: skip

    def __str__(self) -> str:
        spreads = [
            f"{name} {low}…{middle}…{high}" for name in self.lengths for low, middle, high in [self.spread(name)]
        ]
        lines = [f"{self.source}: {self.rows:,} rows, {self.type}; tokens (min…median…max): {', '.join(spreads)}"]
        if self.dropped:
            lines.append(f"  {len(self.dropped):,} of them dropped, the first: {self.dropped[0]}")
        if self.repeats:
            lines.append(f"  {self.repeats:,} rows repeat an earlier one exactly")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join([*lines, *([f"  cache {self.cache}"] if self.cache else [])])


@dataclass(frozen=True)
class Loaded(Generic[Item]):
    items: Sequence[Item]
    report: Report
    conversational: bool


@dataclass(frozen=True)
class Task(Generic[Item]):
    """How rows become items of one type. `content` is what an id is a hash of."""

    item: type[Item]
    kinds: tuple[Kind, ...]
    render: Callable[[Renderer, Kind, list[Record]], list[Any]]
    content: Callable[[Record], Any]
    build: Callable[[Record, Any, str, int | None], Item]
    prompts_only: bool = False


@dataclass(frozen=True)
class Options:
    """What a loader was asked for."""

    max_length: int | None
    columns: Mapping[str, str]
    on_bad: OnBad
    cache: bool
    progress: Progress | None


def load_prompts(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
    cache: bool = False,
    progress: Progress | None = None,
) -> Loaded[Prompt]:
    """The prompts of rows that have one; all else in a row stays with it, for the reward function.

    max_length: of a prompt, in tokens. cache: keep what was prepared from a file, and read it from there the next
    time (see `klimb.data.cache`); rows from Python are held in memory. Raises BadRows or DataError.
    """
    return _load(PROMPTS, source, renderer, Options(max_length, columns or {}, on_bad, cache, progress))


def load_examples(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
    cache: bool = False,
    progress: Progress | None = None,
) -> Loaded[Example]:
    """Demonstrations: from prompt and completion, from messages (every assistant turn), or from plain text.

    max_length: of prompt and completion together, in tokens. The rest as in `load_prompts`.
    """
    return _load(EXAMPLES, source, renderer, Options(max_length, columns or {}, on_bad, cache, progress))


def load_preferences(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
    cache: bool = False,
    progress: Progress | None = None,
) -> Loaded[Preference]:
    """Comparisons; a column `margin` (a number) says by how much the chosen one is better.

    max_length: of the prompt and either completion, in tokens. The rest as in `load_prompts`.
    """
    return _load(PREFERENCES, source, renderer, Options(max_length, columns or {}, on_bad, cache, progress))


# --- what each of them does with a row ----------------------------------------------------------------------


def _render_prompts(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    return list(renderer.prompts([record.values["prompt"] for record in records]))


def _prompt(record: Record, tokens: list[int], id: str, limit: int | None) -> Prompt:
    _check_length("the prompt", len(tokens), limit)
    return Prompt(id, tokens, record.values["prompt"], record.columns)


def _render_examples(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    rows = [record.values for record in records]
    if kind == "prompt-completion":
        return list(renderer.completions([(values["prompt"], values["completion"]) for values in rows]))
    if kind == "messages":
        return list(renderer.conversations([values["messages"] for values in rows]))
    return list(renderer.documents([values["text"] for values in rows]))


def _example(record: Record, tokens: Tokens, id: str, limit: int | None) -> Example:
    _check_length("the row", len(tokens.prompt) + len(tokens.completion), limit)
    return Example(id, tokens.prompt, tokens.completion, tokens.mask)


def _render_pairs(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    sides = (
        renderer.completions([(record.values["prompt"], record.values[side]) for record in records])
        for side in ("chosen", "rejected")
    )
    return [next((side for side in pair if isinstance(side, RenderError)), pair) for pair in zip(*sides)]


def _preference(record: Record, tokens: tuple[Tokens, Tokens], id: str, limit: int | None) -> Preference:
    chosen, rejected = tokens
    longer = max(len(chosen.completion), len(rejected.completion))
    _check_length("the row", len(chosen.prompt) + longer, limit)
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


PROMPTS = Task(Prompt, (), _render_prompts, lambda r: [r.values["prompt"], r.columns], _prompt, prompts_only=True)
EXAMPLES = Task(Example, EXAMPLE_KINDS, _render_examples, lambda r: r.values, _example)
PREFERENCES = Task(Preference, ("preference",), _render_pairs, lambda r: r.values, _preference)


def _check_length(what: str, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise BadRow(f"{what} has {length} tokens, where at most {limit} fit")


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise BadRow(f"margin is {value!r:.40}, not a number")
    return float(value)


# --- all rows -----------------------------------------------------------------------------------------------


class Preparation(Generic[Item]):
    """Rows → items, piece by piece; after the last piece it knows what the source held."""

    def __init__(self, task: Task[Item], opened: Opened, renderer: Renderer, options: Options) -> None:
        self._task: Task[Item] = task
        self._opened, self._renderer, self._options = opened, renderer, options
        self._detector = Detector(task.kinds, task.prompts_only)
        self._good = 0
        self._problems: list[Problem] = []
        self._spelled_out = (0, "")

    def pieces(self) -> Iterator[list[Item]]:
        """Raises BadRows or DataError, at the end also for single rows, where they may not be dropped."""
        rows = map(self._detector.attempt, rows_of(self._opened, self._options.columns))
        while piece := list(islice(rows, CHUNK)):
            yield self._items(piece)
            if self._options.progress is not None:
                self._options.progress(self._good + len(self._problems), self._opened.fraction())
        if not self._good + len(self._problems):
            raise no_rows(self._opened.name)
        refuse_bad(self._opened.name, self._problems, self._good, self._options.on_bad)

    def _items(self, piece: list[Record | Problem]) -> list[Item]:
        records = [each for each in piece if isinstance(each, Record)]
        rendered: Iterator[Any] = iter(())
        if records:
            assert self._detector.kind is not None  # there are records
            rendered = iter(self._task.render(self._renderer, self._detector.kind, records))
        items = []
        for each in piece:
            if isinstance(each, Problem):
                self._problems.append(each)
                continue
            tokens = next(rendered)
            try:
                if isinstance(tokens, RenderError):
                    raise tokens
                id = _hash(self._task.content(each))
                items.append(self._task.build(each, tokens, id, self._options.max_length))
            except (BadRow, RenderError) as error:
                self._problems.append(Problem(each.where, str(error)))
            self._look_for_control(each)
        self._good += len(items)
        return items

    def _look_for_control(self, record: Record) -> None:
        texts: list[Text] = [value for value in record.values.values() if isinstance(value, str | list)]
        literal = next((name for text in texts if (name := self._renderer.control_string(text))), None)
        if literal:
            count, first = self._spelled_out
            self._spelled_out = count + 1, first or f"{literal!r} at {record.where}"

    def note(self) -> dict[str, Any]:
        """What the source held, as JSON."""
        count, first = self._spelled_out
        said = f"{count:,} rows spell out a control token, which is read as plain text; the first: {first}"
        return {
            "source": self._opened.name,
            "type": self._detector.type,
            "conversational": self._detector.conversational,
            "rows": self._good + len(self._problems),
            "dropped": [list(problem) for problem in self._problems],
            "notes": [said] if count else [],
        }


def _load(task: Task[Item], source: Source, renderer: Renderer, options: Options) -> Loaded[Item]:
    opened = open_source(source)
    identity = opened.identity() if options.cache else None
    if identity is None:
        return _held(task, opened, renderer, options)
    facts = {
        "content": identity, "item": task.item.__name__, "renderer": renderer.identity,
        "columns": dict(options.columns), "max_length": options.max_length, "on_bad": options.on_bad,
    }  # fmt: skip
    key = kept.key_of(facts)
    note, found = kept.find(key), "hit"
    if note is None:
        preparation = Preparation(task, opened, renderer, options)
        found = "miss, what was kept is damaged and made anew" if kept.path_of(key).exists() else "miss, kept"

        def write(path: Path) -> dict[str, Any]:
            writer = Writer(path, task.item)
            for piece in preparation.pieces():
                writer.add(piece)
            writer.close()
            return preparation.note()

        try:
            note = kept.keep(key, write)
        except OSError as error:
            fresh = _held(task, open_source(source), renderer, options)
            why = f"off, held in memory: {kept.folder()} cannot be written: {error.strerror or error}"
            return replace(fresh, report=replace(fresh.report, cache=why))
    stored = Stored(kept.path_of(key), task.item)
    copies = occurrences(stored.numbers("id"))
    items = Chosen(stored, np.arange(len(stored)), copies)
    return _loaded(items, note, opened.name, int((copies > 1).sum()), stored.lengths(), f"{found}: {kept.path_of(key)}")


def _held(task: Task[Item], opened: Opened, renderer: Renderer, options: Options) -> Loaded[Item]:
    """In memory."""
    preparation = Preparation(task, opened, renderer, options)
    items = [item for piece in preparation.pieces() for item in piece]
    copies = occurrences(np.array([int(item.id, 16) for item in items], np.uint64))
    named = [item if k == 1 else replace(item, id=f"{item.id}-{k}") for item, k in zip(items, copies)]
    return _loaded(named, preparation.note(), opened.name, int((copies > 1).sum()), _lengths(items))


def _loaded(
    items: Sequence[Item], note: Mapping[str, Any], source: str, repeats: int, lengths: dict[str, np.ndarray],
    cache: str = "",
) -> Loaded[Item]:  # fmt: skip
    """`note` may have been made when the file had another name."""
    dropped = [Problem(where.replace(note["source"], source, 1), reason) for where, reason in note["dropped"]]
    notes = [text.replace(f"at {note['source']}", f"at {source}") for text in note["notes"]]
    report = Report(source, note["type"], note["rows"], dropped, lengths, notes, repeats, cache)
    return Loaded(items, report, note["conversational"])


def _hash(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _lengths(items: Sequence[Prompt | Example | Preference]) -> dict[str, np.ndarray]:
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
    return {name: np.array(values) for name, values in lengths.items()}


# --- evaluation part -----------------------------------------------------------------------------------


def split_by_prompt(
    items: Sequence[Item], eval_fraction: float, seed: int = 0
) -> tuple[Sequence[Item], Sequence[Item]]:
    """(train, eval), by a hash of each item's prompt: no prompt is on both sides, nor in any later file.

    Raises DataError where a side would be empty.
    """
    if eval_fraction == 0:
        return items, []
    if not 0 < eval_fraction < 1:
        raise DataError(f"eval_fraction is {eval_fraction}", fix="choose one between 0 and 1")
    out = np.array([_draw(prompt_tokens(item), seed) < eval_fraction for item in items], bool)
    if out.all() or not out.any():
        raise DataError(
            f"no prompt of {len(items)} items falls into the {'training' if out.any() else 'evaluation'} part",
            why=f"eval_fraction is {eval_fraction}",
            fix="choose another, or give eval_data",
        )
    return Chosen(items, np.flatnonzero(~out)), Chosen(items, np.flatnonzero(out))


def _draw(key: list[int], seed: int) -> float:
    """Uniform in [0, 1), from the content alone."""
    digest = hashlib.sha256(json.dumps([seed, key]).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
