"""Several rewards as one: sums, products, gates and routes, of which every part is kept under its own name.

A part that *fails* on a row fails the row: left out in silence, a bug of one part would change what is maximised.
Parts within parts are called ``outer/inner``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from klimb.errors import RewardError
from klimb.rewards.protocol import Columns, Failure, Reward, Scores, Values
from klimb.types import Text


@dataclass(frozen=True, slots=True)
class Part:
    """One term of a mixture and the name that it is logged under."""

    name: str
    reward: Reward
    weight: float = 1.0


class Mixture:
    """What all mixtures share: their parts, and the facts about them."""

    name = ""

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise RewardError(f"a {self.name} without parts", where="reward", fix="name at least one reward")
        names = [part.name for part in parts]
        for name in names:
            if names.count(name) > 1:
                raise RewardError(
                    f"two parts are both called {name!r}",
                    where="reward",
                    fix="give one another `name:` in the list",
                )
        self.parts = tuple(parts)

    @property
    def independent(self) -> bool:
        return all(getattr(part.reward, "independent", False) for part in self.parts)

    @property
    def waits(self) -> bool:
        return any(getattr(part.reward, "waits", False) for part in self.parts)

    def close(self) -> None:
        for part in self.parts:
            part.reward.close()


class WeightedSum(Mixture):
    """Σ weight · value over the parts that scored the row.

    A part that abstains (None) is left out of the sum, as in TRL, and a row that all parts abstain from is None.
    """

    name = "sum"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        answers = Answers(self.parts, prompts, completions, columns)
        terms = [(part.weight, answers.ask(part)) for part in self.parts]

        def total(row: int) -> float | None:
            given = [weight * value for weight, values in terms if (value := values[row]) is not None]
            try:
                return math.fsum(given) if given else None
            except (OverflowError, ValueError):  # beyond the floats, or ∞ − ∞
                return math.inf

        weights = {part.name: part.weight for part in self.parts}
        found = answers.scores([total(row) for row in answers.rows], "weighted sum", weights)
        return replace(found, steps=answers.steps)


class Product(Mixture):
    """Π value, None where a part abstains: an unknown factor makes an unknown product.

    Two negative factors would make a reward out of two faults: such a row fails.
    """

    name = "product"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        answers = Answers(self.parts, prompts, completions, columns)
        factors = [answers.ask(part) for part in self.parts]
        values: Values = []
        for row in answers.rows:
            given = [value for values in factors if (value := values[row]) is not None]
            values.append(math.prod(given) if len(given) == len(factors) else None)
            if sum(value < 0 for value in given) > 1:
                answers.fail(row, f"more than one factor is negative ({', '.join(f'{v:g}' for v in given)})")
        return answers.scores(values, "product")


class Gate(Mixture):
    """`then` where the value of `when` lies above a bound, `otherwise` elsewhere; None where `when` abstains.

    Only the rows that pass are shown to `then`, and it alone gives their value.
    """

    name = "gate"

    def __init__(self, when: Part, then: Part, *, otherwise: float | None, above: float = 0.0) -> None:
        super().__init__([when, then])
        self._otherwise = otherwise
        self._above = above

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        when, then = self.parts
        answers = Answers(self.parts, prompts, completions, columns)
        opening = answers.ask(when)
        values = [None if value is None else self._otherwise for value in opening]
        passed = [row for row, value in enumerate(opening) if value is not None and value > self._above]
        content = answers.ask(then, passed)
        for row in passed:
            values[row] = content[row]
        return answers.scores(values, "gate")


class Route(Mixture):
    """The reward that a column of the data names for the row, times its weight. A row of another name fails."""

    name = "route"

    def __init__(self, column: str, parts: Sequence[Part]) -> None:
        super().__init__(parts)
        self._column = column

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        if self._column not in columns:
            raise RewardError(f"the data has no column {self._column!r}", where="reward route",
                              fix=f"known: {', '.join(columns)}")  # fmt: skip
        answers = Answers(self.parts, prompts, completions, columns)
        named = [str(value) for value in columns[self._column]]
        values: Values = [None] * len(named)
        for part in self.parts:
            rows = [row for row, name in enumerate(named) if name == part.name]
            content = answers.ask(part, rows)
            for row in rows:
                value = content[row]
                values[row] = None if value is None else part.weight * value
        known = [part.name for part in self.parts]
        for row, name in enumerate(named):
            if name not in known:
                told = name if len(name) <= 40 else f"{name[:39]}…"
                answers.fail(row, f"{self._column} {told!r} has no reward, known: {', '.join(known)}")
        return answers.scores(values, "routed score")


class Answers:
    """What the parts of a mixture say to one batch, and what went wrong."""

    def __init__(
        self, parts: Sequence[Part], prompts: Sequence[Text], completions: Sequence[Text], columns: Columns
    ) -> None:
        self.rows = range(len(completions))
        self._batch = (prompts, completions, columns)
        self._parts: dict[str, Values] = {name: [None] * len(self.rows) for name in part_names(parts)}
        self._failures: dict[int, Failure] = {}
        self._notes: list[str] = []
        self._counts: dict[str, int] = {}
        self.steps: list[list[tuple[int, float]]] | None = None
        """What parts pay before the end of a row, times their weights."""

    def ask(self, part: Part, rows: Sequence[int] | None = None) -> Values:
        """The values of `part`, asked about these rows (None: all); None for the others."""
        prompts, completions, columns = self._batch
        if rows is None:
            rows = self.rows
        elif len(rows) < len(self.rows):
            prompts, completions = [prompts[row] for row in rows], [completions[row] for row in rows]
            columns = {name: [values[row] for row in rows] for name, values in columns.items()}
        if not rows:
            return [None] * len(self.rows)
        scores = part.reward(prompts, completions, columns)
        own = scores.values if scores.raw is None else scores.raw
        inner = {name: values for name, values in scores.parts.items() if name != part.reward.name}
        for name, values in {part.name: own, **_prefixed(part.name, inner)}.items():
            self._parts[name] = self._spread(values, rows)
        for row, own_steps in zip(rows, scores.steps or []):
            self.steps = self.steps or [[] for _ in self.rows]
            self.steps[row] += [(place, part.weight * value) for place, value in own_steps]
        self._counts |= _prefixed(part.name, scores.counts or scores.endings())
        self._notes += [f"{part.name}: {note}" for note in scores.notes]
        for failure in scores.failures:
            reason = f"{part.name}: {failure.reason}"
            failed = Failure(rows[failure.row], reason, failure.details, failure.kind)
            self._failures.setdefault(failed.row, failed)
        return self._spread(scores.values, rows)

    def _spread(self, values: Values, rows: Sequence[int]) -> Values:
        spread: Values = [None] * len(self.rows)
        for row, value in zip(rows, values, strict=True):
            spread[row] = value
        return spread

    def fail(self, row: int, reason: str) -> None:
        self._failures.setdefault(row, Failure(row, reason))

    def scores(self, values: Values, what: str, weights: Mapping[str, float] | None = None) -> Scores:
        """`values` as those of the mixture; those of failed rows are not looked at."""
        for row, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                self.fail(row, f"the {what} is {value}")
        kept = [None if row in self._failures else value for row, value in enumerate(values)]
        failures = [self._failures[row] for row in sorted(self._failures)]
        found = Scores(kept, failures, self._parts, self._notes, dict(weights or {}))
        found.counts.update(found.endings() | self._counts)
        return found


def part_names(parts: Sequence[Part]) -> Iterator[str]:
    """The names of all parts, those within others too, in the order in which they are logged."""
    for part in parts:
        yield part.name
        inner = getattr(part.reward, "reward", part.reward)  # below normalise and clip
        yield from (f"{part.name}/{name}" for name in part_names(getattr(inner, "parts", ())))


def sources(reward: Any) -> Iterator[Any]:
    """All rewards in `reward`, itself first."""
    yield reward
    inner = [part.reward for part in getattr(reward, "parts", ())] or [getattr(reward, "reward", None)]
    for one in inner:
        if one is not None:
            yield from sources(one)


def joined(portions: Sequence[Scores]) -> Scores:
    """The scores of consecutive portions of a batch as those of the whole."""
    whole, raw = Scores([]), Values()
    for portion in portions:
        first = len(whole.values)
        for failure in portion.failures:
            whole.failures.append(Failure(first + failure.row, failure.reason, failure.details, failure.kind))
        for name, values in portion.parts.items():
            whole.parts.setdefault(name, []).extend(values)
        for name, count in (portion.counts or portion.endings()).items():
            whole.counts[name] = whole.counts.get(name, 0) + count
        if portion.raw is not None:
            raw.extend(portion.raw)
        whole.values.extend(portion.values)
        whole.notes.extend(portion.notes)
        whole.weights.update(portion.weights)
    return replace(whole, raw=raw or None)


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
