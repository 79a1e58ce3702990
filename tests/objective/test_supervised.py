"""Supervised losses against torch's own cross-entropy and divergence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional

from klimb.batch import BatchTotals
from klimb.metrics import results
from klimb.objective import forward_kl, reverse_kl, sft_loss
from klimb.objective.supervised import dft, distillation_loss, generalised_jsd


def distributions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_sft_is_cross_entropy_over_the_trained_tokens():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([[1, 4, 6], [2, -100, -100]])
    mask = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    logps = torch.where(mask, logps, torch.nan)
    totals = BatchTotals.of(mask, torch.arange(2))
    loss, found = sft_loss(logps, mask, totals)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert loss.item() == pytest.approx(expected)
    assert results(found)["loss"] == pytest.approx(expected)
    halves = [sft_loss(logps[i : i + 1], mask[i : i + 1], totals)[0] for i in range(2)]
    assert sum(halves).item() == pytest.approx(expected)


def test_dynamic_fine_tuning_weighs_a_token_by_its_own_probability():
    """−p log p, with the gradient of −log p times p; the likelihood is reported beside it."""
    logps = torch.tensor([[-0.5, -3.0, 7.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss, found = sft_loss(logps, mask, BatchTotals.of(mask, torch.zeros(1)), dft)
    loss.backward()
    p = [math.exp(-0.5), math.exp(-3.0)]
    assert loss.item() == pytest.approx((0.5 * p[0] + 3 * p[1]) / 2)
    assert logps.grad[0].tolist() == pytest.approx([-p[0] / 2, -p[1] / 2, 0.0])
    assert results(found) == pytest.approx({"loss": loss.item(), "nll": 1.75})


def test_distillation_against_torch():
    teacher, student = distributions()
    expected = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(forward_kl(teacher, student), expected)
    assert torch.allclose(reverse_kl(student, teacher), expected)
    assert torch.allclose(forward_kl(teacher, teacher), torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_a_token_that_the_teacher_rules_out_leaves_no_nan():
    teacher, student = distributions()
    teacher = teacher.clone()
    teacher[:, 0] = -torch.inf
    teacher = teacher.log_softmax(-1)
    student = student.clone().requires_grad_()
    loss = forward_kl(teacher, student)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    expected = (teacher.exp()[:, 1:] * (teacher - student)[:, 1:]).sum(-1)
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_generalised_jsd_is_trls_with_its_gradient(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    teacher, logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    found = generalised_jsd(teacher.log_softmax(-1), ours.log_softmax(-1), beta).mean()
    expected = gkd.generalized_jsd_loss(theirs, teacher, beta=beta, reduction="sum") / 5
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-14)


def test_generalised_jsd_is_bounded_symmetric_at_a_half_and_zero_for_equals() -> None:
    teacher, student = distributions()
    half = generalised_jsd(teacher, student, 0.5)
    assert torch.allclose(half, generalised_jsd(student, teacher, 0.5))
    assert (half > 0).all()
    far = torch.full((2, 4), -40.0, dtype=torch.float64)
    far[0, 0] = far[1, 3] = 0.0
    assert generalised_jsd(*far.log_softmax(-1)[:, None], 0.5).item() == pytest.approx(math.log(2), abs=1e-9)
    for beta in (0.0, 0.3, 1.0):
        assert generalised_jsd(teacher, teacher, beta).abs().max() < 1e-12
    # Near its ends, divided by β or by 1 − β, it is the divergence that stands there.
    assert torch.allclose(generalised_jsd(teacher, student, 1e-6) / 1e-6, forward_kl(teacher, student), rtol=1e-4)
    assert torch.allclose(generalised_jsd(teacher, student, 1 - 1e-6) / 1e-6, reverse_kl(teacher, student), rtol=1e-4)


def test_distillation_is_a_mean_over_the_updates_tokens_however_it_is_split() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    divergence = torch.tensor([[0.3, 0.5, torch.nan], [1.0, torch.nan, torch.nan]], dtype=torch.float64)
    totals = BatchTotals.of(mask, torch.arange(2))
    loss, found = distillation_loss(divergence, mask, totals)
    assert loss.item() == pytest.approx(0.6)
    assert results(found)["loss"] == pytest.approx(0.6)
    parts = [distillation_loss(divergence[i : i + 1], mask[i : i + 1], totals)[0] for i in range(2)]
    assert sum(parts).item() == pytest.approx(0.6)


@pytest.mark.parametrize("loss", [sft_loss, partial(sft_loss, loss=dft), distillation_loss])
def test_what_stands_where_nothing_is_learnt_reaches_neither_loss_nor_gradient(loss):
    values = torch.tensor([[-0.5, math.nan, -3.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    found, _ = loss(values, mask, BatchTotals.of(mask, torch.zeros(1)))
    found.backward()
    weight = [math.exp(-0.5), math.exp(-3.0)] if isinstance(loss, partial) else [1.0, 1.0]
    assert abs(found.item()) == pytest.approx((0.5 * weight[0] + 3 * weight[1]) / 2)
    assert values.grad[0].abs().tolist() == pytest.approx([weight[0] / 2, 0.0, weight[1] / 2])


def test_a_token_that_neither_can_say_is_in_no_divergence():
    """ln 2 less the entropy of (¼, ¾), whichever is on top; and no NaN in the gradient of either."""
    ruled_out = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    p, q = (torch.zeros(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    even = (p + ruled_out).log_softmax(-1)
    uneven = (q + torch.tensor([0.0, math.log(3.0), 0.0], dtype=torch.float64) + ruled_out).log_softmax(-1)
    found = forward_kl(even, uneven)
    assert found.item() == pytest.approx(-math.log(2) - 0.5 * math.log(0.25 * 0.75))
    found.sum().backward()
    assert q.grad[0].tolist() == pytest.approx([0.25 - 0.5, 0.75 - 0.5, 0.0])
    assert p.grad.isfinite().all()
    assert p.grad[0, 2] == 0
