"""A reward on a scale that follows the training, and within bounds: chosen with ``normalise`` and ``clip``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from klimb.rewards.protocol import Columns, Reward, Scores
from klimb.types import Text


class Moments(NamedTuple):
    """How many scores there were, their mean, and the sum of their squared distances from it."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, values: Sequence[float]) -> Moments:
        """The moments of these and all earlier values (Chan, Golub & LeVeque 1979: sums of two parts)."""
        if not values:
            return self
        n = self.n + len(values)
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        away = mean - self.mean
        return Moments(
            n, self.mean + away * len(values) / n,
            self.squares + squares + away**2 * self.n * len(values) / n,
        )  # fmt: skip

    @property
    def std(self) -> float:
        """Of a sample (n − 1). 1 as long as all values are equal: then nothing is known of their scale."""
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 and self.squares > 0 else 1.0


class Normalised:
    """Scores less their running mean, by their running standard deviation; then clipped to [−clip, clip].

    The figures are those of every score so far, the present call's among them, and of unclipped ones. `moments` is
    None where the scale stays that of the reward. What the reward itself gave is kept as the component of its name.
    """

    def __init__(self, reward: Reward, *, running: bool, clip: float | None) -> None:
        self.reward = reward
        self.name = reward.name
        self.clip = math.inf if clip is None else clip
        self.moments = Moments() if running else None

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        scores = self.reward(prompts, completions, columns)
        if self.moments is not None:
            self.moments = self.moments.including([value for value in scores.values if value is not None])
        return replace(
            scores, values=[self._bounded(value) for value in scores.values], parts={self.name: scores.values}
        )

    def _bounded(self, value: float | None) -> float | None:
        if value is None:
            return None
        if self.moments is not None:
            value = (value - self.moments.mean) / self.moments.std
        return min(max(value, -self.clip), self.clip)

    def close(self) -> None:
        self.reward.close()
