"""Preference losses: the objective solved in closed form and fitted to pairs.

The optimum of E[r] − β·KL is π* ∝ π_ref e^(r/β), so that β log π/π_ref *is* the reward up to a constant of
the prompt. With h = log π/π_ref summed over a completion, Δ = h_w − h_l is the implicit margin, and a loss is
a link on it. Each takes h_w, h_l and the completions' token counts, all [P], to a loss per pair [P].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb import metrics
from klimb.metrics import Metrics
from klimb.objective.aggregate import pair_mean
from klimb.objective.spec import parse_value

PreferenceLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""chosen_log_ratio, rejected_log_ratio, chosen_tokens, rejected_tokens [P] → loss [P]."""


@dataclass(frozen=True)
class dpo:
    """−log σ(βΔ) (arXiv 2305.18290, equation 7): Bradley–Terry on the implicit reward, without bound."""

    beta: float = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> Tensor:
        return -logsigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class cdpo:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ) (E. Mitchell, "A note on DPO with noisy preferences", 2023).

    The share ε of the labels is taken to be swapped: Δ stops growing where σ(βΔ) = 1 − ε.
    """

    beta: float = 0.1
    epsilon: float = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> Tensor:
        margin = self.beta * (chosen - rejected)
        return -(1 - self.epsilon) * logsigmoid(margin) - self.epsilon * logsigmoid(-margin)


@dataclass(frozen=True)
class ipo:
    """(Δ − 1/(2β))² (arXiv 2310.12036, equation 17): a margin to reach, not to exceed. β is the paper's τ."""

    beta: float = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> Tensor:
        return (chosen - rejected - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class ipo_average:
    """As `ipo` with h per token (TRL's ipo): the same margin asks more of long completions in sum."""

    beta: float = 0.1

    def __call__(self, chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> Tensor:
        margin = chosen / chosen_tokens - rejected / rejected_tokens
        return (margin - 1 / (2 * self.beta)).square()


PREFERENCE_LOSSES: Mapping[str, type] = {"dpo": dpo, "cdpo": cdpo, "ipo": ipo, "ipo_average": ipo_average}


def parse_preference(spec: str | Mapping[str, Any] | PreferenceLoss) -> PreferenceLoss:
    """``dpo``, ``{dpo: 0.05}``, ``{name: cdpo, epsilon: 0.2}``, ``file.py:NAME``, or the loss itself."""
    if isinstance(spec, Mapping) and "name" in spec:
        spec = {spec["name"]: {key: value for key, value in spec.items() if key != "name"}}
    loss: PreferenceLoss = parse_value("loss", spec, PREFERENCE_LOSSES)
    return loss


def known_start(loss: PreferenceLoss) -> float:
    """Every pair's loss while π = π_ref (all log-ratios 0): DPO ln 2, IPO 1/(4β²). A run begins there."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return float(loss(zero, zero, one, one))


def preference_loss(
    loss: PreferenceLoss,
    *,
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    pairs: int,
) -> tuple[Tensor, Metrics]:
    """Loss over a part of an update of `pairs` pairs in all. Tensors [P], log-ratios summed over tokens."""
    per_pair = loss(chosen_log_ratio, rejected_log_ratio, chosen_tokens, rejected_tokens)
    margin = (chosen_log_ratio - rejected_log_ratio).detach()
    return pair_mean(per_pair, pairs), {
        "loss": metrics.mean(per_pair),
        "accuracy": metrics.mean((margin.sign() + 1) / 2),
        "margin": metrics.mean(margin),
        "chosen_log_ratio": metrics.mean(chosen_log_ratio),
        "rejected_log_ratio": metrics.mean(rejected_log_ratio),
    }
