"""Rows with their places, checked, their columns by the names that we use; whatever they were read from.

Rows and problems together account for every row of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from klimb.data.readers import open_source
from klimb.data.source import MAX_DEPTH, BadRow, Opened, Source
from klimb.errors import DataError, nearest

LISTED = 20
LONGEST = 600


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read. `where` is its place for errors: ``data.jsonl:17``."""

    where: str
    values: dict[str, Any]


class Problem(NamedTuple):
    """Why the row at `where` cannot be used."""

    where: str
    reason: str

    @classmethod
    def of(cls, where: str, error: Exception) -> Problem:
        """What a row wrote into the reason is cut short, and its control characters reach no terminal."""
        reason = str(error)
        short = reason if len(reason) <= LONGEST else reason[:LONGEST] + " …"
        return cls(where, short if short.isprintable() else "".join(map(_printable, short)))

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadRows(DataError):
    """Rows that cannot be used, each with its reason. The first line of the text stands alone."""

    def __init__(self, source: str, problems: list[Problem], total: int) -> None:
        self.problems, self.rows = problems, total
        if len(problems) == total > 1 and len({problem.reason for problem in problems}) == 1:
            super().__init__(
                f"none of the {total} rows can be used, for one reason: {problems[0].reason}", where=source
            )
            return
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        super().__init__(
            f"{len(problems)} of {total} rows cannot be used, the first: {problems[0]}; "
            f"mend them or set on_bad=drop{listed if len(problems) > 1 else ''}{more}",
            where=source,
        )


def read_rows(source: Source, columns: Mapping[str, str] | None = None) -> tuple[list[Row], list[Problem]]:
    """All rows of `source`, and the problems of those that are malformed.

    columns: ``{"prompt": "question"}`` makes the file's `question` the row's `prompt`, also where it has
    a `prompt` of its own.

    Raises DataError where there is nothing to read at all: no such file, a broken archive, no rows.
    """
    opened = open_source(source)
    read = list(rows_of(opened, columns or {}))
    problems = [row for row in read if isinstance(row, Problem)]
    if not read:
        raise no_rows(opened.name)
    return [row for row in read if isinstance(row, Row)], problems


def rows_of(opened: Opened, columns: Mapping[str, str]) -> Iterator[Row | Problem]:
    """In the order in which they are read, each in its place."""
    for where, value in opened.pairs:
        try:
            if isinstance(value, BadRow):
                raise value
            yield Row(where, _renamed(_checked(value), columns))
        except BadRow as error:
            yield Problem.of(where, error)


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def no_rows(name: str) -> DataError:
    return DataError("no rows", where=name, fix="give it at least one")


# --- any row ----------------------------------------------------------------------------------------------


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow(f"is a {type(value).__name__}, not an object of columns")
    check_text(value)
    return dict(value)


def check_text(value: Any, depth: int = 0) -> None:
    """Lone surrogates would stop the tokenizer, and depth the hashing, far from the row that has them."""
    if depth > MAX_DEPTH:
        raise BadRow(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"has half a character (a lone surrogate) at position {error.start}") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadRow(f"the key {key!r} is not a string")
            check_text(key, depth)
            check_text(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_text(item, depth + 1)


def listed(names: Iterable[str]) -> str:
    """The first of the columns of a row."""
    few = list(islice(names, LISTED + 1))
    return ", ".join(few[:LISTED]) + (", …" if len(few) > LISTED else "") or "none"


def _renamed(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for column in columns.values():
        if column not in values:
            near = nearest(column, list(values)[:LISTED])
            meant = f", did you mean {near!r}?" if near else ""
            raise BadRow(f"has no column {column!r} (it has: {listed(values)}){meant}")
    kept = {name: value for name, value in values.items() if name not in columns.values()}
    return {**kept, **{name: values[column] for name, column in columns.items()}}
