"""reasoning-gym's scorers as a reward. The data that it reads is written by the world `gym` (klimb.lab.gym)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from klimb.errors import RewardError
from klimb.rewards.rules import MAX_ANSWER
from klimb.rewards.verifiers.isolated import confine

FLOOR = 0.05
"""Many scorers give up to this for anything that is not empty; it counts as 0."""


@dataclass(frozen=True, slots=True)
class gym:
    """The score that reasoning-gym gives the completion for the question of its row, in a process of its own.

    What makes a scorer raise is a wrong answer, and a score of up to 0.05, which many give to anything, is 0. Take the
    questions from the world `gym`: it refuses tasks whose scorers can be had by a constant answer.
    """

    column: Annotated[str, "column of the items, as JSON"] = "item"
    tag: Annotated[str, "whose last pair holds the answer; all of the completion where none is named"] = ""
    timeout: Annotated[float, "seconds for one answer"] = 5.0

    def __post_init__(self) -> None:
        needs_reasoning_gym("reward gym")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def begin(self) -> None:
        import reasoning_gym  # noqa: F401  # before the files are out of reach

        confine()

    def score(self, text: str, *columns: Any) -> float | None:
        if columns[0] is None:
            return None
        item = json.loads(columns[0])
        return score(scorer(item["metadata"]["source_dataset"]), self._answer(text), item)

    def _answer(self, text: str) -> str:
        if self.tag:
            before, closed, _ = text.rpartition(f"</{self.tag}>")
            _, opened, text = before.rpartition(f"<{self.tag}>")
            text = text if closed and opened else ""
        return text[-MAX_ANSWER:].strip()


Scorer = Callable[..., float]


@cache
def scorer(task: str) -> Scorer:
    """Raises ValueError where reasoning-gym does not know the task."""
    import reasoning_gym

    function: Scorer = reasoning_gym.get_score_answer_fn(task)
    return function


def score(function: Scorer, answer: str, item: dict[str, Any]) -> float:
    """Between 0 and 1."""
    try:
        given = float(function(answer=answer, entry=item))
    except Exception:  # prime_factorization raises ValueError for what is no list of integers, boxnet TypeError for "0"
        return 0.0
    return min(given, 1.0) if given > FLOOR else 0.0


def needs_reasoning_gym(where: str) -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise RewardError("reasoning-gym is not installed", where=where, fix="pip install 'klimb[verify]'")
