"""Losses that hold on to the chosen completion's own likelihood, most of them instead of a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from klimb.objective.bounds import Bounded, NotNegative, Positive
from klimb.objective.kl import bounded_exp
from klimb.objective.preference.pairs import Needs, Page, Pairs, logistic

_UNTIED = "nothing holds the policy near where it started but a small rate and few steps"


@dataclass(frozen=True)
class chosen_nll:
    """The chosen completion by heart: the term that others add, and what SFT on the chosen would learn."""

    needs: ClassVar[Needs] = Needs(reference=False)
    page: ClassVar[Page] = Page(
        "−log π(y_w)/|y_w|", "SFT, as a term of rpo and mpo", "learns nothing from the rejected", "alone it is sft"
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return -pairs.chosen.average()


@dataclass(frozen=True)
class rpo(Bounded):
    """DPO and the chosen completion's own likelihood, so that it cannot fall."""

    beta: Positive = 0.1
    alpha: NotNegative = 1.0
    page: ClassVar[Page] = Page(
        "−log σ(βΔ) − α log π(y_w)/|y_w|",
        "arXiv 2404.19733, equation 1 (α = 1; its length holds the prompt too); arXiv 2405.16436",
        "large α: SFT on the chosen, the preference is drowned",
        "α = 0: dpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * pairs.margin()) - self.alpha * pairs.chosen.average()


@dataclass(frozen=True)
class orpo(Bounded):
    """SFT on the chosen with a fine by the odds ratio: one stage from the base model, without a reference."""

    beta: NotNegative = 0.1
    needs: ClassVar[Needs] = Needs(reference=False)
    page: ClassVar[Page] = Page(
        "−log p_w − β log σ(log p_w/(1−p_w) − log p_l/(1−p_l)), p = π(y)^(1/|y|)",
        "arXiv 2403.07691, equations 6 and 7 (β is its λ)",
        f"{_UNTIED}; the fine is small beside the SFT part",
        "β = 0: SFT on the chosen",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        won, lost = pairs.chosen.average(), pairs.rejected.average()
        return -won + self.beta * logistic(log_odds(won) - log_odds(lost))


@dataclass(frozen=True)
class cpo(Bounded):
    """DPO with a uniform reference, and the chosen completion's likelihood in its place."""

    beta: Positive = 0.1
    alpha: NotNegative = 1.0
    needs: ClassVar[Needs] = Needs(reference=False)
    page: ClassVar[Page] = Page(
        "−log σ(β (log π(y_w) − log π(y_l))) − α log π(y_w)/|y_w|",
        "arXiv 2401.08417, equation 3 (there the second term is a sum; per token as TRL)",
        f"{_UNTIED}; sums of log-probs favour the shorter completion",
        "α = 0: dpo with a uniform reference",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        margin = pairs.chosen.total() - pairs.rejected.total()
        return logistic(self.beta * margin) - self.alpha * pairs.chosen.average()


@dataclass(frozen=True)
class simpo(Bounded):
    """Log-probs per token, as generation ranks them, with a margin γ to exceed; no reference."""

    beta: Positive = 2.0
    gamma: NotNegative = 1.0
    needs: ClassVar[Needs] = Needs(reference=False)
    page: ClassVar[Page] = Page(
        "−log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)",
        "arXiv 2405.14734, equation 6; β 2 to 2.5, γ/β 0.3 to 0.8 there",
        f"{_UNTIED}; sensitive to the rate: above about 1e-6 the text falls apart",
        "one token a completion and γ = 0: cpo without its likelihood",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * (pairs.chosen.average() - pairs.rejected.average()) - self.gamma)


@dataclass(frozen=True)
class alphapo(Bounded):
    """SimPO with another shape of the reward: r = (1 − p^(−α))/α of the probability per token."""

    beta: Positive = 2.5
    alpha: float = 0.25
    gamma: NotNegative = 0.1
    needs: ClassVar[Needs] = Needs(reference=False)
    page: ClassVar[Page] = Page(
        "−log σ(β (r_w − r_l) − γ), r = (1 − p^(−α))/α, p = π(y)^(1/|y|)",
        "arXiv 2501.03884; the defaults are its table 3 for Mistral-Instruct, as TRL quotes it",
        "large |α|: p^(−α) explodes on unlikely completions and the rest is not learnt from",
        "α → 0: simpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        sides = (pairs.chosen.average(), pairs.rejected.average())
        if self.alpha:
            sides = ((1 - bounded_exp(-self.alpha * sides[0])) / self.alpha,
                     (1 - bounded_exp(-self.alpha * sides[1])) / self.alpha)  # fmt: skip
        return logistic(self.beta * (sides[0] - sides[1]) - self.gamma)


@dataclass(frozen=True)
class tpo(Bounded):
    """Triple preference optimisation: gold ≻ chosen ≻ rejected. The gold completion's likelihood holds the policy."""

    beta: Positive = 0.01
    alpha: NotNegative = 1.0
    needs: ClassVar[Needs] = Needs(reference=False, data="triples")
    page: ClassVar[Page] = Page(
        "−log σ(β (log π(y_w) − log π(y_l))) − α log π(y_gold)/|y_gold|",
        "arXiv 2405.16681 (the third completion is its y_ref; the likelihood per token as TRL)",
        f"{_UNTIED} and the gold completions",
        "gold = chosen: cpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        assert pairs.gold is not None  # needs.data
        margin = pairs.chosen.total() - pairs.rejected.total()
        return logistic(self.beta * margin) - self.alpha * pairs.gold.average()


@dataclass(frozen=True)
class tpo_l(Bounded):
    """As `tpo` with log-probs per token and a margin γ to exceed."""

    beta: Positive = 0.01
    alpha: NotNegative = 1.0
    gamma: NotNegative = 0.5
    needs: ClassVar[Needs] = Needs(reference=False, data="triples")
    page: ClassVar[Page] = Page(
        "−log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ) − α log π(y_gold)/|y_gold|",
        "arXiv 2405.16681, TPO-L (γ as TRL's default)",
        f"{_UNTIED} and the gold completions",
        "α = 0: simpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        assert pairs.gold is not None  # needs.data
        margin = pairs.chosen.average() - pairs.rejected.average()
        return logistic(self.beta * margin - self.gamma) - self.alpha * pairs.gold.average()


_CERTAIN = -1e-6


def log_odds(average: Tensor) -> Tensor:
    """log p/(1−p) of p = e^average; a completion that is certain counts as 1 − 1e-6, its odds are infinite."""
    certain = average.clamp(max=_CERTAIN)
    return certain - torch.log(-torch.expm1(certain))
