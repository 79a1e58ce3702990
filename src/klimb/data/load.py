"""What a stage trains on: prompts, examples or preferences out of a source, with a report of what it held."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal

import numpy as np

from klimb.data import cache as kept
from klimb.data.formats import Problem, no_rows, rows_of
from klimb.data.kinds import Detector, Kind, OnBad, Record, refuse_bad
from klimb.data.mix import mixed, parts_of
from klimb.data.readers import open_source
from klimb.data.render import Renderer, Tokens
from klimb.data.report import Loaded, Report
from klimb.data.source import BadRow, Opened, Source
from klimb.data.store import Base, Chosen, Held, Item, Stored, Writer, occurrences
from klimb.data.template import RenderError
from klimb.types import Example, Preference, Prompt, Text

CHUNK = 1024
Transcripts = Literal["text", "chat"]
EXAMPLE_KINDS: tuple[Kind, ...] = ("prompt-completion", "messages", "text")

Progress = Callable[[int, float | None], None]
"""Told now and then how many rows were prepared, and which share of the source that is, where it is known."""


@dataclass(frozen=True)
class Task(Generic[Item]):
    """How rows become items of one type. `content` is what an id is a hash of."""

    item: type[Item]
    kinds: tuple[Kind, ...]
    render: Callable[[Renderer, Kind, list[Record]], list[Any]]
    content: Callable[[Record], Any]
    build: Callable[[Record, Any, str, int | None], Item | list[Item]]
    """One item of a row, or several."""
    prompts_only: bool = False
    details: tuple[str, ...] = ()
    """What else it depends on, to tell what is kept of it from what is kept of others."""


@dataclass(frozen=True)
class Options:
    """What a loader was asked for."""

    max_length: int | None
    columns: Mapping[str, str]
    on_bad: OnBad
    transcripts: Transcripts
    cache: bool
    progress: Progress | None


def load_prompts(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
    transcripts: Transcripts = "text",
    cache: bool = False,
    progress: Progress | None = None,
) -> Loaded[Prompt]:
    """The prompts of rows that have one; all else in a row stays with it, for the reward function.

    source: a path, a hub name, rows, or several paths: a list, or a mapping from each to its weight.
    max_length: of a prompt, in tokens. transcripts: "chat" makes those of Human: and Assistant: messages.
    cache: keep what was prepared from a file, and read it from there the next time (see `klimb.data.cache`);
    rows from Python are held in memory. Raises BadRows or DataError.
    """
    return load_task(
        PROMPTS, source, renderer, Options(max_length, columns or {}, on_bad, transcripts, cache, progress)
    )


def load_examples(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
    transcripts: Transcripts = "text",
    cache: bool = False,
    progress: Progress | None = None,
) -> Loaded[Example]:
    """Demonstrations: from prompt and completion, from messages (every assistant turn), or from plain text.

    max_length: of prompt and completion together, in tokens. The rest as in `load_prompts`.
    """
    return load_task(
        EXAMPLES, source, renderer, Options(max_length, columns or {}, on_bad, transcripts, cache, progress)
    )


def load_preferences(
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
    transcripts: Transcripts = "text",
    cache: bool = False,
    progress: Progress | None = None,
) -> Loaded[Preference]:
    """Comparisons; a column `margin` (a number) says by how much the chosen one is better, `strength` (above 0.5, at
    most 1) which share of judges would prefer it.

    max_length: of the prompt and either completion, in tokens. The rest as in `load_prompts`.
    """
    return load_task(
        PREFERENCES, source, renderer, Options(max_length, columns or {}, on_bad, transcripts, cache, progress)
    )


def load_as(
    kind: Kind, source: Source, renderer: Renderer, *, columns: Mapping[str, str] | None = None,
    transcripts: Transcripts = "text", progress: Progress | None = None,
) -> Loaded[Any]:  # fmt: skip
    """To look at rows of any kind: none is too long, and those that cannot be used are left out. Kept as others are.

    Labels and steps come as examples; how many of them are true stands in the report.
    """
    return load_task(TASKS[kind], source, renderer, Options(None, columns or {}, "drop", transcripts, True, progress))


# --- what each of them does with a row ----------------------------------------------------------------------


def _render_prompts(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    return list(renderer.prompts([record.values["prompt"] for record in records], tools_of(records)))


def _prompt(record: Record, tokens: list[int], id: str, limit: int | None) -> Prompt:
    check_length("the prompt", len(tokens), limit)
    return Prompt(id, tokens, record.values["prompt"], record.columns)


def _render_examples(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    rows, tools = [record.values for record in records], tools_of(records)
    if kind in ("steps", "ranking"):
        return list(renderer.completions([(values["prompt"], _one_reply(values)) for values in rows], tools))
    if kind in ("prompt-completion", "labelled"):
        return list(renderer.completions([(values["prompt"], values["completion"]) for values in rows], tools))
    if kind == "messages":
        return list(renderer.conversations([values["messages"] for values in rows], tools))
    return list(renderer.documents([values["text"] for values in rows]))


def _one_reply(values: Mapping[str, Any]) -> Text:
    """The steps of a solution, a line each, in the form of its prompt."""
    text = "\n".join(values["completions"])
    return text if isinstance(values["prompt"], str) else [{"role": "assistant", "content": text}]


def _example(record: Record, tokens: Tokens, id: str, limit: int | None) -> Example:
    check_length("the row", len(tokens.prompt) + len(tokens.completion), limit)
    return Example(id, tokens.prompt, tokens.completion, tokens.mask)


def render_pairs(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    sides = (
        renderer.completions([(record.values["prompt"], record.values[side]) for record in records], tools_of(records))
        for side in ("chosen", "rejected")
    )
    return [next((side for side in pair if isinstance(side, RenderError)), pair) for pair in zip(*sides)]


def preference_of(record: Record, tokens: tuple[Tokens, Tokens], id: str, limit: int | None) -> Preference:
    chosen, rejected = tokens
    longer = max(len(chosen.completion), len(rejected.completion))
    check_length("the row", len(chosen.prompt) + longer, limit)
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
        _strength(record.columns.get("strength")),
    )


def tools_of(records: list[Record]) -> list[Any]:
    return [record.columns.get("tools") for record in records]


def content_of(record: Record) -> Any:
    tools = record.columns.get("tools")
    return {**record.values, "tools": tools} if tools else record.values


PROMPTS = Task(Prompt, (), _render_prompts, lambda r: [r.values["prompt"], r.columns], _prompt, prompts_only=True)
EXAMPLES = Task(Example, EXAMPLE_KINDS, _render_examples, content_of, _example)
PREFERENCES = Task(Preference, ("preference",), render_pairs, content_of, preference_of)
TASKS: Mapping[Kind, Task[Any]] = {
    "prompt": PROMPTS, "preference": PREFERENCES, **dict.fromkeys(EXAMPLE_KINDS, EXAMPLES),
    "ranking": replace(EXAMPLES, kinds=("ranking",)), "labelled": replace(EXAMPLES, kinds=("labelled",)),
    "steps": replace(EXAMPLES, kinds=("steps",)),
}  # fmt: skip


def check_length(what: str, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise BadRow(f"{what} has {length} tokens, where at most {limit} fit")


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"margin is {value!r:.40}, not a number")
    return float(value)


def _strength(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 < value <= 1:
        raise BadRow(f"strength is {value!r:.40}, not a share above 0.5 and at most 1")
    return float(value)


# --- all rows -----------------------------------------------------------------------------------------------


class Preparation(Generic[Item]):
    """Rows → items, piece by piece; after the last piece it knows what the source held."""

    def __init__(self, task: Task[Item], opened: Opened, renderer: Renderer, options: Options) -> None:
        self._task: Task[Item] = task
        self._opened, self._renderer, self._options = opened, renderer, options
        self._detector = Detector(task.kinds, task.prompts_only, options.transcripts == "chat")
        self._done = self._good = 0
        self._problems: list[Problem] = []
        self._spelled_out = (0, "")
        self._labels: Counter[str] = Counter()
        self._columns: dict[str, None] = {}

    def pieces(self) -> Iterator[list[Item]]:
        """Raises BadRows or DataError, at the end also for single rows, where they may not be dropped.

        While one piece is tokenised, the next one is read and the one before it is written.
        """
        rows = self._detector.records(rows_of(self._opened, self._options.columns))
        with _no_garbage(), ThreadPoolExecutor(1) as tokenising:
            begun: tuple[int, Future[list[Item]]] | None = None
            while piece := list(islice(rows, CHUNK)):
                before, begun = begun, (len(piece), tokenising.submit(self._items, piece))
                if before is not None:
                    yield self._told(*before)
            if begun is not None:
                yield self._told(*begun)
        if not self._good + len(self._problems):
            raise no_rows(self._opened.name)
        refuse_bad(self._opened.name, self._problems, self._good, self._options.on_bad)

    def _told(self, rows: int, piece: Future[list[Item]]) -> list[Item]:
        items = piece.result()
        self._done += rows  # the next piece is on its way by now, and in the other counts
        if self._options.progress is not None:
            self._options.progress(self._done, self._opened.fraction())
        return items

    def _items(self, piece: list[Record | Problem]) -> list[Item]:
        records = [each for each in piece if isinstance(each, Record)]
        rendered: Iterator[Any] = iter(())
        if records:
            assert self._detector.kind is not None  # there are records
            if self._detector.conversational:
                self._renderer.template  # noqa: B018  what is wrong with it is wrong with no row
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
                built = self._task.build(each, tokens, id, self._options.max_length)
                items += built if isinstance(built, list) else [built]
                self._good += 1
            except (BadRow, RenderError) as error:
                self._problems.append(Problem.of(each.where, error))
            self._look_for_control(each)
            self._columns |= dict.fromkeys(each.columns)
            labels = each.values.get("labels", [each.values.get("label")])
            self._labels.update("true" if label else "false" for label in labels if label is not None)
        return items

    def _look_for_control(self, record: Record) -> None:
        texts: list[Text] = [
            text for name, value in record.values.items() if name not in ("label", "labels", "scores")
            for text in (value if name == "completions" else [value])
        ]  # fmt: skip
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
            "labels": dict(self._labels),
            "columns": [*self._columns],
        }


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Rows make no cycles, and to look for some in all their lists of ids again and again costs a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def load_task(task: Task[Item], source: Any, renderer: Renderer, options: Options) -> Loaded[Item]:
    parts = parts_of(source)
    if parts is None:
        return _one(task, source, renderer, options)
    return mixed([_one(task, path, renderer, options) for path, _ in parts], [weight for _, weight in parts])


def _one(task: Task[Item], source: Source, renderer: Renderer, options: Options) -> Loaded[Item]:
    opened = open_source(source)
    identity = opened.identity() if options.cache else None
    if identity is None:
        return _held(task, opened, renderer, options)
    facts = {
        "content": identity, "item": task.item.__name__, "renderer": renderer.identity,
        "columns": dict(options.columns), "transcripts": options.transcripts, "max_length": options.max_length,
        "on_bad": options.on_bad, "task": [task.render.__name__, task.build.__name__, *task.details],
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
    return _loaded(stored, note, opened.name, f"{found}: {kept.path_of(key)}")


def _held(task: Task[Item], opened: Opened, renderer: Renderer, options: Options) -> Loaded[Item]:
    preparation = Preparation(task, opened, renderer, options)
    items = Held([item for piece in preparation.pieces() for item in piece])
    return _loaded(items, preparation.note(), opened.name)


def _loaded(base: Base[Item], note: Mapping[str, Any], source: str, cache: str = "") -> Loaded[Item]:
    """`note` may have been made when the file had another name. An exact repeat of a row gets an id of its own."""
    copies = occurrences(base.numbers("id"))
    items = Chosen(base, np.arange(len(base)), copies)
    dropped = [Problem(where.replace(note["source"], source, 1), reason) for where, reason in note["dropped"]]
    notes = [text.replace(f"at {note['source']}", f"at {source}") for text in note["notes"]]
    repeats = int((copies > 1).sum())
    lengths = items.lengths()
    report = Report(
        source, note["type"], note["rows"], len(items), dropped, lengths, notes, repeats, cache,
        labels=note["labels"], columns=note["columns"],
    )  # fmt: skip
    return Loaded(items, report, note["conversational"])


def _hash(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
