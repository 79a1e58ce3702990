"""What a preference loss is called with, and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb.objective.kl import State

Data = Literal["pairs", "triples", "steps", "labels"]
"""pairs: chosen and rejected; triples: a gold completion besides; steps: solutions step by step, each right or wrong;
labels: single completions, each desirable or not (of a pair: one of each)."""


@dataclass(frozen=True)
class Completions:
    """N completions of one side. logps, ref_logps (None for a loss without a reference), mask [N, T].

    collisions [N, T]: log Σ_v π(v)², where a loss asked for it. A completion without a token counts as 0 everywhere.
    """

    logps: Tensor
    ref_logps: Tensor | None
    mask: Tensor
    collisions: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """[N], at least 1: what a mean over tokens is divided by."""
        return self.mask.sum(dim=1).clamp(min=1)

    def total(self) -> Tensor:
        """log π(y | x), nats [N]."""
        return torch.where(self.mask, self.logps, 0.0).sum(dim=1)

    def average(self) -> Tensor:
        """log π(y | x) / |y|, nats per token [N]."""
        return self.total() / self.tokens

    def ratios(self) -> Tensor:
        """log π/π_ref of each token [N, T]."""
        if self.ref_logps is None:
            raise ValueError("this loss compares with a reference: declare needs = Needs(reference=True).")
        return torch.where(self.mask, self.logps - self.ref_logps, 0.0)

    def log_ratio(self) -> Tensor:
        """h = log π(y | x)/π_ref(y | x), nats [N]."""
        return self.ratios().sum(dim=1)


@dataclass(frozen=True)
class Pairs:
    """A part of an update: the i-th chosen was preferred to the i-th rejected. With labels the two sides are the
    desirable and the undesirable completions, however many of each.

    gold: the third of a triple. mismatched [M]: h of completions under other prompts. given: what `statistics` found
    over the whole update, scalars and [P].
    """

    chosen: Completions
    rejected: Completions
    gold: Completions | None = None
    mismatched: Tensor | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def margin(self) -> Tensor:
        """Δ = h_w − h_l, nats [P]."""
        return self.chosen.log_ratio() - self.rejected.log_ratio()


PreferenceLoss = Callable[[Pairs], Tensor]
"""Pairs → loss [P] (with labels: of each completion, the desirable first). What it has beyond that is optional:

needs: Needs        which data and models it takes
page: Page          what `klimb algorithms NAME` prints
statistics(whole: Pairs, state: State, seed: int) -> (given, state)
                    taken without gradient over the whole update, before it is split; the state is checkpointed
"""

Statistics = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Needs:
    """reference: π_ref's log-probs; mismatched: forward passes over completions under other prompts; collisions: one
    more forward pass over the update, for log Σ π²."""

    reference: bool = True
    data: Data = "pairs"
    mismatched: bool = False
    collisions: bool = False


@dataclass(frozen=True)
class Page:
    """For a person who chooses: what is minimised, who says so, how it goes wrong, and where it becomes another one."""

    formula: str
    source: str
    failure: str
    degrades: str


def needs_of(loss: PreferenceLoss) -> Needs:
    needs: Needs = getattr(loss, "needs", Needs())
    return needs


def statistics_of(loss: PreferenceLoss, whole: Pairs, state: State, seed: int = 0) -> Statistics:
    """Nothing, for a loss that looks at each pair on its own."""
    take = getattr(loss, "statistics", None)
    found: Statistics = take(whole, state, seed) if take else ({}, {})
    return found


def logistic(margin: Tensor) -> Tensor:
    """−log σ(margin)."""
    return -logsigmoid(margin)
