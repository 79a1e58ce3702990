"""Losses of h_w and h_l each on its own: where a completion stands to the reference, not only to its rival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb.objective.bounds import Bounded, NotNegative, Positive
from klimb.objective.kl import State
from klimb.objective.preference.pairs import Needs, Page, Pairs, Statistics, logistic


@dataclass(frozen=True)
class nca(Bounded):
    """Noise-contrastive alignment: the chosen is raised and held where it is, the rejected only lowered."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "−log σ(βh_w) − ½ log σ(−βh_w) − ½ log σ(−βh_l)",
        "arXiv 2402.05369 (NCA for pairs)",
        "the chosen settles at σ(βh_w) = 2/3, whatever the pair",
        "never to dpo: the prompt's constant does not cancel",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        won, lost = self.beta * pairs.chosen.log_ratio(), self.beta * pairs.rejected.log_ratio()
        return -logsigmoid(won) - 0.5 * logsigmoid(-won) - 0.5 * logsigmoid(-lost)


@dataclass(frozen=True)
class sppo_hard(Bounded):
    """Self-play preference optimisation, the winning probabilities taken for 1 and 0: h_w → 1/(2β), h_l → −1/(2β)."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "(h_w − 1/(2β))² + (h_l + 1/(2β))²",
        "arXiv 2405.00675, equation 4.7, with hard probabilities",
        "in nats of whole completions: the same β asks less of long ones",
        "its margin alone is ipo at β/2",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        goal = 1 / (2 * self.beta)
        return (pairs.chosen.log_ratio() - goal).square() + (pairs.rejected.log_ratio() + goal).square()


@dataclass(frozen=True)
class apo_zero(Bounded):
    """Anchored: the chosen up, the rejected down. For completions better than what the model says by itself."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "1 − σ(βh_w) + σ(βh_l)",
        "arXiv 2408.06266, equation 7",
        "bounded: pairs far on the wrong side have no gradient",
        "with completions worse than the model's own it teaches them: then apo_down",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        won, lost = (self.beta * side.log_ratio() for side in (pairs.chosen, pairs.rejected))
        return 1 - won.sigmoid() + lost.sigmoid()


@dataclass(frozen=True)
class apo_down(Bounded):
    """Anchored: both down, the rejected more. For completions worse than what the model says by itself."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "σ(βh_w) + 1 − σ(βΔ)",
        "arXiv 2408.06266, equation 8",
        "the chosen falls: it is meant to",
        "with completions better than the model's own it unlearns them: then apo_zero",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return (self.beta * pairs.chosen.log_ratio()).sigmoid() + 1 - (self.beta * pairs.margin()).sigmoid()


@dataclass(frozen=True)
class bco_pair(Bounded):
    """BCO on pairs without its shift: a classifier of chosen against rejected whose logit is the implicit reward."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "−log σ(βh_w) − log σ(−βh_l)",
        "arXiv 2404.04656 with δ = 0, as TRL's bco_pair",
        "asks h_w > 0 > h_l even of pairs of which both are better, or worse, than the reference's",
        "never to dpo: the prompt's constant does not cancel",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.chosen.log_ratio()) - logsigmoid(-self.beta * pairs.rejected.log_ratio())


@dataclass(frozen=True)
class bco(Bounded):
    """Binary classifier optimisation: desirable against undesirable, the implicit reward shifted by its own mean.

    δ is the mean over the updates so far, this one included, of ½(mean reward of the desirable + that of the
    undesirable); of an update with one kind only, that kind's.
    """

    beta: Positive = 0.1
    needs: ClassVar[Needs] = Needs(data="labels")
    page: ClassVar[Page] = Page(
        "desirable: −log σ(βh − δ), undesirable: −log σ(−(βh − δ)), mean over completions",
        "arXiv 2404.04656 (δ in TRL: a mean over completions; the weighting of unlike prompts, UDM, is left out)",
        "labels whose prompts differ by kind: the classifier learns the prompts",
        "δ = 0: bco_pair, less a factor 2",
    )

    def statistics(self, whole: Pairs, state: State, seed: int) -> Statistics:
        found = [self.beta * side.log_ratio().double().mean() for side in (whole.chosen, whole.rejected) if
                 len(side.mask)]  # fmt: skip
        before = state.get("updates", torch.zeros((), dtype=torch.float64))
        shift = state.get("shift", torch.zeros((), dtype=torch.float64))
        if found:
            mean = torch.stack(found).mean().cpu()
            before, shift = before + 1, shift + (mean - shift) / (before + 1)
        return {"shift": shift}, {"shift": shift, "updates": before}

    def __call__(self, pairs: Pairs) -> Tensor:
        won, lost = (self.beta * side.log_ratio() for side in (pairs.chosen, pairs.rejected))
        shift = pairs.given["shift"].to(won)
        return torch.cat([logistic(won - shift), logistic(shift - lost)])


@dataclass(frozen=True)
class kto(Bounded):
    """Kahneman–Tversky: a completion is worth what it stands above z, the policy's own distance from the reference.

    z ≥ 0 is the mean h of completions under other prompts of the update, without gradient.
    """

    beta: Positive = 0.1
    desirable: NotNegative = 1.0
    undesirable: NotNegative = 1.0
    needs: ClassVar[Needs] = Needs(data="labels", mismatched=True)
    page: ClassVar[Page] = Page(
        "desirable: λ_D (1 − σ(β(h − z))), undesirable: λ_U (1 − σ(β(z − h))), mean over completions",
        "arXiv 2402.01306, equations 7 and 8; weights so that λ_D n_D / (λ_U n_U) is in [1, 4/3]",
        "no finite optimum: a completion labelled desirable in more than λ_U/(λ_D+λ_U) of its rows rises for ever; "
        "completions far from z have no gradient",
        "an update of one prompt has no mismatched completion: z = 0",
    )

    def statistics(self, whole: Pairs, state: State, seed: int) -> Statistics:
        other = whole.mismatched
        if other is None or not len(other):
            return {"baseline": torch.zeros((), dtype=torch.float64)}, {}
        return {"baseline": other.double().mean().clamp(min=0).cpu()}, {}

    def __call__(self, pairs: Pairs) -> Tensor:
        won, lost = (side.log_ratio() for side in (pairs.chosen, pairs.rejected))
        baseline = pairs.given["baseline"].to(won)
        return torch.cat(
            [
                self.desirable * (self.beta * (baseline - won)).sigmoid(),  # 1 − σ(x) = σ(−x)
                self.undesirable * (self.beta * (lost - baseline)).sigmoid(),
            ]
        )
