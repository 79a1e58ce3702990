"""What type of data rows are: detected from their columns, checked value by value, brought into one form.

=================== =========================== ================================================
type                columns                     each text is a string (standard) or messages (conversational)
=================== =========================== ================================================
prompt              prompt                      + any further columns, for the reward function
prompt-completion   prompt, completion          demonstrations
messages            messages                    demonstrations, every assistant turn is one
text                text                        demonstrations without a prompt
preference          [prompt,] chosen, rejected  without a prompt: what both have in common
labelled            prompt, completion, label   good or bad
steps               prompt, completions, labels steps of a solution, right or wrong
ranking             prompt, completions, scores completions of a prompt, the better the higher; or ranks, 1 the best
=================== =========================== ================================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

from klimb.data.checks import CHECKS, TEXTS, tools_of
from klimb.data.formats import LISTED, BadRows, Problem, Row, listed, no_rows, rows_of
from klimb.data.readers import open_source
from klimb.data.shapes import ours
from klimb.data.source import BadRow, Source
from klimb.errors import nearest

OnBad = Literal["error", "drop"]
Kind = Literal["steps", "ranking", "labelled", "preference", "prompt-completion", "messages", "prompt", "text"]

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "steps": ("prompt", "completions", "labels"),
    "ranking": ("prompt", "completions", "scores"),
    "labelled": ("prompt", "completion", "label"),
    "preference": ("chosen", "rejected"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt": ("prompt",),
    "text": ("text",),
}
VALUES = {**COLUMNS, "preference": ("prompt", "chosen", "rejected")}
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "problem", "input", "user"),
    "completion": ("answer", "response", "output", "reply", "solution", "assistant"),
    "chosen": ("preferred", "winner", "better", "positive"),
    "rejected": ("dispreferred", "loser", "worse", "negative"),
    "messages": ("dialogue", "dialog", "turns", "chat"),
    "text": ("content", "document"),
}
"""What the columns are called elsewhere, for a proposal."""
FIRST = 64
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True, slots=True)
class Record:
    """A checked row: the values of its type's columns, and the further columns as they were."""

    where: str
    values: dict[str, Any]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of one source. `problems` are those of its rows that cannot be used."""

    source: str
    kind: Kind
    conversational: bool
    records: list[Record]
    problems: list[Problem]

    @property
    def type(self) -> str:
        return _describe(self.kind, self.conversational)


def read_table(
    source: Source,
    *,
    wanted: Sequence[Kind] = tuple(COLUMNS),
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
) -> Table:
    """Read, detect and check. `wanted`: the types that the caller can use, the preferred first.

    Raises BadRows, naming each bad row and why, unless `on_bad` is "drop" and good ones remain; DataError
    where the source as a whole cannot be read, or nothing is in it.
    """
    opened, detector = open_source(source), Detector(wanted)
    read = list(detector.records(rows_of(opened, columns or {})))
    records = [each for each in read if isinstance(each, Record)]
    problems = [each for each in read if isinstance(each, Problem)]
    if not read:
        raise no_rows(opened.name)
    refuse_bad(opened.name, problems, len(records), on_bad)
    assert detector.kind is not None  # there are records
    return Table(opened.name, detector.kind, detector.conversational, records, problems)


def refuse_bad(source: str, problems: list[Problem], good: int, on_bad: OnBad) -> None:
    """Raises BadRows if there are problems that may not be dropped, or nothing else."""
    if problems and (on_bad == "error" or not good):
        raise BadRows(source, problems, good + len(problems))


class Detector:
    """Decides what type of data a source is, and checks each row against it.

    The type is the one that most of the first 64 rows have, of those among them that are good rows of their own type;
    of two that are equally frequent, the one that comes first. Where none of the 64 is good, the first good row behind
    them decides. A row that is not of this type is a bad row, with what it lacks.

    prompts_only: all that is not the prompt stays a further column, unchecked, whatever type it would make.
    transcripts: of Human: and Assistant: are messages.
    """

    def __init__(
        self, wanted: Sequence[Kind] = tuple(COLUMNS), prompts_only: bool = False, transcripts: bool = False
    ) -> None:
        self.kind: Kind | None = None
        self.conversational = False
        self._wanted: Sequence[Kind] = ("prompt", "preference") if prompts_only else wanted
        self._prompts_only, self._transcripts = prompts_only, transcripts

    @property
    def type(self) -> str:
        return "" if self.kind is None else _describe(self.kind, self.conversational)

    def records(self, rows: Iterable[Row | Problem]) -> Iterator[Record | Problem]:
        """Each row with its values checked, or why it cannot be used."""
        rows = iter(rows)
        first = list(islice(rows, FIRST))
        types: Counter[tuple[Kind | None, bool]] = Counter()
        for row in first:
            alone = Detector(self._wanted, self._prompts_only, self._transcripts)
            if isinstance(alone.attempt(row), Record):
                types[alone.kind, alone.conversational] += 1
        if types:
            [((self.kind, self.conversational), _)] = types.most_common(1)
        return map(self.attempt, chain(first, rows))

    def attempt(self, row: Row | Problem) -> Record | Problem:
        """One row; while no type is decided, a good one decides."""
        if isinstance(row, Problem):
            return row
        try:
            return self._record(Row(row.where, ours(row.values, self._transcripts)))
        except BadRow as error:
            return Problem.of(row.where, error)

    def _record(self, row: Row) -> Record:
        kind = self._kind(row)
        conversational = _is_conversational(row, kind)
        if self.kind is not None and conversational != self.conversational:
            raise BadRow(f"is {_describe(kind, conversational)}, where most rows are {self.type}: split the file")
        record = _record(row, kind, ("prompt",) if self._prompts_only else VALUES[kind])
        self.kind, self.conversational = kind, conversational
        return record

    def _kind(self, row: Row) -> Kind:
        present = {name for name, value in row.values.items() if value is not None}
        found: list[Kind] = [kind for kind, columns in COLUMNS.items() if present.issuperset(columns)]
        # What says more goes before what says less: a completion that has a label is no demonstration.
        if not self._prompts_only:
            found = [kind for kind in found if not any(_says_more(other, kind) for other in found)]
        wanted = self._wanted if self.kind is None else (self.kind,)
        for kind in wanted:
            if kind in found:
                return kind
        if self.kind is None:
            raise BadRow(_no_type(row, found, wanted))
        raise BadRow(_other_type(row, found, self.kind))


def _describe(kind: Kind, conversational: bool) -> str:
    return f"{kind} ({'conversational' if conversational else 'standard'})"


def _says_more(other: Kind, kind: Kind) -> bool:
    if kind == "prompt" and other == "preference":
        return True
    return set(COLUMNS[other]) > set(COLUMNS[kind])


def _other_type(row: Row, found: Sequence[Kind], kind: Kind) -> str:
    """Why the row is not of this type."""
    for name in COLUMNS[kind]:
        if name not in row.values:
            return f"has no column {name} (it has: {listed(row.values)}), where most rows are {kind}"
        if row.values[name] is None:
            return f"{name} is null"
    return f"is of type {found[0]} (it has: {listed(row.values)}), where most rows are {kind}"


def _no_type(row: Row, found: Sequence[Kind], wanted: Sequence[Kind]) -> str:
    """Why the row is of no type that is wanted, with the renaming that comes nearest."""
    known = {column for columns in COLUMNS.values() for column in columns}
    if nulls := [name for name, value in row.values.items() if value is None and name in known and not found]:
        return f"{nulls[0]} is null"
    what = f"is of type {found[0]}, which is not used here" if found else "has no columns of a known type"
    needed = " | ".join(f"{kind} ({', '.join(COLUMNS[kind])})" for kind in wanted)
    return (
        f"{what}, it has: {listed(row.values)}; needed: {needed}; rename them, as in columns={_renaming(row, wanted)}"
    )


def _renaming(row: Row, wanted: Sequence[Kind]) -> str:
    """What `columns` would make of the row one of the first type for which it has what may be meant."""
    names = list(row.values)[:LISTED]
    for kind in wanted:
        meant = {column: column if column in names else _meant(column, names) for column in COLUMNS[kind]}
        if all(meant.values()) and len({*meant.values()}) == len(meant):
            return "{" + ", ".join(f"{column}: {name}" for column, name in meant.items() if column != name) + "}"
    return f"{{{COLUMNS[wanted[0]][0]}: NAME}}"


def _meant(column: str, names: Sequence[str]) -> str | None:
    """The name that stands for the column in other people's data, or is spelt like it."""
    usual = [name for known in OTHER_NAMES.get(column, ()) for name in names if name.lower() == known]
    return usual[0] if usual else nearest(column, names)


def _is_conversational(row: Row, kind: Kind) -> bool:
    if kind == "messages" or kind == "text":
        return kind == "messages"
    column = COLUMNS[kind][0]
    value = row.values[column]
    if isinstance(value, str):
        return False
    if isinstance(value, list | tuple):
        return True
    raise BadRow(f"{column} is a {type(value).__name__}, neither a string nor messages")


# --- values ----------------------------------------------------------------------------------------------


def _record(row: Row, kind: Kind, names: Sequence[str]) -> Record:
    values = with_prompt(row.values) if kind == "preference" else row.values
    checked = {name: CHECKS[name](values[name], name) for name in names}
    forms = {isinstance(checked[name], list) for name in names if name in TEXTS}
    if len(forms) > 1:
        raise BadRow(f"mixes strings and messages in {', '.join(name for name in names if name in TEXTS)}")
    for name in ("labels", "scores"):
        if {"completions", name} <= checked.keys() and len(checked["completions"]) != len(checked[name]):
            raise BadRow(f"has {len(checked['completions'])} completions but {len(checked[name])} {name}")
    if "chosen" in checked and checked["chosen"] == checked["rejected"]:
        raise BadRow("chosen and rejected are the same")
    columns = {name: value for name, value in values.items() if name not in names}
    if True in (isinstance(value, list) for value in checked.values()) and columns.get("tools") is not None:
        columns["tools"] = tools_of(columns["tools"])
    return Record(row.where, checked, columns)


# --- implicit prompts -------------------------------------------------------------------------------------


def with_prompt(values: dict[str, Any]) -> dict[str, Any]:
    """A comparison's values with a `prompt`: where it has none, what both replies begin with."""
    prompt, chosen, rejected = values.get("prompt"), values["chosen"], values["rejected"]
    both_messages = isinstance(chosen, list | tuple) and isinstance(rejected, list | tuple)
    # Some data sets repeat the question as a string beside two whole conversations that contain it.
    repeated = both_messages and _contains(chosen, prompt) and _contains(rejected, prompt)
    if prompt is not None and not repeated:
        return values
    if both_messages:
        length = _common_messages(chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        length = _common_text(chosen, rejected)
    else:
        raise BadRow("mixes strings and messages in chosen, rejected")
    return {**values, "prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def _contains(messages: Sequence[Any], prompt: object) -> bool:
    return isinstance(prompt, str) and any(
        isinstance(message, Mapping) and message.get("content") == prompt for message in messages
    )


def _common_messages(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        raise BadRow("chosen and rejected are the same")
    if common == min(len(chosen), len(rejected)):
        raise BadRow("has no prompt, and one of chosen and rejected is the start of the other")
    if common == 0:
        raise BadRow("has no prompt, and chosen and rejected begin with different messages")
    return common


def _common_text(chosen: str, rejected: str) -> int:
    """Length of the common prefix, cut back to where a turn (in transcripts) or a word begins."""
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    common = chosen[: _common_length(chosen, rejected)]
    if common.startswith((HUMAN, HUMAN.lstrip())):
        turn = common.rfind(ASSISTANT)
        if turn < 0:
            raise BadRow("is a transcript whose chosen and rejected differ before the assistant's first turn")
        length = turn + len(ASSISTANT)
        if HUMAN in chosen[length:] or HUMAN in rejected[length:]:
            raise BadRow("is a transcript whose chosen and rejected differ before the last turn")
        return length
    borders = [match.start() for match in re.finditer(r"(?<=\S)\s+", common)]
    return borders[-1] if borders else 0


def _common_length(a: str, b: str) -> int:
    """Of the longest common prefix, by bisection: comparing slices is fast, comparing characters is not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
