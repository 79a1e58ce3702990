"""Nash-MD: its update is the paper's, and it comes to rest at the regularised Nash equilibrium, cycles or not.

A judge says P(y ≻ y') of every pair, as σ of an antisymmetric table: with scores that tell of both at once, any judge
can be put through `assign_credit`, also one whose preferences go round.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from klimb.lab.bandit import TokenBandit, expected_gradient, total_variation
from klimb.objective import ALGORITHMS
from klimb.objective.advantage import preferred
from klimb.objective.grouped import Rewards

BANDIT = TokenBandit.make(1)
LOGITS = torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ROUND = torch.randn(31, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
ROUND = ROUND - ROUND.T
"""log P/(1 − P) of row over column: no scores of single completions would give it."""
SCORED = BANDIT.rewards[:, None] - BANDIT.rewards[None, :]


def row(mixture, beta):
    nash = ALGORITHMS["nash_md"]
    return replace(nash, advantage=preferred(mixture), kl=replace(nash.kl, beta=beta))


def opponent(bandit, logits, mixture):
    """Probabilities of the token-wise mixture, each step normalised on its own."""
    steps = logits.softmax(-1) ** (1 - mixture) * bandit.ref_logits.softmax(-1) ** mixture
    return bandit.probabilities((steps / steps.sum(-1, keepdim=True)).log())


def expected_update(bandit, judge, logits, mixture, beta):
    """E over y ~ π and y' ~ π_mix of the gradient of the loss, through the library."""
    weight = opponent(bandit, logits, mixture)
    each = [
        expected_gradient(replace(bandit, rewards=judge[:, other]), row(mixture, beta), logits, baseline=0.0)
        for other in range(len(bandit))
    ]
    return (weight[:, None, None] * torch.stack(each)).sum(dim=0)


@pytest.mark.parametrize("judge", [ROUND, SCORED], ids=["round", "scored"])
@pytest.mark.parametrize("mixture", [0.0, 0.25, 1.0])
def test_the_expected_update_is_the_gradient_of_the_regularised_preference(judge, mixture):
    """∇ [P(π ≻ π') − τ KL(π ‖ μ)] with π' held fixed: section 7.2 of the paper."""
    logits = LOGITS.clone().requires_grad_()
    against = judge.sigmoid() @ opponent(BANDIT, LOGITS, mixture)
    value = (BANDIT.probabilities(logits) * against).sum() - 0.3 * BANDIT.kl(logits)
    (expected,) = torch.autograd.grad(-value, logits)
    found = expected_update(BANDIT, judge, LOGITS, mixture, 0.3)
    assert torch.allclose(found, expected, atol=1e-12)
    assert expected.abs().max() > 0.01


def test_the_score_of_the_opponent_is_what_it_is_compared_with():
    """As a stage gives it: scores of the policy's completions, and the opponent's as the baseline."""
    for other in (0, 17):
        told = replace(BANDIT, rewards=SCORED[:, other])
        one = expected_gradient(told, row(0.5, 0.3), LOGITS, baseline=0.0)
        two = expected_gradient(BANDIT, row(0.5, 0.3), LOGITS, baseline=BANDIT.rewards[other].item())
        assert torch.allclose(one, two, atol=1e-12)


def small(reference):
    """One token, three completions."""
    place = torch.zeros(3, 1, dtype=torch.long)
    return TokenBandit(
        torch.arange(3)[:, None], place, place == 0, torch.zeros(3).double(), torch.tensor([reference]).double().log()
    )


ROCK_PAPER_SCISSORS = 3 * torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]).double()
"""Paper beats rock and so on, 95 times of 100."""


def nash(judge, reference, tau, steps=2000, rate=0.1):
    """π ∝ μ e^(P(y ≻ π)/τ) in plain numbers, by small steps of the geometric mean of both sides."""
    wins = [[1 / (1 + math.exp(-x)) for x in line] for line in judge.tolist()]
    policy = [1 / len(reference)] * len(reference)

    def normalised(weights):
        return [w / sum(weights) for w in weights]

    for _ in range(steps):
        against = [sum(w * p for w, p in zip(line, policy)) for line in wins]
        best = normalised([m * math.exp(a / tau) for m, a in zip(reference, against)])
        policy = normalised([p ** (1 - rate) * b**rate for p, b in zip(policy, best)])
    return torch.tensor(policy).double()


def trained(judge, reference, mixture, beta, steps=60, lr=5.0):
    """Plain descent on the expected update, from a policy far from the reference."""
    bandit, logits = small(reference), torch.tensor([[2.0, 0.0, -1.0]]).double()
    for _ in range(steps):
        logits = logits - lr * expected_update(bandit, judge, logits, mixture, beta)
    return bandit.probabilities(logits), opponent(bandit, logits, mixture)


@pytest.mark.parametrize("mixture", [0.0, 0.5])
def test_rock_paper_scissors_ends_in_playing_all_alike(mixture):
    policy, _ = trained(ROCK_PAPER_SCISSORS, [1 / 3] * 3, mixture, beta=0.2)
    assert total_variation(policy, torch.full((3,), 1 / 3).double()) < 1e-4


@pytest.mark.parametrize("mixture", [0.0, 0.25, 0.5])
def test_from_another_reference_it_ends_at_the_regularised_equilibrium(mixture):
    """At rest π ∝ μ e^(P(y ≻ π_mix)/β), and π_mix = π^(1−m) μ^m/Z ∝ μ e^(P(y ≻ π_mix)(1−m)/β): the mixture is its own
    regularised best response, at τ = β/(1−m)."""
    reference, beta = [0.6, 0.3, 0.1], 0.2
    policy, mixed = trained(ROCK_PAPER_SCISSORS, reference, mixture, beta)
    equilibrium = nash(ROCK_PAPER_SCISSORS, reference, beta / (1 - mixture))
    assert total_variation(mixed, equilibrium) < 1e-4
    best = (small(reference).ref_logits[0] + ROCK_PAPER_SCISSORS.sigmoid() @ equilibrium / beta).softmax(0)
    assert total_variation(policy, best) < 1e-4
    assert total_variation(equilibrium, torch.tensor(reference).double()) > 0.05
    assert (total_variation(policy, mixed) < 1e-12) == (mixture == 0)


def test_the_equilibrium_that_it_is_held_against_is_nobodys_to_exploit():
    """Of P(π ≻ π*) − τ KL(π ‖ μ) the best is π* itself, found over a grid of policies."""
    reference, tau = torch.tensor([0.6, 0.3, 0.1]).double(), 0.2
    equilibrium = nash(ROCK_PAPER_SCISSORS, reference.tolist(), tau)
    grid = torch.cartesian_prod(*[torch.linspace(-4, 4, 41).double()] * 3).softmax(-1)
    against = ROCK_PAPER_SCISSORS.sigmoid() @ equilibrium

    def worth(policy):
        return policy @ against - tau * (policy * (policy / reference).log()).sum(-1)

    assert worth(grid).max() <= worth(equilibrium) + 1e-9


def test_several_opponents_are_their_mean():
    """A sample's advantage against three is the mean of those against each, and so is its expected update."""
    scores, others = torch.tensor([0.3, -1.0]).double(), torch.tensor([[1.0, 0.0, 2.5], [-1.0, 0.5, 0.0]]).double()
    given = Rewards(scores[:, None], torch.ones(2, 1, dtype=torch.bool), torch.arange(2))
    each = [preferred()(replace(given, baseline=column)) for column in others.T]
    assert torch.allclose(preferred()(replace(given, baseline=others)), torch.stack(each).mean(dim=0))
    assert each[0][1] == 0  # a draw
