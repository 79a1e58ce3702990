"""Where the regressions of log π/π_ref end: A*-PO, DRO and the DRO that looks back to π_old."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from klimb.lab.bandit import TokenBandit, credit_of, expected_gradient, total_variation
from klimb.objective import ALGORITHMS, NO_KL
from klimb.objective.surrogate import quadratic

BETA = 0.5
BANDIT = TokenBandit.make(1)
OPTIMUM = BANDIT.optimum(BETA)
OTHERS = torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def at(name, beta=BETA):
    row = ALGORITHMS[name]
    return replace(row, kl=replace(row.kl, beta=beta))


def best_value(beta):
    """β log Σ π_ref e^(R/β)."""
    return float(beta * (BANDIT.logps(BANDIT.ref_logits).sum(dim=1) + BANDIT.rewards / beta).logsumexp(0))


@pytest.mark.parametrize("baseline", [best_value(BETA), 0.0, -5.0])
def test_on_its_own_samples_a_star_po_rests_at_the_optimum_whatever_v_is(baseline):
    found = expected_gradient(BANDIT, at("a_star_po"), BANDIT.logits_of(OPTIMUM), baseline=baseline)
    assert found.abs().max() < 1e-12


def test_on_others_samples_it_rests_there_with_the_exact_value_of_the_same_beta_alone():
    logits = BANDIT.logits_of(OPTIMUM)
    exact, wrong = (
        expected_gradient(BANDIT, at("a_star_po"), logits, baseline=v, sampler=OTHERS)
        for v in (best_value(BETA), best_value(2 * BETA))
    )
    assert exact.abs().max() < 1e-12
    assert wrong.abs().max() > 1e-2


def descended(gradient, steps=300, lr=0.1):
    """Adam on gradient(logits) from the reference, its rate falling to 0 → probabilities of completions."""
    policy = BANDIT.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([policy], lr=lr, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        policy.grad = gradient(policy.detach())
        optimizer.step()
        schedule.step()
    return BANDIT.probabilities(policy.detach())


def test_a_star_po_gets_there():
    found = descended(lambda logits: expected_gradient(BANDIT, at("a_star_po"), logits, baseline=0.3))
    assert total_variation(found, OPTIMUM) < 1e-3


def test_dro_rests_at_the_optimum_on_anybodys_samples_and_so_does_its_value():
    logits, value = BANDIT.logits_of(OPTIMUM), best_value(BETA)
    values = torch.where(BANDIT.mask, torch.tensor(value, dtype=torch.float64), 0.0)
    found = expected_gradient(BANDIT, at("dro"), logits, values=values, sampler=OTHERS)
    assert found.abs().max() < 1e-12
    credit = credit_of(BANDIT, at("dro"), logits, torch.arange(31), torch.arange(31), values)
    assert torch.allclose(credit.returns[BANDIT.mask], torch.tensor(value, dtype=torch.float64))


def test_dro_gets_there_from_samples_of_the_reference():
    """Policy and value in turns, both by the exact expectation over π_ref's completions."""
    weight = BANDIT.probabilities(BANDIT.ref_logits)

    def gradient(logits):
        value = (weight * (BANDIT.rewards - BETA * BANDIT.log_ratios(logits))).sum()
        values = torch.where(BANDIT.mask, value, 0.0)
        return expected_gradient(BANDIT, at("dro"), logits, values=values, sampler=BANDIT.ref_logits)

    assert total_variation(descended(gradient, steps=600), OPTIMUM) < 1e-2


def test_the_dro_of_one_batch_ends_where_every_token_is_pulled_alike():
    """One state, three tokens, fixed A: minimise Σ π_old (−A log π + β/2 x²), x = log π/π_old.

    Stationary in the logits: π_old (A − β x) ∝ π, which is not π ∝ π_old e^(A/β).
    """
    beta, old = 0.7, torch.tensor([0.2, 0.5, 0.3]).double()
    advantages, mask = torch.tensor([[1.0], [-0.4], [0.1]]).double(), torch.ones(3, 1, dtype=torch.bool)
    logits = old.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        per_token = quadratic(beta)(logits.log_softmax(0)[:, None], old.log()[:, None], advantages, mask).loss
        total = (old[:, None] * per_token).sum()
        total.backward()
        return total

    optimizer.step(loss)
    policy = logits.detach().softmax(0)
    pull = old * (advantages[:, 0] - beta * (policy / old).log())
    assert torch.allclose(pull / pull.sum(), policy, atol=1e-6)
    assert total_variation(policy, (old.log() + advantages[:, 0] / beta).softmax(0)) > 0.01
    assert ALGORITHMS["dro_old"].kl is NO_KL
