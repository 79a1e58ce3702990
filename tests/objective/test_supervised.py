"""Supervised losses against torch's own cross-entropy and divergence."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from klimb.batch import BatchTotals
from klimb.metrics import results
from klimb.objective import forward_kl, reverse_kl, sft_loss


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
