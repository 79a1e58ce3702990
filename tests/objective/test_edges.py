"""Where a formula turns: bounds of divergence, tokens that are certain or ruled out, what each loss asks for."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from klimb.objective import PREFERENCE_LOSSES, forward_kl, parse_preference
from klimb.objective.bounds import bounds_of
from klimb.objective.critic import Critic
from klimb.objective.preference import needs_of
from klimb.objective.spec import AXES
from klimb.objective.surrogate import kl_mask, tv_mask


def one(surrogate, new, old, advantage):
    """Loss, gradient by log π and the flag of a token of probability `new` that was sampled at `old`."""
    logps = torch.tensor([[new]], dtype=torch.float64).log().requires_grad_()
    before = torch.tensor([[old]], dtype=torch.float64).log()
    loss, clipped = surrogate(logps, before, torch.full_like(before, advantage), torch.ones(1, 1, dtype=torch.bool))
    loss.sum().backward()
    return loss.item(), logps.grad.item(), clipped.item()


def binary_kl(old, new):
    return old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))


@pytest.mark.parametrize(
    ("new", "old", "advantage", "stopped"),
    [
        (0.71, 0.4, 2.0, True),  # up by more than 0.3, as A wants
        (0.69, 0.4, 2.0, False),
        (0.15, 0.4, 2.0, False),  # down, against A: it has to come back
        (0.19, 0.4, -2.0, True),  # down by more than 0.2, as A wants
        (0.21, 0.4, -2.0, False),
        (0.75, 0.4, -2.0, False),
        (0.9, 0.4, 0.0, False),
        (0.1, 0.4, 0.0, False),
        (2e-3, 1e-4, 2.0, False),  # a ratio of 20, and nothing has changed
    ],
)
def test_total_variation_stops_what_moved_too_far_its_own_way(new, old, advantage, stopped):
    loss, gradient, clipped = one(tv_mask(low=0.2, high=0.3), new, old, advantage)
    assert clipped == stopped
    assert loss == pytest.approx(0.0 if stopped else -advantage * new / old)
    assert gradient == pytest.approx(0.0 if stopped else -advantage * new / old)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("new", "old"), [(0.62, 0.4), (0.55, 0.4), (0.2, 0.4), (0.3, 0.4), (0.95, 0.9), (0.97, 0.9)])
def test_binary_kl_stops_what_moved_too_far_its_own_way(new, old, advantage):
    low, high = 0.03, 0.06
    own_way = (new > old) == (advantage > 0)
    stopped = own_way and binary_kl(old, new) > (high if advantage > 0 else low)
    assert one(kl_mask(low, high), new, old, advantage)[2] == stopped


@pytest.mark.parametrize(("new", "old"), [(1.0, 0.5), (0.5, 1.0), (1.0, 1.0)])
def test_a_token_that_is_certain_stays_finite(new, old):
    assert all(math.isfinite(x) for x in one(kl_mask(), new, old, 1.0))


def test_a_token_that_both_rule_out_leaves_no_nan():
    teacher = torch.tensor([[-torch.inf, math.log(0.5), math.log(0.5)]], dtype=torch.float64)
    student = torch.tensor([[-torch.inf, math.log(0.25), math.log(0.75)]], dtype=torch.float64).requires_grad_()
    loss = forward_kl(teacher, student)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert student.grad[0, 1:].tolist() == pytest.approx([-0.5, -0.5])
    assert student.grad.isfinite().all()


ASKS = {
    ("advantage", "gae"): {"needs_values"},
    ("advantage", "prompt_value"): {"needs_values"},
    ("advantage", "parts_zscore"): {"needs_parts"},
    ("advantage", "optimal_token_baseline"): {"needs_collisions"},
    ("importance", "off_policy_drop"): {"of_current"},
    ("token_filter", "top_entropy"): {"needs_entropy"},
    ("overlong", "leave_out"): {"leaves_out"},
}
ANY_NUMBER = {
    ("skip_solved", "solved"), ("imitate_correct", "above"), ("clip_cov", "low"), ("clip_cov", "high"),
    ("alphapo", "alpha"), ("soft_overlong", "max_length"), ("length_penalty", "max_length"),
}  # fmt: skip
"""Settings of which every number means something, or that a run fills in."""


def test_every_setting_has_its_bounds():
    kinds = [value for axis in AXES.values() for value in axis.values() if isinstance(value, type)]
    kinds += [value for value in PREFERENCE_LOSSES.values() if isinstance(value, type)]
    numbers = {
        (kind.__name__, field.name) for kind in [*kinds, Critic] for field in fields(kind)
        if not isinstance(field.default, bool)
    }  # fmt: skip
    bounded = {(kind.__name__, name) for kind in [*kinds, Critic] for name in bounds_of(kind)}
    assert numbers - bounded == ANY_NUMBER


FLAGS = ("needs_values", "needs_parts", "needs_collisions", "needs_entropy", "of_current", "leaves_out")


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis, known in AXES.items() for name in known])
def test_what_a_value_of_an_axis_asks_for(axis, name):
    """What is not listed asks for nothing besides."""
    assert {flag for flag in FLAGS if getattr(AXES[axis][name], flag, False)} == ASKS.get((axis, name), set())


FREE = {"orpo", "cpo", "simpo", "alphapo", "tpo", "tpo_l", "chosen_nll"}
DATA = {"kto": "labels", "bco": "labels", "tpo": "triples", "tpo_l": "triples", "step_dpo": "steps"}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_what_a_loss_asks_for(name):
    needs = needs_of(parse_preference(name))
    assert needs.reference == (name not in FREE)
    assert needs.data == DATA.get(name, "pairs")
    assert needs.mismatched == (name == "kto")
    assert needs.collisions == (name == "wpo")
