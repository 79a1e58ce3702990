"""Losses of the implicit margin Δ = h_w − h_l alone: what cancels in it (the prompt's constant) is free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb.objective.bounds import Bounded, NotNegative, Positive, Share, ShareBelowHalf, SmallShare
from klimb.objective.preference.pairs import Needs, Page, Pairs, logistic

_FALLS = "the chosen may become less likely, as long as the rejected falls faster"


@dataclass(frozen=True)
class dpo(Bounded):
    """−log σ(βΔ): Bradley–Terry on the implicit reward, without bound."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "−log σ(βΔ)",
        "arXiv 2305.18290, equation 7",
        _FALLS,
        "on pairs that nobody would judge otherwise, Δ grows without bound and β no longer holds",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * pairs.margin())


@dataclass(frozen=True)
class step_dpo(Bounded):
    """DPO on single steps of a solution: the right and the wrong next step after the same right ones."""

    beta: Positive = 0.5
    needs: ClassVar[Needs] = Needs(data="steps")
    page: ClassVar[Page] = Page(
        "−log σ(βΔ), y_w and y_l one step each, after (prompt, right steps so far)",
        "arXiv 2406.18629 (β as in its authors' script for 7B models; 0.4 for 72B)",
        _FALLS,
        "with one step a solution it is dpo; rows that never disagree after equal steps give no pair",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * pairs.margin())


@dataclass(frozen=True)
class cdpo(Bounded):
    """Conservative DPO. The share ε of the labels is taken to be swapped: Δ stops growing where σ(βΔ) = 1 − ε."""

    beta: Positive = 0.1
    epsilon: ShareBelowHalf = 0.1
    page: ClassVar[Page] = Page(
        "−(1−ε) log σ(βΔ) − ε log σ(−βΔ)",
        'E. Mitchell, "A note on DPO with noisy preferences", 2023',
        "fits weaker preferences than there are when the labels are cleaner than ε says",
        "ε = 0: dpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        margin = self.beta * pairs.margin()
        return -(1 - self.epsilon) * logsigmoid(margin) - self.epsilon * logsigmoid(-margin)


@dataclass(frozen=True)
class robust(Bounded):
    """cDPO's noise taken out again: over labels of which the share ε is swapped it is DPO on the clean ones."""

    beta: Positive = 0.1
    epsilon: ShareBelowHalf = 0.1
    page: ClassVar[Page] = Page(
        "[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)",
        "arXiv 2403.00409 (ε = 0.1 there)",
        "without a lower bound in single pairs: a pair with a wrong label is pushed ever further",
        "ε = 0: dpo; near ε = 1/2 the variance of the gradient grows as 1/(1−2ε)²",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        margin = self.beta * pairs.margin()
        noisy = -(1 - self.epsilon) * logsigmoid(margin) + self.epsilon * logsigmoid(-margin)
        return noisy / (1 - 2 * self.epsilon)


@dataclass(frozen=True)
class ipo(Bounded):
    """A margin to reach, not to exceed. β is the paper's τ."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "(Δ − 1/(2β))²",
        "arXiv 2310.12036, equation 17",
        "the margin is in nats of whole completions: the same β asks less of long ones",
        "sees how often a completion wins, not by how much",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return (pairs.margin() - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class ipo_average(Bounded):
    """As `ipo` with h per token: the same margin asks more of long completions in sum."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "(h_w/|y_w| − h_l/|y_l| − 1/(2β))²",
        "arXiv 2310.12036, as TRL and its authors' word to TRL have it",
        "at the β of `ipo` the margin asked for is |y| times larger",
        "one token a completion: ipo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return (averaged(pairs) - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class dpo_norm(Bounded):
    """DPO on log-ratios per token, so that length does not add to the margin."""

    beta: Positive = 5.0
    page: ClassVar[Page] = Page(
        "−log σ(β (h_w/|y_w| − h_l/|y_l|))",
        "arXiv 2411.15124 (Tülu 3), section 5.1, with β = 5",
        _FALLS,
        "one token a completion: dpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * averaged(pairs))


@dataclass(frozen=True)
class hinge(Bounded):
    """SLiC's hinge on DPO's margin: nothing is learnt from a pair beyond Δ = 1/β."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "max(0, 1 − βΔ)",
        "arXiv 2305.10425 (SLiC-HF), with π_ref as in arXiv 2309.06657",
        "pairs beyond the margin have no gradient, and so no leash either",
        "all pairs beyond the margin: nothing is learnt",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return (1 - self.beta * pairs.margin()).relu()


@dataclass(frozen=True)
class exo(Bounded):
    """The reverse KL from the policy's preference to the label smoothed by ε; DPO is the forward one."""

    beta: Positive = 0.1
    epsilon: SmallShare = 1e-3
    page: ClassVar[Page] = Page(
        "q (log q − log(1−ε)) + (1−q)(log(1−q) − log ε), q = σ(βΔ)",
        "arXiv 2402.00856, equation 16 (ε = 1e-3)",
        "where the policy is sure of the opposite (q near 0) the gradient vanishes: such pairs are given up",
        "ε = 0 is infinite and refused",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        margin = self.beta * pairs.margin()
        won, lost = margin.sigmoid(), (-margin).sigmoid()
        return won * (logsigmoid(margin) - math.log1p(-self.epsilon)) + lost * (
            logsigmoid(-margin) - math.log(self.epsilon)
        )


@dataclass(frozen=True)
class discopop(Bounded):
    """A loss that a language model found: logistic, blended with an exponential where the margin is positive."""

    beta: Positive = 0.1
    tau: Positive = 0.05
    page: ClassVar[Page] = Page(
        "(1−m)(−log σ(βΔ)) + m e^(−βΔ), m = σ(βΔ/τ)",
        "arXiv 2406.08414, equation 5 (τ = 0.05)",
        "not convex, and at π = π_ref its slope is the wrong way (+0.78 at τ = 0.05): pairs that agree settle in "
        "the valley at βΔ = −0.12, on the wrong side, unless something carries them over",
        "τ → ∞: half DPO, half exponential",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        margin = self.beta * pairs.margin()
        mixed = (margin / self.tau).sigmoid()
        # e^(−margin) has its weight m only at positive margins; far below 0, m e^(−margin) is 0 and not 0 · ∞.
        exponential = (logsigmoid(margin / self.tau) - margin).exp()
        return (1 - mixed) * logistic(margin) + exponential


@dataclass(frozen=True)
class dpo_shift(Bounded):
    """DPO whose rejected side counts less, by λ ≤ 1: the chosen falls less, the margin grows less."""

    beta: Positive = 0.1
    scale: Share = 0.95
    page: ClassVar[Page] = Page(
        "−log σ(β (h_w − λ h_l)), λ = scale, fixed",
        "arXiv 2502.07599 (λ = 0.95 in the models that were released; its rising and falling λ are left out)",
        "smaller λ: more of the chosen's likelihood, less margin; the prompt's constant no longer cancels",
        "λ = 1: dpo; λ = 0: the chosen's likelihood alone",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * (pairs.chosen.log_ratio() - self.scale * pairs.rejected.log_ratio()))


@dataclass(frozen=True)
class dpop(Bounded):
    """DPO with a fine on a chosen completion that has become less likely than under the reference."""

    beta: Positive = 0.3
    penalty: NotNegative = 50.0
    page: ClassVar[Page] = Page(
        "−log σ(β (Δ − λ max(0, −h_w))), λ = penalty",
        "arXiv 2402.13228 (DPO-Positive, Smaug), equation 3; λ = 50 and β = 0.3 of its section 5",
        "λβ is large: a single chosen completion that falls takes the whole gradient",
        "λ = 0, or no chosen completion falls: dpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        fallen = (-pairs.chosen.log_ratio()).relu()
        return logistic(self.beta * (pairs.margin() - self.penalty * fallen))


@dataclass(frozen=True)
class ld_dpo(Bounded):
    """DPO in which the tokens beyond the shorter completion's length count by α."""

    beta: Positive = 0.1
    alpha: Share = 0.5
    page: ClassVar[Page] = Page(
        "−log σ(βΔ') with h' = Σ_{t ≤ min length} log-ratio + α Σ_{t > min length} log-ratio",
        "arXiv 2409.06411; α is chosen by model there (0.5 is this table's choice)",
        "what only the longer completion says is learnt by α",
        "α = 1: dpo; equal lengths: dpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        shared = pairs.chosen.mask.sum(dim=1).minimum(pairs.rejected.mask.sum(dim=1))
        sides = []
        for side in (pairs.chosen, pairs.rejected):
            tail = side.mask.cumsum(dim=1) > shared[:, None]
            ratios = side.ratios()
            sides.append(ratios.where(~tail, self.alpha * ratios).sum(dim=1))
        return logistic(self.beta * (sides[0] - sides[1]))


def averaged(pairs: Pairs) -> Tensor:
    """h_w/|y_w| − h_l/|y_l| [P]."""
    return pairs.chosen.log_ratio() / pairs.chosen.tokens - pairs.rejected.log_ratio() / pairs.rejected.tokens
