"""The steered coefficient of the entropy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.objective import REINFORCE, policy_loss
from klimb.objective.entropy import adaptive_entropy, entropy_coefficient


def test_the_coefficient_climbs_below_the_target_falls_above_and_works_only_below():
    bonus = adaptive_entropy(target=0.2, step=0.4, low=0.0, high=1.0, start=0.1)
    assert entropy_coefficient(bonus, {}) == 0.0  # nothing was measured yet
    state, seen = {}, []
    for observed in (0.15, 0.2, 0.1, 0.3, 0.1, 0.5, 0.5, 0.5):
        state = bonus.next_state(state, observed)
        seen.append((float(state["entropy_coefficient"]), entropy_coefficient(bonus, state)))
    coefficients = [0.5, 0.9, 1.0, 0.6, 1.0, 0.6, 0.2, 0.0]
    at_work = [0.5, 0.9, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert [x for pair in seen for x in pair] == pytest.approx([x for pair in zip(coefficients, at_work) for x in pair])
    assert entropy_coefficient(0.25, state) == 0.25


def test_the_loss_takes_it_from_the_state():
    mask = torch.ones(1, 2, dtype=torch.bool)
    common = {"logps": torch.zeros(1, 2), "advantages": torch.zeros(1, 2), "mask": mask,
              "entropy": torch.tensor([[0.5, 1.5]]), "totals": BatchTotals.of(mask, torch.zeros(1))}  # fmt: skip
    row = replace(REINFORCE, entropy_bonus=adaptive_entropy(target=3.0))
    state = {"entropy": torch.tensor(1.0), "entropy_coefficient": torch.tensor(0.25, dtype=torch.float64)}
    assert policy_loss(row, state=state, **common)[0].item() == pytest.approx(-0.25 * 2.0)
    assert policy_loss(row, **common)[0].item() == 0.0
