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
=================== =========================== ================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from klimb.data.formats import BadRows, Problem, Row, no_rows, rows_of
from klimb.data.readers import BadRow, Source, open_source
from klimb.data.shapes import ours
from klimb.errors import DataError, nearest
from klimb.types import Message, Text

OnBad = Literal["error", "drop"]
Kind = Literal["steps", "labelled", "preference", "prompt-completion", "messages", "prompt", "text"]

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "steps": ("prompt", "completions", "labels"),
    "labelled": ("prompt", "completion", "label"),
    "preference": ("chosen", "rejected"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt": ("prompt",),
    "text": ("text",),
}
VALUES = {**COLUMNS, "preference": ("prompt", "chosen", "rejected")}
ROLES = ("system", "developer", "user", "assistant", "tool")
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
    where the source as a whole cannot be used (nothing in it, another type of data, two types in one file).
    """
    opened, detector = open_source(source), Detector(wanted)
    read = [detector.attempt(row) for row in rows_of(opened, columns or {})]
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
    """The type is that of the first row which has one; a row of another type is an error, not a bad row.

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
        self._first = ""

    @property
    def type(self) -> str:
        return "" if self.kind is None else _describe(self.kind, self.conversational)

    def attempt(self, row: Row | Problem) -> Record | Problem:
        """The row with its values checked, or why it cannot be used. Raises DataError for a second type."""
        if isinstance(row, Problem):
            return row
        try:
            return self._record(Row(row.where, ours(row.values, self._transcripts)))
        except BadRow as error:
            return Problem(row.where, str(error))

    def _record(self, row: Row) -> Record:
        if self.kind is not None and not self._prompts_only:
            _require_columns(row, self.kind)
        kind = _kind(row, self._wanted, exact=not self._prompts_only)
        conversational = _is_conversational(row, kind)
        if self.kind is None:
            self.kind, self.conversational, self._first = kind, conversational, row.where
        elif (kind, conversational) != (self.kind, self.conversational):
            raise DataError(
                f"is {_describe(kind, conversational)}, but {self._first} is {self.type}",
                where=row.where,
                fix="one file holds one type: split it",
            )
        return _record(row, kind, ("prompt",) if self._prompts_only else VALUES[kind])


def _require_columns(row: Row, kind: Kind) -> None:
    """A null is a missing value of this type, where a missing column is another type."""
    for name in COLUMNS[kind]:
        if name in row.values and row.values[name] is None:
            raise BadRow(f"{name} is null")


def _describe(kind: Kind, conversational: bool) -> str:
    return f"{kind} ({'conversational' if conversational else 'standard'})"


# --- detection --------------------------------------------------------------------------------------------


def _kind(row: Row, wanted: Sequence[Kind], exact: bool) -> Kind:
    present = {name for name, value in row.values.items() if value is not None}
    found: list[Kind] = [kind for kind, columns in COLUMNS.items() if present.issuperset(columns)]
    if not found:
        raise BadRow(_no_type(row))
    # What says more goes before what says less: a completion that has a label is no demonstration.
    if exact:
        found = [kind for kind in found if not any(_says_more(other, kind) for other in found)]
    for kind in wanted:
        if kind in found:
            return kind
    raise DataError(
        f"is of type {found[0]}, which is not used here",
        where=row.where,
        why="needed: " + " | ".join(f"{kind} ({', '.join(COLUMNS[kind])})" for kind in wanted),
        fix="rename columns, as in columns={prompt: question}",
    )


def _says_more(other: Kind, kind: Kind) -> bool:
    if kind == "prompt" and other == "preference":
        return True
    return set(COLUMNS[other]) > set(COLUMNS[kind])


def _no_type(row: Row) -> str:
    empty = [name for name, value in row.values.items() if value is None]
    known = sorted({column for columns in COLUMNS.values() for column in columns})
    if nulls := [name for name in empty if name in known]:
        return f"{nulls[0]} is null"
    meant = next((f" ({name!r} meant as {near!r}?)" for name in row.values if (near := nearest(name, known))), "")
    return (
        f"has no columns of a known type, it has: {', '.join(row.values) or 'none'}{meant}; "
        "rename them, as in columns={prompt: question}"
    )


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


# --- checks -----------------------------------------------------------------------------------------------


def _record(row: Row, kind: Kind, names: Sequence[str]) -> Record:
    values = with_prompt(row.values) if kind == "preference" else row.values
    checked = {name: CHECKS[name](values[name], name) for name in names}
    forms = {isinstance(checked[name], list) for name in names if name in TEXTS}
    if len(forms) > 1:
        raise BadRow(f"mixes strings and messages in {', '.join(name for name in names if name in TEXTS)}")
    if {"completions", "labels"} <= checked.keys() and len(checked["completions"]) != len(checked["labels"]):
        raise BadRow(f"has {len(checked['completions'])} completions but {len(checked['labels'])} labels")
    if "chosen" in checked and checked["chosen"] == checked["rejected"]:
        raise BadRow("chosen and rejected are the same")
    columns = {name: value for name, value in values.items() if name not in names}
    if True in (isinstance(value, list) for value in checked.values()) and columns.get("tools") is not None:
        columns["tools"] = _tools(columns["tools"])
    return Record(row.where, checked, columns)


def _tools(value: Any) -> list[dict[str, Any]]:
    """As a chat template prints them."""
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(f"tools is {value!r:.40}, not a list of objects")
    return [dict(tool) for tool in value]


def _text(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return _messages(value, name)
    raise BadRow(f"{name} is a {type(value).__name__}, neither a string nor messages")


def _messages(value: Sequence[Any], name: str) -> list[Message]:
    if not value:
        raise BadRow(f"{name} has no messages")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow(f"{place} is a {type(message).__name__}, not a message with role and content")
    # A table fills in the columns that a message lacks with nulls, and templates would print them.
    kept = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in kept:
        kept.setdefault("content", "")
    for key in ("role", "content"):
        if key not in kept:
            raise BadRow(f"{place} has no {key} (it has: {', '.join(kept) or 'nothing'})")
    if kept["role"] not in ROLES:
        raise BadRow(f"{place} has the role {kept['role']!r}, known are {', '.join(ROLES)}")
    if not isinstance(kept["content"], str):
        raise BadRow(f"{place} has a {type(kept['content']).__name__} as content, only strings are supported")
    return kept


def _prompt(value: Any, name: str) -> Text:
    text = _text(value, name)
    if isinstance(text, list) and text[-1]["role"] == "assistant":
        raise BadRow(f"{name} ends with an assistant message, so there is nothing to answer")
    return text


def _reply(value: Any, name: str) -> Text:
    text = _text(value, name)
    if isinstance(text, str):
        if not text:
            raise BadRow(f"{name} is empty")
        return text
    for message, place in ((text[0], "starts"), (text[-1], "ends")):
        if message["role"] != "assistant":
            raise BadRow(f"{name} {place} with a {message['role']} message, it has to be the assistant's")
    _require_content(text, name)
    return text


def _require_content(messages: list[Message], name: str) -> None:
    for index, message in enumerate(messages):
        # A message with further fields (a call of a tool, say) may do without words.
        if message["role"] == "assistant" and not message["content"] and message.keys() == {"role", "content"}:
            raise BadRow(f"{name}[{index}] is empty")


def _conversation(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise BadRow(f"{name} is a {type(value).__name__}, not a list of messages")
    messages = _messages(value, name)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{name} has no assistant message, so there is nothing to learn")
    if messages[0]["role"] == "assistant":
        raise BadRow(f"{name} starts with an assistant message, there has to be something to answer")
    _require_content(messages, name)
    return messages


def _plain(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is a {type(value).__name__}, not a string")
    if not value:
        raise BadRow(f"{name} is empty")
    return value


def _label(value: Any, name: str) -> bool:
    if value in (0, 1) and isinstance(value, int | float):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):  # all that CSV can say
        return value.strip().lower() in ("true", "1")
    raise BadRow(f"{name} is {value!r:.40}, neither true nor false")


def _labels(value: Any, name: str) -> list[bool]:
    return [_label(item, f"{name}[{index}]") for index, item in enumerate(_list(value, name))]


def _steps(value: Any, name: str) -> list[str]:
    return [_plain(item, f"{name}[{index}]") for index, item in enumerate(_list(value, name))]


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(f"{name} is {'empty' if value in ([], ()) else 'no list'}")
    return value


TEXTS = ("prompt", "completion", "chosen", "rejected")
CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "prompt": _prompt,
    "completion": _reply,
    "chosen": _reply,
    "rejected": _reply,
    "messages": _conversation,
    "text": _plain,
    "label": _label,
    "labels": _labels,
    "completions": _steps,
}


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
