"""The leash: estimators of KL(π ‖ π_ref) from sampled tokens, and where and how hard they pull.

With x = log π(token) − log π_ref(token) on a token sampled from π, each estimator has a value and, as a loss,
a gradient. They are different things, and it is the gradient that decides where training ends (J. Schulman,
"Approximating KL divergence", 2020; arXiv 2506.09477):

====  ==============  ========================================  ======================================
      formula         expected value                            expected gradient, one step on-policy
====  ==============  ========================================  ======================================
k1    x               KL(π ‖ π_ref)                             zero, because E[∇ log π] = 0
k2    x²/2            second order in x only                    that of KL(π ‖ π_ref)
k3    e^(−x) − 1 + x  KL(π ‖ π_ref), never below zero           that of KL(π_ref ‖ π)
k1+   x               that of k1                                that of k2
k3+   e^(−x) − 1 + x  that of k3                                that of k2
====  ==============  ========================================  ======================================

"One step": the gradient of a *sum over tokens* misses how a token changes the KL of later ones. Only two
places get all of it: the reward (the KL to come is part of the return), and the loss with k2 of the whole
sequence's log-ratio (``level="sequence"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Callable[[Tensor], Tensor]
"""log-ratio to the reference, any shape → estimate, same shape."""

State = Mapping[str, Tensor]
"""What an algorithm remembers between updates, by name: float64 scalars, checkpointed."""

Where = Literal["reward", "loss", "none"]
Level = Literal["token", "sequence"]

LOG_BOUND = 20.0
"""No log-ratio beyond ±20 enters an exponential: e^20 is 5e8, and nothing is learnt past it."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_BOUND, LOG_BOUND).exp()


def k1(log_ratio: Tensor) -> Tensor:
    """x. Unbiased; the one for the reward. As a loss its expected gradient is zero."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """x²/2. Biased in value; as a loss it has the gradient of KL(π ‖ π_ref)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """e^(−x) − 1 + x. Unbiased and never negative; as a loss it has the gradient of KL(π_ref ‖ π).

    Degrades far below the reference: e^(−x) grows without bound, one token can fill the update.
    """
    return bounded_exp(-log_ratio) - 1 + log_ratio.clamp(min=-LOG_BOUND)


def k1_plus(log_ratio: Tensor) -> Tensor:
    """The value of k1, the gradient of k2: unbiased in both, though a token's value may be negative."""
    return k2(log_ratio) + (k1(log_ratio) - k2(log_ratio)).detach()


def k3_plus(log_ratio: Tensor) -> Tensor:
    """The value of k3, the gradient of k2: unbiased in both, and never negative in value."""
    return k2(log_ratio) + (k3(log_ratio) - k2(log_ratio)).detach()


ESTIMATORS: Mapping[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3, "k1+": k1_plus, "k3+": k3_plus}


@dataclass(frozen=True)
class KL:
    """β · KL(π ‖ π_ref): in the reward (before the advantage), in the loss, or nowhere.

    level: "token" sums the estimator over tokens; "sequence" estimates once from the sequence's summed
    log-ratio. target: where given, β is steered so that the KL per sequence comes to `target` nats: each
    update multiplies it by 1 + gain · clip(KL/target − 1, ±0.2) (Ziegler et al., arXiv 1909.08593, section
    2.2, whose gain is 0.1). corrected: in the loss, weighed by π/π_old (DeepSeek-V3.2, arXiv 2512.02556): right after
    several updates, and the gradient of KL(π ‖ π_ref) for every estimator (see `weight`).
    """

    where: Where
    estimator: Estimator
    beta: float
    level: Level = "token"
    target: float | None = None
    gain: float = 0.1
    corrected: bool = False

    def __post_init__(self) -> None:
        if self.where not in get_args(Where):
            raise ValueError(f"kl.where: '{self.where}' is no place for the KL; write reward, loss or none.")
        if self.level not in get_args(Level):
            raise ValueError(f"kl.level: '{self.level}' is unknown; write token or sequence.")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"kl.beta: {self.beta:g}: below 0 it pushes away from the reference; a finite one of ≥ 0.")
        if self.where == "none" and (self.beta or self.target):
            raise ValueError("kl: β or a target is set but kl.where is none; set kl.where to reward or loss.")
        if self.level == "sequence" and self.where != "loss":
            raise ValueError("kl.level: sequence is for the loss; in the reward the tokens' KL already adds up.")
        if self.corrected and (self.where != "loss" or self.level != "token"):
            raise ValueError("kl.corrected: the ratio weighs a token's KL in the loss; set kl.where to loss.")
        if self.target is not None and not (self.target > 0 and self.beta > 0 and self.gain > 0):
            raise ValueError("kl.target: steering multiplies β, so that β, the target and the gain must be above 0.")

    @property
    def active(self) -> bool:
        return self.where != "none" and self.beta > 0

    @property
    def in_reward(self) -> bool:
        return self.active and self.where == "reward"

    @property
    def in_loss(self) -> bool:
        return self.active and self.where == "loss"

    def coefficient(self, state: State) -> Tensor:
        """β of this update."""
        return state.get("beta", torch.tensor(self.beta, dtype=torch.float64))

    def penalty(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """log_ratio, mask [B, T] → KL in nats [B, T], that of a sequence spread evenly over its tokens."""
        if self.level == "token":
            return self.estimator(log_ratio)
        whole = self.estimator(torch.where(mask, log_ratio, 0.0).sum(dim=1, keepdim=True))
        return (whole / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(log_ratio)

    def weight(self, logps: Tensor, old_logps: Tensor) -> Tensor:
        """π/π_old [B, T] of a corrected penalty. Its gradient is the part of ∇KL that k1 and k3, of which the value is
        right, lack; with k2, k1+ and k3+ the gradient is that of the KL as it is, and would be counted twice."""
        ratio = bounded_exp(logps - old_logps)
        return ratio.detach() if self.estimator in (k2, k1_plus, k3_plus) else ratio

    def next_state(self, state: State, observed: Tensor) -> dict[str, Tensor]:
        """The state after an update whose mean KL per sequence was `observed` nats."""
        if self.target is None:
            return {}
        error = (observed.double() / self.target - 1).clamp(-0.2, 0.2)
        return {"beta": self.coefficient(state) * (1 + self.gain * error)}


NO_KL = KL("none", k1, beta=0.0)
