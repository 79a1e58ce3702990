"""The reading copy is the algorithm that klimb runs: the same loss, the same gradient; and it learns."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.metrics import results
from klimb.objective import GRPO, assign_credit, policy_loss

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import grpo_in_one_file as copy  # noqa: E402

PROMPTS, SAMPLES = 6, 8
EXACT = {"rtol": 1e-12, "atol": 1e-14}
"""float64: the two add the same numbers in another order."""


def test_it_is_short_and_needs_torch_alone():
    text = (EXAMPLES / "grpo_in_one_file.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"__future__", "argparse", "copy", "random", "torch"}


def update(moved: float):
    """Answers of a random policy in float64, and the policies they are compared with, `moved` away from it."""
    torch.manual_seed(0)
    policy = copy.Policy(width=16, heads=2, layers=1).double()
    asked = [w for w in copy.words(PROMPTS, random.Random(0), held_out=False) for _ in range(SAMPLES)]
    prompts = copy.prompts_of(asked)
    answers = copy.sample(policy, prompts, torch.Generator().manual_seed(0))
    mask = copy.until_end(answers)
    with torch.no_grad():
        sampled = copy.logps_of(policy, prompts, answers)
    noise = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards = (torch.rand(len(asked), generator=torch.Generator().manual_seed(2)) < 0.5).float()
    rewards[:SAMPLES] = 1.0  # a group in which all are right
    return policy, prompts, answers, mask, sampled + moved * noise[0], sampled + 0.3 * noise[1], rewards


@pytest.mark.parametrize("moved", [0.0, 0.3], ids=["step 0", "ratios away from 1"])
def test_loss_and_gradient_are_the_librarys(moved):
    policy, prompts, answers, mask, old_logps, ref_logps, rewards = update(moved)
    own_advantages = copy.advantages_of(rewards.double().view(-1, SAMPLES)).flatten()
    group = torch.arange(len(mask)) // SAMPLES
    credit = assign_credit(
        GRPO, scores=rewards, mask=mask, group=group, logps=old_logps, ref_logps=ref_logps
    ).advantages
    assert torch.allclose(torch.where(mask, own_advantages[:, None], 0.0), credit, **EXACT)
    assert (own_advantages[:SAMPLES] == 0).all()

    gradients = []
    for own in (True, False):
        policy.zero_grad()
        logps = copy.logps_of(policy, prompts, answers)
        if own:
            loss = expected = copy.grpo_loss(logps, old_logps, ref_logps, own_advantages, mask)
        else:
            loss, found = policy_loss(
                GRPO, logps=logps, old_logps=old_logps, ref_logps=ref_logps, advantages=credit, mask=mask,
                totals=BatchTotals.of(mask, group),
            )  # fmt: skip
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(loss, expected, **EXACT)
    assert torch.allclose(*gradients, **EXACT)
    assert gradients[0].norm() > 0.01
    clipped = results(found)["clip_fraction"]
    assert clipped == 0 if moved == 0 else 0.1 < clipped < 0.6


def test_the_constants_are_those_of_the_row():
    assert GRPO.surrogate.low == GRPO.surrogate.high == copy.CLIP
    assert (GRPO.kl.beta, GRPO.advantage.eps) == (copy.BETA, copy.EPS)


def test_the_reward_and_the_mask():
    assert copy.reward("dacb", "abcd.") == 1
    assert [copy.reward("dacb", answer) for answer in ("abcd", "dacb.", "abc.", "")] == [0, 0, 0, 0]
    answers = torch.tensor([[0, 1, copy.END, 2, copy.END, 3], [0, 1, 2, 3, 4, 5]])
    assert copy.until_end(answers).sum(dim=1).tolist() == [3, 6]
    trained, held_out = (set(copy.words(300, random.Random(0), which)) for which in (False, True))
    assert trained.isdisjoint(held_out)


@pytest.mark.slow
def test_it_learns(capsys):
    before, after = copy.main(seed=0)
    assert before < 0.75
    assert after > before + 0.15
    told = capsys.readouterr().out
    assert "█" in told
    assert f"{after:.1%}" in told
