"""One call of a user's function, in the trainer's process or in the worker: what it is given, what comes back.

The function is called by keyword, as in TRL: ``f(prompts=…, completions=…, answer=…)``, with those of the
columns that its signature accepts (all of them with ``**kwargs``).
"""

from __future__ import annotations

import inspect
import math
import reprlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from klimb.errors import RewardError, did_you_mean, one_line
from klimb.rewards.protocol import Columns, Failure, Scores, Values

MAX_DETAILS = 8_000
"""Characters of a traceback or of captured output that are kept: its end, where the error is."""

Kind = Literal["raised", "length", "timeout", "died"]


class CallFailed(Exception):
    """A call that gave no scores at all. A `length` failure blames the function, the other kinds some of
    the rows.
    """

    def __init__(self, kind: Kind, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = printable(reason)
        self.details = printable(details[-MAX_DETAILS:])


@dataclass(frozen=True, slots=True)
class Signature:
    """The keyword arguments that a function accepts (None: any) and those that it cannot do without."""

    accepts: frozenset[str] | None
    requires: frozenset[str]

    def pick(self, batch: Columns, name: str) -> Columns:
        """What of `batch` the function `name` gets. Raises RewardError where a required argument is
        missing.
        """
        for wanted in sorted(self.requires - batch.keys()):
            what = f"the function wants {wanted!r}, which is no column of the data"
            raise RewardError(what, where=name, fix=did_you_mean(wanted, batch))
        return {key: values for key, values in batch.items() if self.accepts is None or key in self.accepts}


def signature_of(function: Any, name: str) -> Signature:
    """Raises RewardError where `function` cannot be called by keyword."""
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"a {type(function).__name__}"
        raise RewardError("no reward function", where=name, why=f"it is {kind}", fix="name a function or an instance")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return Signature(None, frozenset())
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        raise RewardError(
            "positional-only parameters",
            where=name,
            why="rewards are called by keyword",
            fix="remove the '/'",
        )
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return Signature(
        accepts=None if anything else frozenset(parameter.name for parameter in named),
        requires=frozenset(parameter.name for parameter in named if parameter.default is parameter.empty),
    )


class Caller:
    """A user's function and the event loop for its coroutines.

    The loop lives as long as the caller, because clients that a function keeps between calls belong to it.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.signature = signature_of(function, name)
        self._function = function
        self._runner: Any = None

    def __call__(self, arguments: Columns, rows: int) -> Scores:
        """Raises CallFailed where the function gives no list of `rows` scores."""
        try:
            result = self._function(**arguments)
            if inspect.isawaitable(result):
                result = self._finished(result)
            return checked(result, rows)
        except CallFailed:
            raise
        except BaseException as error:  # SystemExit too: no reward function ends a training run
            raise raised(error) from error

    def _finished(self, awaitable: Any) -> Any:
        import asyncio  # slow to import, and most functions are not async

        async def result() -> Any:
            return await awaitable

        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(result())

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None


def raised(error: BaseException) -> CallFailed:
    """The failure for an exception of the user's, told from the user's first frame on."""
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    steps = traceback.extract_tb(frames)
    place = f" ({steps[-1].filename.rpartition('/')[2]}:{steps[-1].lineno})" if steps else ""
    try:
        message = one_line(error)[:300]
    except Exception:  # its __str__ is the user's too
        message = "(an error that cannot be printed)"
    reason = f"{type(error).__name__}: {message}{place}" if message else f"{type(error).__name__}{place}"
    return CallFailed("raised", reason, "".join(traceback.format_exception(type(error), error, frames)))


def checked(result: Any, rows: int) -> Scores:
    """The scores in what a function returned. Numbers of every kind and bools are accepted, text never is.

    Raises CallFailed where the result is no sequence of `rows` entries: a shorter one is never spread over
    the rows.
    """
    if isinstance(result, str | bytes | dict | set) or not hasattr(result, "__len__"):
        shown = one_line(reprlib.repr(result))
        raise CallFailed("length", f"returned {shown} ({type(result).__name__}) instead of a list of {rows} scores")
    entries = list(result)
    if len(entries) != rows:
        raise CallFailed("length", f"returned {len(entries)} scores for {rows} completions")
    values: Values = []
    failures: list[Failure] = []
    for row, entry in enumerate(entries):
        try:
            values.append(number(entry))
        except ValueError as error:
            values.append(None)
            failures.append(Failure(row, printable(str(error))))
    return Scores(values, failures)


def number(entry: Any) -> float | None:
    """One score as a float. Raises ValueError, saying what was returned, where it is no finite number."""
    if entry is None:
        return None
    if isinstance(entry, str | bytes) or not hasattr(entry, "__float__"):
        raise ValueError(f"returned {one_line(reprlib.repr(entry))} ({type(entry).__name__}), which is no number")
    try:
        value = float(entry.item() if hasattr(entry, "item") else entry)  # a tensor may still have its gradient
    except Exception as error:
        raise ValueError(f"returned a {type(entry).__name__} that is no number: {one_line(error)[:200]}") from error
    if not math.isfinite(value):
        raise ValueError(f"returned {value}")
    return value


def printable(text: str) -> str:
    """`text` without lone surrogates, which no file and no terminal takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
