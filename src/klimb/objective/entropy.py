"""What keeps a policy from becoming sure too soon: the coefficient of its entropy, fixed or steered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.objective.bounds import NotNegative, Ordered, Positive
from klimb.objective.kl import State


@dataclass(frozen=True)
class adaptive_entropy(Ordered):
    """A bonus that works only while the entropy is at most `target` nats a token: after each step its coefficient goes
    up by `step` where that holds, else down, within [low, high] (Skywork-OR1, arXiv 2505.22312, section 3.3).

    The bonus counts every token alike: on a large vocabulary it feeds the tail as well as the forks.
    """

    target: NotNegative = 0.2
    step: Positive = 0.005
    low: NotNegative = 0.0
    high: NotNegative = 1.0
    start: NotNegative = 0.0

    def __call__(self, state: State) -> float:
        """The coefficient of this update."""
        if "entropy" not in state or float(state["entropy"]) > self.target:
            return 0.0
        return float(state["entropy_coefficient"])

    def next_state(self, state: State, observed: float) -> dict[str, Tensor]:
        """The state after a step in which the mean entropy was `observed` nats a token."""
        moved = float(state.get("entropy_coefficient", self.start)) + (
            self.step if observed <= self.target else -self.step
        )
        held = min(max(moved, self.low), self.high)
        return {name: torch.tensor(value, dtype=torch.float64)
                for name, value in (("entropy_coefficient", held), ("entropy", observed))}  # fmt: skip


ENTROPY_BONUSES: Mapping[str, type] = {"adaptive_entropy": adaptive_entropy}


def entropy_coefficient(bonus: float | adaptive_entropy, state: State) -> float:
    return bonus(state) if isinstance(bonus, adaptive_entropy) else bonus
