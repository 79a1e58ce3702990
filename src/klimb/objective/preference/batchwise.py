"""Losses in which a pair's part depends on the others of its update: their statistics are taken before it is split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from klimb.objective.bounds import Bounded, NotNegative, Positive, ShareBelowOne, SomeShare
from klimb.objective.kl import State
from klimb.objective.preference.pairs import Needs, Page, Pairs, Statistics, logistic


@dataclass(frozen=True)
class aot(Bounded):
    """Alignment by optimal transport: the policy's margins as a distribution above the reference's.

    Sorted by size, the i-th margin log π(y_w)/π(y_l) of the policy is held against the i-th of the reference.
    """

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "−log σ(β (m_(i) − m_ref,(i))), m = log π(y_w) − log π(y_l) sorted over the update",
        "arXiv 2406.05882, paired, with the logistic loss",
        "a pair's own reference is lost: only the distribution of margins is held",
        "one pair an update: dpo",
    )

    def statistics(self, whole: Pairs, state: State, seed: int) -> Statistics:
        own, reference = margins(whole)
        return {"target": reference.sort().values[ranks(own)]}, {}

    def __call__(self, pairs: Pairs) -> Tensor:
        margin = pairs.chosen.total() - pairs.rejected.total()
        return logistic(self.beta * (margin - pairs.given["target"]))


@dataclass(frozen=True)
class aot_unpaired(Bounded):
    """As `aot` without pairs: the i-th largest h of the chosen against the i-th largest of the rejected."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "−log σ(β (h_w,(i) − h_l,(i))), each sorted over the update",
        "arXiv 2406.05882, unpaired, with the logistic loss",
        "prompts mix: an easy prompt's chosen is held against a hard one's rejected",
        "one pair an update: dpo",
    )

    def statistics(self, whole: Pairs, state: State, seed: int) -> Statistics:
        won, lost = whole.chosen.log_ratio(), whole.rejected.log_ratio()
        return {"rival": lost.sort().values[ranks(won)], "winner": won.sort().values[ranks(lost)]}, {}

    def __call__(self, pairs: Pairs) -> Tensor:
        won, lost = pairs.chosen.log_ratio(), pairs.rejected.log_ratio()
        # The two of a sorted couple may be in different micro-batches: each has its own half of the value, and its
        # whole part of the gradient.
        both = logistic(self.beta * (won - pairs.given["rival"])) + logistic(self.beta * (pairs.given["winner"] - lost))
        return both - both.detach() / 2


@dataclass(frozen=True)
class wpo(Bounded):
    """DPO in which a pair weighs what the policy would say itself: off-policy pairs are made to look on-policy."""

    beta: Positive = 0.1
    needs: ClassVar[Needs] = Needs(collisions=True)
    page: ClassVar[Page] = Page(
        "−w_w w_l log σ(βΔ), w = exp(1/|y| Σ_t [log π(y_t) − log Σ_v π(v)²]), without gradient",
        "arXiv 2406.11827, equation 2, sampled alignment (as TRL's use_weighting)",
        "completions far from the policy have next to no weight: the rate has to be higher",
        "a policy that is sure of every token: w = 1, dpo",
    )

    def statistics(self, whole: Pairs, state: State, seed: int) -> Statistics:
        weight = torch.ones((), dtype=torch.float64)
        for side in (whole.chosen, whole.rejected):
            assert side.collisions is not None  # needs.collisions
            aligned = torch.where(side.mask, side.logps - side.collisions, 0.0).sum(dim=1) / side.tokens
            weight = weight.to(aligned) * aligned.exp()
        return {"weight": weight}, {}

    def __call__(self, pairs: Pairs) -> Tensor:
        return pairs.given["weight"] * logistic(self.beta * pairs.margin())


@dataclass(frozen=True)
class beta_dpo(Bounded):
    """DPO whose β follows the update's mean margin; pairs of unusual margin are left out by lot.

    M and σ are running means (momentum) of the updates' mean and standard deviation of Δ. Of an update the share
    `keep` is drawn, likelier the nearer Δ is to M, and β' = β (1 + gain (mean Δ of these − M)), at least 1e-3.
    """

    beta: Positive = 0.1
    gain: NotNegative = 0.6
    keep: SomeShare = 0.8
    momentum: ShareBelowOne = 0.9
    page: ClassVar[Page] = Page(
        "−log σ(β'Δ) over the kept pairs, β' = β (1 + a (mean Δ − M))",
        "arXiv 2407.08639 and its authors' code (a = gain = 0.6, momentum 0.9, 80 % kept)",
        "gain times margins in nats: long completions swing β' down to its floor of 1e-3",
        "gain = 0 and keep = 1: dpo",
    )

    def statistics(self, whole: Pairs, state: State, seed: int) -> Statistics:
        margin = whole.margin().double().cpu()
        nothing = torch.zeros((), dtype=torch.float64)
        spread = margin.std() if len(margin) > 1 else nothing
        running = {
            name: self.momentum * state.get(name, nothing) + (1 - self.momentum) * value
            for name, value in {"mean": margin.mean() if len(margin) else nothing, "spread": spread}.items()
        }
        # Drawn without replacement: the largest of log weight + Gumbel noise.
        noise = torch.rand(len(margin), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        distance = (margin - running["mean"]) / running["spread"].clamp(min=1e-12)
        score = -0.5 * distance.square() - (-noise.clamp(min=1e-300).log()).log()
        kept = score.topk(max(int(self.keep * len(margin)), min(len(margin), 1))).indices
        weight = torch.zeros_like(margin).index_fill(0, kept, len(margin) / max(len(kept), 1))
        seen = margin[kept].mean() if len(kept) else running["mean"]
        beta = (self.beta * (1 + self.gain * (seen - running["mean"]))).clamp(min=1e-3)
        return {"beta": beta, "weight": weight}, running

    def __call__(self, pairs: Pairs) -> Tensor:
        margin = pairs.margin()
        return pairs.given["weight"].to(margin) * logistic(pairs.given["beta"].to(margin) * margin)


def margins(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """log π(y_w)/π(y_l) of the policy and of the reference [P]."""
    own = pairs.chosen.total() - pairs.rejected.total()
    return own, own - pairs.margin()


def ranks(values: Tensor) -> Tensor:
    """[P] → the place of each in their order, equal ones as they come."""
    return values.argsort(stable=True).argsort()
