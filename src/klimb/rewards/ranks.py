"""Rewards where several ranks train together: asked once, by rank 0, and known to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from klimb.rewards.protocol import Columns, Failure, Reward, Scores
from klimb.runtime.ranks import rank, share, world
from klimb.types import Text


class OnRankZero:
    """A reward as every rank sees it. A judge is paid once, and a function that draws lots decides once."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.name = reward.name

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        scores = share(asdict(self.reward(prompts, completions, columns)) if rank() == 0 else None)
        return Scores(**{**scores, "failures": [Failure(**failure) for failure in scores["failures"]]})

    def close(self) -> None:
        self.reward.close()


def asked_once(reward: Reward) -> Reward:
    return reward if world() == 1 else OnRankZero(reward)
