"""A user's function as a reward, as in TRL: ``f(prompts, completions, **columns) -> list[float | None]``.

From a file it runs in a process of its own, which is killed when it hangs and replaced when it dies. A
callable from Python runs in this process: quick to reach, but nothing can stop it, so that a hang ends the
run with an error.

One bad row does not lose the batch. Where a call raises, hangs or dies, the rows are tried again in halves
until the guilty ones are alone. A function whose score of a row depends on its neighbours sees smaller
batches then.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

from klimb.errors import RewardError, one_line
from klimb.plugin import source_hash
from klimb.rewards.calling import Caller, CallFailed, Signature
from klimb.rewards.process import WorkerProcess
from klimb.rewards.protocol import Columns, Failure, Scores, Values
from klimb.types import Text

TIMEOUT = 60.0
"""Seconds that one call, with all rows of a step, may take."""
START_TIMEOUT = 120.0
"""Seconds that loading the file may take, with whatever it imports."""
PATIENCE = 4
"""All tries of one batch together take at most this many timeouts."""


class Engine(Protocol):
    """Where the function runs."""

    @property
    def signature(self) -> Signature: ...

    def score(self, arguments: Columns, rows: int, timeout: float) -> Scores: ...

    def close(self) -> None: ...


class FunctionReward:
    """A Reward that asks a user's function; see `from_file` and `from_callable`.

    judges: its numbers are verdicts, 1 or less. independent, waits: see Reward.
    """

    def __init__(
        self, name: str, where: str, start: Callable[[], Engine], timeout: float, *,
        judges: bool = False, independent: bool = False, waits: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.independent = independent
        self.waits = waits
        self._judges = judges
        self._where = where
        self._start = start
        self._timeout = timeout
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._running()

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        if not completions:
            return Scores([])
        batch = {**columns, "prompts": list(prompts), "completions": list(completions)}
        with self._lock:
            arguments = self._running().signature.pick(batch, self._where)
            scores = in_halves(partial(self._attempt, arguments), len(completions), self._timeout)
        return replace(scores, counts=scores.endings(judged=True)) if self._judges else scores

    def _running(self) -> Engine:
        if self._engine is None:
            try:
                self._engine = self._start()
            except RewardError as error:
                cause = error.__cause__
                if not (isinstance(cause, CallFailed) and cause.kind == "died"):
                    raise
                self._engine = self._start()  # it may have been killed by chance; if not, it shows again
        return self._engine

    def _attempt(self, arguments: Columns, rows: list[int], timeout: float) -> Scores:
        selected = {name: [values[row] for row in rows] for name, values in arguments.items()}
        try:
            return self._running().score(selected, len(rows), timeout)
        except CallFailed as failed:
            if failed.kind in ("timeout", "died"):
                self._engine = None
            raise

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def from_file(target: str, *, name: str = "", timeout: float = TIMEOUT, independent: bool = False) -> FunctionReward:
    """The function ``file.py:name`` in a process of its own. Raises RewardError where it cannot be loaded.

    independent: its score of a row depends on no other row, and finished groups may be scored before the last one is.
    """
    digest = _hash(target)

    def start() -> WorkerProcess:
        if _hash(target) != digest:
            raise RewardError(
                "the file was changed while the run was going", where=target,
                why="a new process would score by another function", fix="start the run again",
            )  # fmt: skip
        return WorkerProcess(target, START_TIMEOUT)

    name = name or target.rpartition(":")[2]
    return FunctionReward(name, target, start, timeout, independent=independent, waits=independent)


def from_callable(
    function: Callable[..., Any], *, name: str = "", timeout: float = TIMEOUT, judges: bool = False,
    independent: bool = False,
) -> FunctionReward:  # fmt: skip
    """`function` in this process. Raises RewardError where it cannot be called by keyword."""
    name = name or getattr(function, "__name__", type(function).__name__)
    caller = Caller(function, name)
    start = lambda: InProcess(caller, name)  # noqa: E731
    return FunctionReward(name, name, start, timeout, judges=judges, independent=independent)


def _hash(target: str) -> str:
    try:
        return source_hash(target)
    except ValueError as error:
        raise RewardError(one_line(error)) from error


Tasks = queue.SimpleQueue[tuple[Columns, int] | None]
Outcomes = queue.SimpleQueue[Scores | CallFailed]


class InProcess:
    """Runs a caller in one thread of this process, so that a hang can at least be noticed."""

    def __init__(self, caller: Caller, name: str) -> None:
        self.signature = caller.signature
        self._caller = caller
        self._name = name
        self._tasks: Tasks = queue.SimpleQueue()
        self._outcomes: Outcomes = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def score(self, arguments: Columns, rows: int, timeout: float) -> Scores:
        if self._thread is None:
            queues = (self._tasks, self._outcomes)
            self._thread = threading.Thread(target=self._work, args=queues, name=f"reward {self._name}", daemon=True)
            self._thread.start()
        self._tasks.put((_copied(arguments), rows))
        try:
            outcome = self._outcomes.get(timeout=timeout)
        except queue.Empty:
            raise self._hung(timeout) from None
        if isinstance(outcome, CallFailed):
            raise outcome
        return outcome

    def _work(self, tasks: Tasks, outcomes: Outcomes) -> None:
        while (task := tasks.get()) is not None:
            try:
                outcomes.put(self._caller(*task))
            except CallFailed as failed:
                outcomes.put(failed)
        self._caller.close()

    def _hung(self, timeout: float) -> RewardError:
        """The error for a call that goes on. Its thread is left behind with its queues: its answer is for
        nobody.
        """
        frame = sys._current_frames().get((self._thread and self._thread.ident) or 0)
        place = f" at {frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
        self._tasks, self._outcomes, self._thread = queue.SimpleQueue(), queue.SimpleQueue(), None
        return RewardError(
            f"the reward function is still running after {timeout:.3g} s{place}",
            where=self._name,
            why="a function in this process cannot be stopped",
            fix="name it as my_reward.py:NAME, so that it runs in a process that can",
        )

    def close(self) -> None:
        self._tasks.put(None)
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None


def _copied(value: Any) -> Any:
    """Lists and dicts anew, so that a function that changes its arguments changes nothing of ours."""
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_copied(entry) if isinstance(entry, list | dict) else entry for entry in value]
    return value


def in_halves(attempt: Callable[[list[int], float], Scores], rows: int, timeout: float) -> Scores:
    """All rows at once; where that fails, in halves until the guilty rows are alone.

    `attempt(rows, seconds)` raises CallFailed. After a timeout the halves get half the time (at least an
    eighth of `timeout`), and everything together takes at most PATIENCE timeouts; rows not scored by then
    have failed. A process that dies may have been killed by chance (out of memory, an operator), so its
    rows are first tried again as they were.
    """
    values: Values = [None] * rows
    failures: list[Failure] = []
    notes: list[str] = []
    deadline = time.monotonic() + PATIENCE * timeout
    pending = [(list(range(rows)), timeout)]
    while pending:
        some, seconds = pending.pop()
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise CallFailed(
                    "length", f"not scored: finding the rows that fail took over {PATIENCE * timeout:.3g} s"
                )
            scores = attempt(some, min(seconds, left))
        except CallFailed as failed:
            if failed.kind == "died" and not notes:
                notes.append(f"{failed.reason}; {len(some)} rows were scored again by a new one")
                pending.append((some, seconds))
            elif failed.kind == "length" or len(some) == 1:
                ending: Literal["error", "timeout"] = "timeout" if failed.kind == "timeout" or left <= 0 else "error"
                failures += [Failure(row, failed.reason, failed.details, ending) for row in some]
            else:
                if failed.kind == "timeout":
                    seconds = max(seconds / 2, timeout / 8)
                middle = len(some) // 2
                pending += [(some[middle:], seconds), (some[:middle], seconds)]
            continue
        for row, value in zip(some, scores.values, strict=True):
            values[row] = value
        failures += [replace(failure, row=some[failure.row]) for failure in scores.failures]
    return Scores(values, sorted(failures, key=lambda failure: failure.row), notes=notes)
