"""Errors that a person reads: what, where, why and the fix, on one line. The CLI prints them and exits 1."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KlimbError(Exception):
    """A mistake in what klimb was given, or a failure around it. Its text is `where: what: why; fix`.

    >>> str(KlimbError("3 rows are empty", where="a.jsonl:7", why="no text to train on", fix="remove them"))
    'a.jsonl:7: 3 rows are empty: no text to train on; remove them'
    """

    def __init__(self, what: str, *, where: object = "", why: object = "", fix: str = "") -> None:
        text = f"{one_line(where)}: {what}" if where else what
        text += f": {one_line(why)}" if why else ""
        text += f"; {one_line(fix)}" if fix else ""
        super().__init__(text)


class ConfigError(KlimbError):
    """A key, a value or a combination of them that cannot be run."""


class DataError(KlimbError):
    """A file or a row that cannot be trained on."""


class RewardError(KlimbError):
    """A reward source that is missing, or failed beyond the share that a run accepts."""


class RunError(KlimbError):
    """A run directory or a checkpoint that cannot be written, read or shared."""


class Interrupted(KlimbError):
    """Ctrl-C or SIGTERM: the state is saved, the same command continues."""


def one_line(text: object) -> str:
    """Whatever a foreign error says, with its line breaks as spaces."""
    return " ".join(str(text).split())


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out. On a GPU torch has a type for that, on a CPU (where ulimit or the system
    sets a limit) only a text."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in _REFUSED)
    )


_REFUSED = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, if any."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, else all of them.

    >>> did_you_mean("grop", ["ppo", "grpo"])
    "did you mean 'grpo'?"
    """
    names = list(known)
    if close := nearest(name, names):
        return f"did you mean {close!r}?"
    return f"known: {', '.join(names)}" if names else "none is known here"
