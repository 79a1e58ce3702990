"""f-DPO: other divergences than the reverse KL as the leash. Its derivative f' at π/π_ref is the implicit reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb.objective.bounds import Bounded, Positive, Share
from klimb.objective.kl import bounded_exp
from klimb.objective.preference.pairs import Page, Pairs, logistic

_SOURCE = "arXiv 2309.16240 (f-DPO), table 1"
_BOUND = "no gradient reaches a completion whose log-ratio is beyond 20 nats (the exponential is bounded there)"


@dataclass(frozen=True)
class fdpo_kl(Bounded):
    """The forward KL(π_ref ‖ π): f'(π/π_ref) = 1 − π_ref/π. It keeps what the reference can do."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page("−log σ(β (e^(−h_l) − e^(−h_w)))", _SOURCE, _BOUND, "near π_ref, e^(−h) ≈ 1 − h: dpo")

    def __call__(self, pairs: Pairs) -> Tensor:
        won, lost = (bounded_exp(-side.log_ratio()) for side in (pairs.chosen, pairs.rejected))
        return logistic(self.beta * (lost - won))


@dataclass(frozen=True)
class fdpo_js(Bounded):
    """Jensen–Shannon: f'(u) = log(2u/(1+u)). The reward of a completion is bounded above by log 2."""

    beta: Positive = 0.1
    page: ClassVar[Page] = Page(
        "−log σ(β (log σ(h_w) − log σ(h_l)))",
        _SOURCE,
        "a chosen completion far above the reference has no gradient left: only the rejected falls further",
        "near π_ref: dpo at β/2; far below it: dpo",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * (logsigmoid(pairs.chosen.log_ratio()) - logsigmoid(pairs.rejected.log_ratio())))


@dataclass(frozen=True)
class fdpo_alpha(Bounded):
    """α-divergence: f'(u) = (u^(α−1) − 1)/(α−1), between the reverse KL (α → 1) and the forward (α → 0)."""

    beta: Positive = 0.1
    alpha: Share = 0.5
    page: ClassVar[Page] = Page(
        "−log σ(β (e^((α−1)h_w) − e^((α−1)h_l))/(α−1))",
        f"{_SOURCE}; written as TRL has it, α = 0.5 is TRL's default",
        _BOUND.replace("20 nats", "20/(1−α) nats"),
        "α = 1: dpo; α = 0: fdpo_kl",
    )

    def __call__(self, pairs: Pairs) -> Tensor:
        if self.alpha == 1:
            return logistic(self.beta * pairs.margin())
        power = self.alpha - 1
        won, lost = (bounded_exp(power * side.log_ratio()) / power for side in (pairs.chosen, pairs.rejected))
        return logistic(self.beta * (won - lost))
