"""Runs that end at a chosen instant, in forked children: whoever forks has already imported everything.

A child dies by a real SIGKILL: nothing of Python runs after it, no `finally`, no buffer is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

KILLED = -signal.SIGKILL


def fork(job: Callable[[], object]) -> int:
    """The exit code of a child that runs the job: 0, KILLED, or 1 with the traceback on standard error."""
    return ended(start(job))


def start(job: Callable[[], object], *, own_session: bool = False) -> int:
    """The process id of such a child. Its own session, like a terminal's job: signals go to the whole group."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        if own_session:
            os.setsid()
        job()
        os._exit(0)
    except SystemExit as left:
        os._exit(int(left.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def at_call(target: str, nth: int, act: Callable[[], object] = die, *, after: bool = False) -> Iterator[None]:
    """Act at the n-th call (from 1) of the named function, before it does anything or once it has returned."""
    real, calls = pkgutil.resolve_name(target), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            act()
        value = real(*args, **options)
        if calls == nth and after:
            act()
        return value

    with mock.patch(target, counted):
        yield


@contextlib.contextmanager
def in_half_a_write(nth: int) -> Iterator[None]:
    """Die when half of the n-th write to any file has reached it."""
    real, writes = os.write, 0

    def counted(descriptor: int, data: Any) -> int:
        nonlocal writes
        writes += 1
        if writes == nth:
            real(descriptor, memoryview(data)[: len(data) // 2])
            die()
        return real(descriptor, data)

    with mock.patch.object(os, "write", counted):
        yield


@contextlib.contextmanager
def in_half_a_line(nth: int) -> Iterator[None]:
    """Die when half of the n-th line of metrics or events has reached its file."""
    from klimb.runtime.run import Run

    lines = 0
    real = Run._append

    def counted(run: Run, name: str, row: dict[str, Any]) -> None:
        nonlocal lines
        lines += 1
        if lines == nth:
            with (run.path / name).open("a") as file:
                file.write(json.dumps(row)[: len(json.dumps(row)) // 2])
            die()
        real(run, name, row)

    with mock.patch.object(Run, "_append", counted):
        yield


@contextlib.contextmanager
def at_moment(moment: int) -> Iterator[None]:
    """Die at the `moment`-th call of any function, Python's or C's, once the run has read its checkpoints.

    Moments are counted in calls, not in seconds: so they are the same on a busy machine.
    """
    left = moment

    def tick(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            die()

    with at_call("klimb.stages.common.Session.resume", 1, lambda: sys.setprofile(tick), after=True):
        yield


def count_moments(job: Callable[[], object], note: Path) -> int:
    """How many moments the job has, by running it."""
    calls = 0

    def tick(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1

    def counted() -> None:
        with at_call("klimb.stages.common.Session.resume", 1, lambda: sys.setprofile(tick), after=True):
            job()
        sys.setprofile(None)
        note.write_text(str(calls))

    assert fork(counted) == 0
    return int(note.read_text())


# What a run leaves ---------------------------------------------------------------------------------------------------


def remains(run: Path) -> dict[str, Any]:
    """Everything that has to be the same in a run that was never interrupted, by the name of its file.

    Left out: the manifest's hour, what was told of the process (`run/…`), and how long things took.
    """
    found: dict[str, Any] = {}
    for folder in ("model", "checkpoints", "samples"):
        for file in sorted((run / folder).rglob("*")):
            if file.is_file():
                found[str(file.relative_to(run))] = file.read_bytes()
    for name in ("metrics.jsonl", "events.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()] if (run / name).exists() else []
        kept = [row for row in rows if not str(row.get("kind", "")).startswith("run/")]
        found[name] = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in kept]
    result = json.loads((run / "result.json").read_text())
    found["result.json"] = {k: v for k, v in result.items() if k not in ("seconds", "model")}
    return found


def differences(run: Path, reference: Path) -> list[str]:
    """The files in which two runs are not the same."""
    mine, its = remains(run), remains(reference)
    return [name for name in sorted({*mine, *its}) if mine.get(name) != its.get(name)]
