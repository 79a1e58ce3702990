"""Several rewards as one: a weighted sum, of which every part is kept under its own name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from klimb.errors import RewardError
from klimb.rewards.protocol import Columns, Failure, Reward, Scores, Values
from klimb.types import Text


@dataclass(frozen=True, slots=True)
class Part:
    """One term of a sum and the name that it is logged under."""

    name: str
    reward: Reward
    weight: float


class WeightedSum:
    """Σ weight · value over the parts that scored the row.

    A part that abstains (None) is left out of the sum, as in TRL, and a row that all parts abstain from is
    None. A part that *fails* on a row fails the row: left out in silence, a bug of one part would change
    what is maximised.
    """

    name = "sum"

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise RewardError("a weighted reward without parts", fix="name at least one reward")
        names = [part.name for part in parts]
        for name in names:
            if names.count(name) > 1:
                raise RewardError(
                    f"two parts are both called {name!r}",
                    where="reward",
                    fix="give one another `name:` in the list",
                )
        self.parts = tuple(parts)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        failures: dict[int, Failure] = {}
        values_by_part: dict[str, Values] = {}
        terms_by_part: dict[str, Values] = {}
        notes: list[str] = []
        counts: dict[str, int] = {}
        steps: list[list[tuple[int, float]]] = [[] for _ in completions]
        for part in self.parts:
            scores = part.reward(prompts, completions, columns)
            for row, own in enumerate(scores.steps or []):
                steps[row] += [(place, part.weight * value) for place, value in own]
            values_by_part[part.name] = scores.parts.get(part.reward.name, scores.values)
            terms_by_part[part.name] = scores.values
            counts |= {f"{part.name}/{ending}": count for ending, count in scores.counts.items()}
            notes += [f"{part.name}: {note}" for note in scores.notes]
            for failure in scores.failures:
                reason = f"{part.name}: {failure.reason}"
                failures.setdefault(failure.row, Failure(failure.row, reason, failure.details))
        totals: Values = []
        for row in range(len(completions)):
            total = None if row in failures else self._total(row, terms_by_part)
            if total is not None and not math.isfinite(total):
                failures[row] = Failure(row, f"the weighted sum is {total}")
                total = None
            totals.append(total)
        weights = {part.name: part.weight for part in self.parts}
        return Scores(
            totals, [failures[row] for row in sorted(failures)], values_by_part, notes, weights, counts, steps
        )

    def _total(self, row: int, terms_by_part: dict[str, Values]) -> float | None:
        terms = [part.weight * value for part in self.parts if (value := terms_by_part[part.name][row]) is not None]
        return math.fsum(terms) if terms else None

    def close(self) -> None:
        for part in self.parts:
            part.reward.close()
