"""Before samples are learnt from: which groups are kept, which prompts rest, what weighs more."""

from __future__ import annotations

import pytest
import torch

from klimb.objective.sampling import dynamic, power_weights, skip_solved


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([0.0, 1.0, 1.0], True),
        ([1.0, 1.0], False),
        ([0.1 + 0.2, 0.3], False),
        ([1.0], False),
        ([0.0, 1e-6], False),  # exactly the tolerance
        ([0.0, 1.5e-6], True),
        ([1e6, 1e6 + 0.9], False),  # which grows with the scores
        ([-1e6, -1e6 + 0.9], False),
        ([-1e6, -1e6 + 2.0], True),
    ],
)
def test_dynamic_sampling_keeps_groups_that_differ(scores: list[float], kept: bool) -> None:
    assert dynamic(scores) == kept


def test_a_prompt_rests_when_all_its_samples_are_solved() -> None:
    assert skip_solved().rests([1.0, 2.0])
    assert not skip_solved().rests([1.0, 0.9])
    assert skip_solved(solved=0.5).rests([0.5, 0.7])


def test_a_low_score_weighs_as_much_as_a_high_one() -> None:
    assert power_weights(1.0)(torch.tensor([-1.0, 3.0])).tolist() == [0.5, 1.5]
