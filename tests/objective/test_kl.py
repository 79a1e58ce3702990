"""KL estimators against enumeration, and the leash built from them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.lab.bandit import TokenBandit
from klimb.objective import KL, NO_KL, REINFORCE, k1, k2, k3, policy_loss
from klimb.objective.kl import bounded_exp, k1_plus, k3_plus

torch.manual_seed(0)
LOGITS = torch.randn(3, dtype=torch.float64)
REF = torch.randn(3, dtype=torch.float64).log_softmax(0)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def expected_gradient(estimator):
    """What training on samples sees: the sampling distribution is not differentiated."""
    logits = LOGITS.clone().requires_grad_()
    logps = logits.log_softmax(0)
    (logps.exp().detach() * estimator(logps - REF)).sum().backward()
    return logits.grad


def gradient_of(function):
    logits = LOGITS.clone().requires_grad_()
    function(logits.log_softmax(0)).backward()
    return logits.grad


def test_expected_values():
    logps = LOGITS.log_softmax(0)
    x, p = logps - REF, logps.exp()
    exact = kl(logps, REF)
    assert torch.allclose((p * k1(x)).sum(), exact)
    assert torch.allclose((p * k3(x)).sum(), exact)
    # k2 is off: with x = ln 2 and ln(1/2) on a fair coin against (1/4, 1): written out for this policy.
    assert torch.allclose((p * k2(x)).sum(), (p * x * x).sum() / 2)
    assert not torch.allclose((p * k2(x)).sum(), exact, rtol=0.01)
    assert (k3(x) >= 0).all()


def test_whose_gradient_as_a_loss():
    assert torch.allclose(expected_gradient(k1), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(expected_gradient(k2), gradient_of(lambda logps: kl(logps, REF)))
    assert torch.allclose(expected_gradient(k3), gradient_of(lambda logps: kl(REF, logps)))


@pytest.mark.parametrize(("estimator", "value"), [(k1_plus, k1), (k3_plus, k3)])
def test_the_value_of_one_and_the_gradient_of_k2(estimator, value):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert torch.allclose(estimator(x), value(x))
    assert torch.allclose(expected_gradient(estimator), gradient_of(lambda logps: kl(logps, REF)))


@pytest.mark.parametrize("estimator", [k1, k2, k3, k1_plus, k3_plus])
def test_weighed_by_the_ratio_a_sample_of_the_old_policy_gives_the_gradient_of_the_kl(estimator):
    """Exactly, by enumeration over tokens of π_old; without the weight none does."""
    old = torch.randn(3, dtype=torch.float64).log_softmax(0)
    logits = LOGITS.clone().requires_grad_()
    logps, mask = logits.log_softmax(0)[:, None], torch.ones(3, 1, dtype=torch.bool)
    gradients = []
    for corrected in (True, False):
        row = replace(REINFORCE, kl=KL("loss", estimator, 1.0, corrected=corrected))
        total = 0.0
        for token in range(3):
            one = {"mask": mask[:1], "totals": BatchTotals(1, 1, 1), "advantages": torch.zeros(1, 1)}
            loss, _ = policy_loss(
                row, logps=logps[token][None], old_logps=old[token].view(1, 1), ref_logps=REF[token].view(1, 1), **one
            )
            total = total + old[token].exp() * loss
        gradients.append(torch.autograd.grad(total, logits, retain_graph=True)[0])
    exact = gradient_of(lambda logps: kl(logps, REF))
    assert torch.allclose(gradients[0], exact)
    assert not torch.allclose(gradients[1], exact, rtol=0.1)


def test_only_the_sequence_level_has_the_gradient_of_the_sequence_kl():
    bandit = TokenBandit.make(1)
    weight = bandit.probabilities(LOGITS_15 := torch.randn(15, 3, dtype=torch.float64))

    def gradient(leash):
        logits = LOGITS_15.clone().requires_grad_()
        log_ratio = bandit.logps(logits) - bandit.logps(bandit.ref_logits)
        penalty = torch.where(bandit.mask, leash.penalty(log_ratio, bandit.mask), 0.0).sum(dim=1)
        (weight * penalty).sum().backward()
        return logits.grad

    logits = LOGITS_15.clone().requires_grad_()
    bandit.kl(logits).backward()
    assert torch.allclose(gradient(KL("loss", k2, 1.0, level="sequence")), logits.grad)
    assert not torch.allclose(gradient(KL("loss", k2, 1.0)), logits.grad, rtol=0.1)


def test_the_penalty_of_a_sequence_is_spread_over_its_own_tokens():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    log_ratio = torch.tensor([[1.0, 2.0, -0.5], [3.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    penalty = KL("loss", k2, 1.0, level="sequence").penalty(log_ratio, mask)
    assert penalty[0].tolist() == pytest.approx([2.5**2 / 2 / 3] * 3)
    assert penalty[1, 0].item() == pytest.approx(4.5)
    assert penalty.isfinite().all()


def test_huge_log_ratios_stay_finite():
    assert k3(torch.tensor([-1e4, 1e4], dtype=torch.float32)).isfinite().all()
    assert bounded_exp(torch.tensor([-1e4, 1e4, 1.0])).log().tolist() == pytest.approx([-20.0, 20.0, 1.0])


def test_far_below_the_reference_nothing_pulls_further_down():
    x = torch.tensor([-25.0, -19.0, 30.0], requires_grad=True)
    k3(x).sum().backward()
    assert x.grad.tolist() == [0.0, pytest.approx(1 - math.exp(19)), 1.0]


def test_the_steered_coefficient():
    leash = KL("reward", k1, beta=0.5, target=2.0)

    def step(state, observed):
        return leash.next_state(state, torch.tensor(observed))

    # Twice the target: the error 1 is clipped to 0.2, times gain 0.1. Slightly below: 1.9/2 − 1 = −0.05.
    state = step({}, 4.0)
    assert state["beta"].item() == pytest.approx(0.5 * 1.02)
    state = step(state, 1.9)
    assert state["beta"].item() == pytest.approx(0.5 * 1.02 * 0.995)
    assert leash.coefficient(state) is state["beta"]
    assert step({}, 0.0)["beta"].item() == pytest.approx(0.5 * 0.98)  # far below: clipped as well
    assert KL("reward", k1, beta=0.5).next_state({}, torch.tensor(4.0)) == {}


@pytest.mark.parametrize(
    "settings",
    [{"beta": -0.1}, {"beta": math.nan}, {"beta": math.inf}, {"target": math.nan}, {"target": 1.0, "gain": 0}],
)
def test_a_leash_that_does_not_pull_back_is_refused(settings):
    with pytest.raises(ValueError, match=r"kl\.(beta|target)"):
        KL("reward", k1, **{"beta": 0.1, **settings})


def test_no_kl_is_inactive():
    assert not NO_KL.active
    assert not KL("loss", k3, beta=0.0).active


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_the_leash_is_tied_in_one_place(where):
    pulls, slack = KL(where, k1, beta=0.1), KL(where, k1, beta=0.0)
    assert (pulls.in_reward, pulls.in_loss) == (where == "reward", where == "loss")
    assert (slack.in_reward, slack.in_loss) == (False, False)
    assert KL(where, k1, beta=0.1, target=0.5).target == 0.5


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (dict(where="rewards", estimator=k1, beta=0.1), "kl.where"),
        (dict(where="none", estimator=k1, beta=0.1), "kl:"),
        (dict(where="loss", estimator=k2, beta=-0.1), "kl.beta"),
        (dict(where="reward", estimator=k1, beta=0.1, level="sequence"), "kl.level"),
        (dict(where="loss", estimator=k2, beta=0.1, level="word"), "kl.level"),
        (dict(where="loss", estimator=k2, beta=0.0, target=1.0), "kl.target"),
        (dict(where="loss", estimator=k2, beta=0.1, target=0.0), "kl.target"),
        (dict(where="reward", estimator=k1, beta=0.1, corrected=True), "kl.corrected"),
        (dict(where="loss", estimator=k2, beta=0.1, level="sequence", corrected=True), "kl.corrected"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, key):
    with pytest.raises(ValueError, match=key):
        KL(**arguments)
