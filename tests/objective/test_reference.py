"""The reference that comes after the policy: when, how far, and which numbers make no sense."""

from __future__ import annotations

import pytest
import torch

from klimb.objective.reference import moving


def test_every_so_many_steps() -> None:
    assert [step for step in range(1, 13) if moving(4).due(step)] == [4, 8, 12]


@pytest.mark.parametrize(("share", "expected"), [(1.0, [3.0, -1.0]), (0.25, [1.5, 0.5])])
def test_by_its_share_towards_the_policy(share: float, expected: list[float]) -> None:
    """From 1 towards 3 and −1, in the reference's own numbers; the policy stays, and nothing is differentiated."""
    reference = {"weight": torch.nn.Parameter(torch.ones(2, dtype=torch.float64))}
    policy = {"weight": torch.nn.Parameter(torch.tensor([3.0, -1.0])), "head": torch.nn.Parameter(torch.zeros(1))}
    moving(1, share).move(reference, policy)
    assert reference["weight"].tolist() == expected
    assert reference["weight"].dtype == torch.float64
    assert policy["weight"].tolist() == [3.0, -1.0]


@pytest.mark.parametrize(("every", "share"), [(0, 0.5), (5, 0.0), (5, 1.5), (5, -0.5)])
def test_nonsense_is_refused(every: int, share: float) -> None:
    with pytest.raises(ValueError, match=r"moving: (every|share) = "):
        moving(every, share)
