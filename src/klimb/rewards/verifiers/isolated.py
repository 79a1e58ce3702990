"""Rules that reach an evaluator (SymPy, SQLite): row by row in worker processes, each row within a deadline.

The trainer never runs them. A worker gives up files, network and new processes before it sees a completion, as far as
the machine can; one that misses its deadline or dies is killed and replaced.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import NamedTuple, Protocol, get_args

from klimb.errors import RewardError, did_you_mean
from klimb.rewards.calling import CallFailed
from klimb.rewards.function import START_TIMEOUT
from klimb.rewards.process import WorkerProcess
from klimb.rewards.protocol import Columns, Failure, Scores
from klimb.rewards.rules import Rule, plain_text
from klimb.rewards.sandbox import Kind
from klimb.rewards.sandbox.inside.confine import Confinement, Unconfined
from klimb.types import Text

MEMORY = 1 << 30
"""Bytes of address space of a worker. Python with SymPy takes a third."""
MAX_TEXT = 200_000
"""Characters at the end of a completion that a worker is sent."""
CPU = 10**6
"""Seconds that a worker may compute in its life: the deadlines come first."""
ROWS = 16
"""For which a further worker is worth its start."""


class DeadlineRule(Rule, Protocol):
    @property
    def timeout(self) -> float:
        """Seconds for one row."""
        ...

    def begin(self) -> None:
        """Called in the worker, before the first row: import what is needed, then `confine`."""


class Ending(NamedTuple):
    """How one row ended. `value` is None for abstain and error."""

    kind: Kind
    value: float | None = None
    why: str = ""


class Isolated:
    """A rule as a Reward. Starts a worker at once, and raises RewardError where it does not start."""

    independent = waits = True

    def __init__(self, name: str, rule: DeadlineRule) -> None:
        if not 0 < rule.timeout <= 3600:
            raise RewardError(
                f"timeout is {rule.timeout}", where=f"reward {name}", fix="give the seconds of one row, up to 3600"
            )
        self.name = name
        self._rule = rule
        self._target = json.dumps({name: asdict(rule)})  # type: ignore[call-overload]
        self._idle: queue.LifoQueue[WorkerProcess] = queue.LifoQueue()
        self._idle.put(WorkerProcess(self._target, START_TIMEOUT))

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        for name in self._rule.columns:
            if name not in columns:
                what = f"the data has no column {name!r}"
                raise RewardError(what, where=f"reward {self.name}", fix=did_you_mean(name, columns))
        rows = [{name: [columns[name][row]] for name in self._rule.columns} for row in range(len(completions))]
        with ThreadPoolExecutor(min(_cores(), 1 + len(rows) // ROWS)) as threads:
            endings = list(threads.map(self._ending, completions, rows))
        failures = [Failure(row, ending.why) for row, ending in enumerate(endings) if ending.kind == "error"]
        return Scores([ending.value for ending in endings], failures, counts=counted(end.kind for end in endings))

    def _ending(self, completion: Text, row: Columns) -> Ending:
        asked = {"completions": [plain_text(completion)[-MAX_TEXT:]], **row}
        for last in (False, True):
            try:
                with self._worker() as worker:
                    scores = worker.score(asked, 1, self._rule.timeout)
            except CallFailed as failed:
                if failed.kind == "timeout":
                    return Ending("timeout", 0.0, failed.reason)
                if failed.kind == "died" and not last:  # perhaps it was killed by chance
                    continue
                return Ending("error", None, failed.reason)
            if scores.failures:
                return Ending("error", None, scores.failures[0].reason)
            return ending_of(scores.values[0])
        raise AssertionError("unreachable")

    @contextmanager
    def _worker(self) -> Iterator[WorkerProcess]:
        """One that is free, or a new one. It is free again unless it has missed its deadline or died."""
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = WorkerProcess(self._target, START_TIMEOUT)
        try:
            yield worker
        except CallFailed as failed:
            if failed.kind == "raised":
                self._idle.put(worker)
            raise
        except BaseException:
            worker.close()
            raise
        self._idle.put(worker)

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get_nowait().close()


def ending_of(value: float | None) -> Ending:
    return Ending("abstain") if value is None else Ending("ok" if value >= 1.0 else "wrong", value)


def counted(kinds: Iterator[Kind]) -> dict[str, int]:
    counts: Counter[str] = Counter(dict.fromkeys(get_args(Kind), 0))
    counts.update(kinds)
    return dict(counts)


def confine(*, files: bool = False) -> None:
    """Give up new processes, network, memory beyond MEMORY and, unless `files`, all files but Python's, for good.

    Where the kernel has no Landlock or seccomp, and with `files`, memory alone is bounded: what is evaluated here are
    expressions and queries, not programs, so that this is the second wall and not the first.
    """
    readable = [path for path in {*sys.path, sys.base_prefix, "/lib", "/lib64", "/usr/lib"} if os.path.isdir(path)]
    for tier in ("unsafe_local",) if files else ("landlock", "unsafe_local"):
        with suppress(Unconfined, OSError, ValueError):
            confinement = Confinement(tier, readable, MEMORY)
            confinement.limit(CPU)
            confinement.enter()
            return


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
