"""A query that is run against the row's database and held against what the reference query gives."""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from klimb.rewards.code import code_of
from klimb.rewards.rules import Column, references
from klimb.rewards.verifiers.isolated import confine

MAX_ROWS = 100_000
MAX_VALUE = 1_000_000
"""Rows of a result, and bytes of a value or a query: more is wrong."""
MAX_QUERY = 20_000
STEPS = 10_000
"""Instructions of SQLite between two looks at the clock."""
_READING = {sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


@dataclass(frozen=True, slots=True)
class sql:
    """1 where the completion's query, its last fenced block or all of it, gives the rows that the reference's gives.

    Executed in SQLite, where it can read this database and do nothing else, in a process of its own. The database is a
    script that makes it (CREATE TABLE …; INSERT …) or the path of a file. Rows count as often as they occur; their
    order counts where the reference's outermost query has ORDER BY. Names of columns do not count, their order does. A
    reference that gives no rows says nothing about a query, so that such a row abstains; one that takes half the time
    is an error.
    """

    column: Column = "answer"
    database: Annotated[str, "column of the databases: scripts, or paths of files"] = "database"
    timeout: Annotated[float, "seconds for one row; a query that takes longer scores 0 and counts as timeout"] = 5.0

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, self.database)

    def begin(self) -> None:
        confine(files=True)

    def score(self, text: str, *columns: Any) -> float | None:
        if any(entry is None for entry in columns):
            return None
        query = code_of(text).strip()
        with closing(opened(str(columns[1]))) as database:
            late = time.monotonic() + 0.5 * self.timeout
            database.set_progress_handler(lambda: time.monotonic() > late, STEPS)
            wanted = [(str(each), self._wanted(database, str(each))) for each in references(columns[0])]
            database.set_progress_handler(None, 0)  # from here on whoever waits for this process looks at the clock
            if not any(rows for _, rows in wanted):
                return None
            if not query or len(query) > MAX_QUERY:
                return 0.0
            try:
                given = rows_of(database, query)
            except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
                return 0.0
        return float(any(rows and same_rows(given, rows, is_ordered(each)) for each, rows in wanted))

    def _wanted(self, database: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
        try:
            return rows_of(database, query)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ValueError(f"the reference query in column {self.column!r} fails: {error}: {query[:80]!r}") from None


def opened(database: str) -> sqlite3.Connection:
    """A connection that can only read. Raises ValueError."""
    is_file = "\n" not in database and len(database) < 1_000 and Path(database).is_file()
    try:
        if is_file:
            connection = sqlite3.connect(f"{Path(database).absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        else:
            connection = sqlite3.connect(":memory:")
            connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            connection.executescript(database)
    except sqlite3.Error as error:
        raise ValueError(f"the database {database[:80]!r} is neither a file nor a script: {error}") from None
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)
    return connection


def rows_of(database: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    """Raises sqlite3.Error, and ValueError for more rows than anybody compares."""
    cursor = database.execute(query)
    rows: list[tuple[Any, ...]] = cursor.fetchmany(MAX_ROWS + 1)
    if len(rows) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS} rows")
    return rows


def same_rows(given: Sequence[tuple[Any, ...]], wanted: Sequence[tuple[Any, ...]], ordered: bool) -> bool:
    given, wanted = [tuple(map(_value, row)) for row in given], [tuple(map(_value, row)) for row in wanted]
    return given == wanted if ordered else Counter(given) == Counter(wanted)


def _value(value: Any) -> Any:
    """Numbers to nine digits: sums come out in another order. 1 is 1.0, and '1' is neither."""
    return float(f"{value:.9g}") if isinstance(value, float | int) else value


def is_ordered(query: str) -> bool:
    """Whether the outermost query has ORDER BY."""
    bare = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", " ", query, flags=re.DOTALL)
    depth, outside = 0, []
    for character in bare:
        depth += {"(": 1, ")": -1}.get(character, 0)
        outside.append(character if depth == 0 else " ")
    return re.search(r"\border\s+by\b", "".join(outside), re.IGNORECASE) is not None
