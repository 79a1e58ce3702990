"""Why wrong answers grow longer under GRPO's mean over a completion's tokens and not under a sum: an exact world.

The state, lucky or unlucky, is visible; then fillers follow, each with probability p = σ(θ_state), until a stop token.
Only the lucky are rewarded, whatever the filler. With S = ∂/∂θ log π = n − (n + 1)p of a completion with n fillers and
L = n + 1 tokens, the gradient that reaches θ_state is E[A | state] · E[S / L] under a mean over tokens and
E[A | state] · E[S] = 0 under a sum (arXiv 2503.20783, section 3.1). All completions are enumerated.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.objective import DR_GRPO, GRPO, NO_KL, Algorithm, policy_loss
from klimb.objective.aggregate import token_mean
from klimb.objective.surrogate import reinforce

LONGEST = 160
LUCKY = 0.6
"""Share of prompts that can be rewarded: A = 0.4 for those, −0.6 for the others."""


def gradient(algorithm: Algorithm, theta: torch.Tensor) -> torch.Tensor:
    """∂ of what is maximised after θ [lucky, unlucky], expected over all completions up to LONGEST tokens."""
    theta = theta.clone().requires_grad_()
    more, stop = torch.nn.functional.logsigmoid(theta), torch.nn.functional.logsigmoid(-theta)
    length = torch.arange(1, LONGEST + 1)
    place = torch.arange(LONGEST)
    mask = (place[None, :] < length[:, None]).repeat(2, 1)
    last = (place[None, :] == length[:, None] - 1).repeat(2, 1)
    state = torch.arange(2).repeat_interleave(LONGEST)
    logps = torch.where(last, stop[state, None], more[state, None])
    probability = torch.where(mask, logps, 0.0).sum(dim=1).exp().detach()
    share = torch.tensor([LUCKY, 1 - LUCKY], dtype=torch.float64)[state]
    advantage = torch.tensor([1 - LUCKY, -LUCKY], dtype=torch.float64)[state]
    weighted = advantage * probability * share * len(mask)  # the loss divides by the number of samples
    loss, _ = policy_loss(
        algorithm, logps=logps, advantages=weighted[:, None].expand(mask.shape), mask=mask,
        totals=BatchTotals.of(mask, torch.arange(len(mask))),
    )  # fmt: skip
    [found] = torch.autograd.grad(loss, [theta])
    return -found


def variant(algorithm: Algorithm) -> Algorithm:
    return replace(algorithm, surrogate=reinforce, kl=NO_KL).resolve(max_length=1)


@pytest.mark.parametrize("p", [0.5, 0.75])
def test_a_mean_over_tokens_pushes_as_derived_and_a_sum_not_at_all(p: float) -> None:
    theta = torch.full((2,), math.log(p / (1 - p)), dtype=torch.float64)
    per_length = 1 - (1 - p) / p * -math.log(1 - p) - p  # E[S / L]
    expected = [LUCKY * (1 - LUCKY) * per_length, -(1 - LUCKY) * LUCKY * per_length]
    assert per_length < 0
    assert gradient(variant(GRPO), theta).tolist() == pytest.approx(expected, abs=1e-12)
    for other in (DR_GRPO, replace(GRPO, aggregate=token_mean)):
        assert gradient(variant(other), theta).abs().max() < 1e-12


def test_wrong_completions_grow_under_the_mean_and_stay_under_the_sum() -> None:
    grown = []
    for algorithm in (GRPO, DR_GRPO):
        theta = torch.full((2,), math.log(3.0), dtype=torch.float64)  # three fillers on average
        gaps = []
        for _ in range(60):
            theta = theta + 0.5 * gradient(variant(algorithm), theta)
            fillers = theta.exp()
            gaps.append(float(fillers[1] - fillers[0]))
        grown.append(gaps)
    mean, total = grown
    assert all(later > earlier for earlier, later in pairwise(mean))
    assert mean[-1] > 5
    assert max(map(abs, total)) < 1e-6
