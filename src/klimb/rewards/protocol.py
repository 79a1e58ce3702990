"""What every reward source is: texts and columns in, scores out, and a list of what went wrong.

A failure is never a score. It is an entry in `failures`, and its value is None; None without an entry means
that the source chose not to score the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from klimb.types import Text

Values = list[float | None]
Columns = dict[str, list[Any]]
"""Further columns of the batch by name, one entry per row."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one row has no score. `details` holds the traceback and what the function printed, where there is
    any.
    """

    row: int
    reason: str
    details: str = ""
    kind: Literal["error", "timeout"] = "error"


@dataclass(frozen=True, slots=True)
class Scores:
    """One value per row. Failed rows are None and listed in `failures`, at most once each."""

    values: Values
    failures: list[Failure] = field(default_factory=list)
    parts: dict[str, Values] = field(default_factory=dict)
    """The components of a mixture, unweighted; None where one was not asked. Empty where there is only one."""
    notes: list[str] = field(default_factory=list)
    """What went wrong without costing a score, such as a worker that was replaced."""
    weights: dict[str, float] = field(default_factory=dict)
    """What the components are multiplied with, by the same names."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many rows ended how, where the source tells; see `endings`. Of a component: under "its name/ending"."""
    raw: Values | None = None
    """What the source gave, where `values` were normalised or clipped since."""
    steps: list[list[tuple[int, float]]] | None = None
    """What of each row's value belongs to tokens before its last: their places in `completion_ids`, and how much."""

    def endings(self, *, judged: bool = False) -> dict[str, int]:
        """How many rows ended how; they add up to the rows.

        A number is a score, or a verdict where the source judges: 1 is ok, anything less wrong.
        """
        numbers = [value for value in self.values if value is not None]
        late = sum(failure.kind == "timeout" for failure in self.failures)
        given = {"ok": sum(n >= 1.0 for n in numbers), "wrong": sum(n < 1.0 for n in numbers)}
        return (given if judged else {"scored": len(numbers)}) | {
            "abstain": len(self.values) - len(numbers) - len(self.failures),
            "timeout": late,
            "error": len(self.failures) - late,
        }


class Reward(Protocol):
    """Scores completions. Raises RewardError only where no row can ever be scored (a missing file or
    column).

    Two facts more, False where a source does not tell. `independent`: the score of a row depends on no other row,
    so that rows may be scored in any portions. `waits`: it takes time and no work of this process, so that it pays
    to begin with what is there; from several threads at once.
    """

    @property
    def name(self) -> str:
        """The name under which the scores are logged."""
        ...

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores: ...

    def close(self) -> None:
        """Give back processes and memory. May be called twice."""
        ...


@dataclass
class FakeReward:
    """A reward for tests: `score` of each completion; `fail` says for which rows of which call it breaks."""

    score: Callable[[Text], float | None] = len
    fail: Callable[[int, int], bool] = lambda call, row: False
    name: str = "fake"
    calls: int = 0
    closed: bool = False

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        failures = [Failure(row, "told to fail") for row in range(len(completions)) if self.fail(self.calls, row)]
        failed = {failure.row for failure in failures}
        self.calls += 1
        values = [None if row in failed else self.score(text) for row, text in enumerate(completions)]
        return Scores(values, failures)

    def close(self) -> None:
        self.closed = True
