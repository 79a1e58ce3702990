"""Preference losses fitted to pairs of known probability: closed forms, and errors that shrink with N."""

from __future__ import annotations

import math

import pytest
import torch

from klimb.lab.bandit import TokenBandit, total_variation
from klimb.objective import Completions, Pairs, cdpo, dpo, ipo
from klimb.objective.preference.margin import dpo_shift, robust

BETA = 0.5
BANDIT = TokenBandit.make(1, spread=0.5)
REF = BANDIT.probabilities(BANDIT.ref_logits)
WINS = torch.sigmoid(BANDIT.rewards[:, None] - BANDIT.rewards[None, :])
"""[S, S]: how often the row is preferred to the column (Bradley–Terry)."""
POPULATION = 2 * REF[:, None] * REF[None, :] * WINS
"""[S, S]: how often (chosen, rejected) is drawn when both are sampled from the reference; sums to 1."""
POPULATION = POPULATION / POPULATION.sum()


def alone(h):
    """Completions of which nothing but the log-ratio [N] is known."""
    return Completions(h[:, None], torch.zeros_like(h)[:, None], torch.ones(len(h), 1, dtype=torch.bool))


def fit(loss, weight):
    """The policy of least weighted loss over all (chosen, rejected), by L-BFGS on its logits."""
    logits = BANDIT.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        max_eval=4000,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    chosen, rejected = (weight > 0).nonzero(as_tuple=True)
    weight = weight[chosen, rejected]

    def closure():
        optimizer.zero_grad()
        h = BANDIT.log_ratios(logits)
        per_pair = loss(Pairs(alone(h[chosen]), alone(h[rejected])))
        value = (weight * per_pair).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach()


def test_dpo_on_the_population_is_the_optimum_of_the_rewards_that_made_the_labels():
    logits = fit(dpo(BETA), POPULATION)
    assert total_variation(BANDIT.probabilities(logits), BANDIT.optimum(BETA)) <= 1e-3
    implicit = BETA * BANDIT.log_ratios(logits)
    gap = implicit - BANDIT.rewards
    assert (gap - gap[0]).abs().max() < 0.01  # the reward up to one constant


def test_cdpo_takes_labels_for_noisier_than_they_are():
    """On clean labels it is DPO on labels of which a share ε was swapped."""
    noisy = 0.8 * POPULATION + 0.2 * POPULATION.T
    clean = BANDIT.probabilities(fit(cdpo(BETA, 0.2), POPULATION))
    assert total_variation(clean, BANDIT.probabilities(fit(dpo(BETA), noisy))) <= 1e-3
    assert total_variation(clean, BANDIT.optimum(BETA)) > 0.1  # and so it fits weaker preferences than there are


def test_ipo_on_the_population_is_its_own_closed_form():
    """Least squares of Δ to ±1/(2β) over pairs drawn from π_ref².

    The weights are a product, so that h(y) = E_{y'}[2 p(y ≻ y') − 1]/(2β) up to a constant, and π ∝ π_ref
    exp(E_{y'~ref} p(y ≻ y')/β): it sees how often a completion wins, not by how much.
    """
    found = BANDIT.probabilities(fit(ipo(BETA), POPULATION))
    assert total_variation(found, BANDIT.tilted(WINS @ REF / BETA)) <= 1e-3
    assert total_variation(found, BANDIT.optimum(BETA)) > 0.1


def test_robust_dpo_on_flipped_labels_is_the_optimum_of_the_clean_ones():
    noisy = 0.8 * POPULATION + 0.2 * POPULATION.T
    found = BANDIT.probabilities(fit(robust(BETA, 0.2), noisy))
    assert total_variation(found, BANDIT.optimum(BETA)) <= 1e-3
    assert total_variation(BANDIT.probabilities(fit(dpo(BETA), noisy)), BANDIT.optimum(BETA)) > 0.1


@pytest.mark.parametrize("scale", [0.5, 0.95, 1.0])
def test_dpo_shift_on_two_answers_stops_where_its_derivative_says(scale):
    """π = (x, 1 − x), π_ref = (½, ½), the first answer chosen with probability p; u = h_1 − λh_2, v = h_2 − λh_1.

    dL/dx = 0 reads p σ(−βu) (1/x + λ/(1−x)) = (1−p) σ(−βv) (λ/x + 1/(1−x)): solved by bisection, fitted by L-BFGS.
    At λ = 1 it is DPO's x = 1/(1 + ((1−p)/p)^(1/β)).
    """
    share, beta = 0.7, 0.5

    def slope(x):
        h1, h2 = math.log(2 * x), math.log(2 * (1 - x))
        lost_u = 1 / (1 + math.exp(beta * (h1 - scale * h2)))
        lost_v = 1 / (1 + math.exp(beta * (h2 - scale * h1)))
        return (1 - share) * lost_v * (scale / x + 1 / (1 - x)) - share * lost_u * (1 / x + scale / (1 - x))

    low, high = 1e-9, 1 - 1e-9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        h = logits.log_softmax(0) + math.log(2)
        value = torch.tensor([share, 1 - share], dtype=torch.float64) @ dpo_shift(beta, scale)(
            Pairs(alone(h), alone(h.flip(0)))
        )
        value.backward()
        return value

    optimizer.step(closure)
    found = logits.softmax(0)[0].item()
    assert found == pytest.approx(low, abs=1e-6)
    if scale == 1.0:
        assert found == pytest.approx(1 / (1 + ((1 - share) / share) ** (1 / beta)), abs=1e-6)


def predicted_error(pairs):
    """Expected total variation of DPO's fit to `pairs` labelled pairs, to first order.

    The Bradley–Terry scores u have Fisher information Σ n_ij p(1−p) (e_i − e_j)(e_i − e_j)ᵀ; π moves by π (dh
    − E_π dh) with h = u at β = 1; and half the sum of E|normal| = sd √(2/π) over completions is the error.
    """
    weight = pairs * 2 * REF[:, None] * REF[None, :] * WINS * WINS.T
    information = torch.diag(weight.sum(dim=1) - weight.diagonal()) - (weight - torch.diag(weight.diagonal()))
    covariance = torch.linalg.pinv(information)
    optimum = BANDIT.optimum(1.0)
    jacobian = torch.diag(optimum) - torch.outer(optimum, optimum)
    deviation = (jacobian @ covariance @ jacobian).diagonal().sqrt()
    return deviation.sum().item() * math.sqrt(2 / math.pi) / 2


@pytest.mark.parametrize("pairs", [8_000, 128_000])
def test_dpo_on_sampled_pairs_is_off_by_the_sampling_error(pairs):
    """Fitted to drawn pairs, four times; 16 times the pairs, a quarter of the error."""
    errors = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(POPULATION.flatten(), pairs, replacement=True, generator=generator)
        counts = drawn.bincount(minlength=31 * 31).reshape(31, 31).double() / pairs
        found = BANDIT.probabilities(fit(dpo(1.0), counts))
        errors.append(total_variation(found, BANDIT.optimum(1.0)))
    mean = sum(errors) / len(errors)
    # A mean of four; one draw's error has a relative deviation of about a quarter.
    assert mean == pytest.approx(predicted_error(pairs), rel=0.4)
