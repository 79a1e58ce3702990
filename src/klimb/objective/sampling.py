"""Before samples are learnt from: which groups are kept, and what too long a completion costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from klimb.objective.bounds import Bounded, Count, NotNegative, SomeShare
from klimb.objective.grouped import VARIANCE_TOLERANCE

Sampling = Callable[[Sequence[float]], bool]
"""The scores of one group, before any shaping → whether to keep it; a refused one is replaced by another."""


def dynamic(scores: Sequence[float]) -> bool:
    """Keep a group only if its scores differ, else it teaches nothing (DAPO, arXiv 2503.14476, 3.2)."""
    low, high = min(scores), max(scores)
    return high - low > VARIANCE_TOLERANCE * max(1.0, abs(low), abs(high))


SAMPLINGS: Mapping[str, Sampling] = {"dynamic": dynamic}


@dataclass(frozen=True)
class soft_overlong(Bounded):
    """0 up to (1 − buffer) · max_length tokens, then a line down to −1 at max_length (DAPO, section 3.4).

    buffer: the last share of the length budget; the paper's 4,096 of 20,480 tokens. max_length is filled by
    resolving.
    """

    buffer: SomeShare = 0.2
    max_length: int | None = None

    def __call__(self, length: Tensor) -> Tensor:
        """Policy tokens [B] → what is added to the score, [B] float64, in [−1, 0]."""
        if self.max_length is None:
            raise ValueError("overlong: its max_length is open; call algorithm.resolve(max_length=...).")
        width = self.buffer * self.max_length
        return ((self.max_length - width - length.double()) / width).clamp(-1.0, 0.0)


@dataclass(frozen=True)
class length_penalty(Bounded):
    """−weight · |y| / max_length: a price on every token. It buys shorter answers with the score, and where all scores
    of a group are equal it is all that is left to learn. max_length is filled by resolving."""

    weight: NotNegative = 0.1
    max_length: int | None = None

    def __call__(self, length: Tensor) -> Tensor:
        """Policy tokens [B] → what is added to the score, [B] float64."""
        if self.max_length is None:
            raise ValueError("overlong: its max_length is open; call algorithm.resolve(max_length=...).")
        return -self.weight * length.double() / self.max_length


@dataclass(frozen=True)
class leave_out:
    """Samples that were cut at the longest length are compared with, and not learnt from: out of the loss and of its
    denominator (DAPO's overlong filtering, section 3.4). Nothing then says that too long is bad."""

    leaves_out: ClassVar[bool] = True

    def __call__(self, length: Tensor) -> Tensor:
        return torch.zeros(len(length), dtype=torch.float64, device=length.device)


Overlong = soft_overlong | length_penalty | leave_out
OVERLONG: Mapping[str, type] = {
    "soft_overlong": soft_overlong, "length_penalty": length_penalty, "leave_out": leave_out,
}  # fmt: skip


@dataclass(frozen=True)
class skip_solved(Bounded):
    """A prompt all of whose samples score at least `solved` is not drawn for the next `recheck` steps, then looked at
    again: no samples are spent on what is known, and what is forgotten comes back. When all prompts rest, all come.

    Changes what is averaged over: towards what is hard, at times what cannot be solved at all.
    """

    solved: float = 1.0
    recheck: Count = 10

    def rests(self, scores: Sequence[float]) -> bool:
        """Scores of a group, before any shaping."""
        return min(scores) >= self.solved


CURRICULA: Mapping[str, type] = {"skip_solved": skip_solved}

Weighting = Callable[[Tensor], Tensor]
"""Scores of a whole update [B] → weight of each sample's advantage, [B] with mean 1."""


@dataclass(frozen=True)
class power_weights(Bounded):
    """|score|^power (PF-PPO, arXiv 2409.06957, in verl's form over the update, and as a weight instead of by drawing
    again): samples whose score says much. Needs a reward model whose 0 is in the middle."""

    power: NotNegative = 2.0

    def __call__(self, scores: Tensor) -> Tensor:
        return _mean_one(scores.double().abs().pow(self.power))


def extremes(scores: Tensor) -> Tensor:
    """Only the best and the worst scores of the update (PF-PPO, likewise): where a reward model errs least."""
    return _mean_one(((scores == scores.max()) | (scores == scores.min())).double())


WEIGHTINGS: Mapping[str, Weighting | type] = {"power_weights": power_weights, "extremes": extremes}


def _mean_one(weights: Tensor) -> Tensor:
    mean = weights.mean()
    return weights / mean if mean > 0 else torch.ones_like(weights)
