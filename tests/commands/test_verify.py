"""`klimb verify`: every shipped row and loss has the properties, and each property can fail."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from world import klimb

from klimb.commands.verify import verify
from klimb.objective import ALGORITHMS, PREFERENCE_LOSSES


@pytest.mark.parametrize("name", [*ALGORITHMS, *PREFERENCE_LOSSES])
def test_all_that_is_shipped_passes(name):
    findings = verify(name)
    assert [finding for finding in findings if finding.ok is False] == []
    assert sum(finding.ok is True for finding in findings) >= 4


def test_which_rows_compare_within_a_group():
    """Those for which equal scores have to teach nothing, found by trial."""
    asked = {name for name in ALGORITHMS if dict((f.property, f.ok) for f in verify(name))[ZERO]}
    assert {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"} <= asked
    assert asked.isdisjoint({"ppo", "reinforce", "reinforce++"})


RATIO, ZERO, FINITE, EMPTY, SENSE = (
    "at ratio 1 the gradient is REINFORCE's",
    "equal scores in a group teach nothing",
    "far from the old policy it stays finite",
    "an update without a token is zero",
    "the combination makes sense",
)
DIFFERENCES, SPLIT, HOLES = (
    "the gradient is that of finite differences",
    "any split gives the same loss and gradient",
    "what stands where no token is does not matter",
)
HEAD = """
from dataclasses import replace
import torch
from klimb.objective import GRPO, KL, k1
from klimb.objective.advantage import group_mean
from klimb.objective.surrogate import PerToken
"""
ROWS = {
    "surrogate=lambda logps, old, a, mask: PerToken(-2 * a * logps, torch.zeros_like(mask))": RATIO,
    "surrogate=lambda logps, old, a, mask: PerToken(-a * (logps - old).exp().mean(), mask)": SPLIT,
    "surrogate=lambda logps, old, a, mask: PerToken(-a * (logps - old).exp(), mask)": FINITE,
    "advantage=lambda rewards: group_mean(rewards) + 1e-9": ZERO,
    "aggregate=lambda loss, mask, totals: loss.sum() / totals.tokens": EMPTY,
    "aggregate=lambda loss, mask, totals: torch.where(mask, loss, 0.0).mean()": SPLIT,
    "kl=KL('loss', k1, 0.1)": SENSE,
    "surrogate=lambda logps, old, a, mask: 1 / 0": RATIO,
}


@pytest.mark.parametrize(("change", "property"), ROWS.items())
def test_a_row_with_a_mistake(change, property, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}\nMINE = replace(GRPO, name='mine', {change})\n")
    findings = verify(f"{file}:MINE")
    assert property in [finding.property for finding in findings if finding.ok is False]


LOSSES = {
    "lambda pairs: -(pairs.margin() / pairs.margin().mean()).sigmoid().log()": SPLIT,
    "lambda pairs: pairs.margin()": "a pair in the wrong order is put right",
    "lambda pairs: (-pairs.margin()).exp()": "far from the reference it stays finite",
    "lambda pairs: -(pairs.chosen.logps - pairs.rejected.logps).sum(1)": HOLES,
}


@pytest.mark.parametrize(("loss", "property"), LOSSES.items())
def test_a_loss_with_a_mistake(loss, property, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"import torch\nMINE = {loss}\n")
    failed = [finding.property for finding in verify(f"{file}:MINE") if finding.ok is False]
    assert property in failed


def test_a_gradient_that_is_not_of_its_loss(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"""{HEAD}
class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1).exp()

    @staticmethod
    def backward(ctx, gradient):
        return gradient

def surrogate(logps, old, a, mask):
    return PerToken(-a * Wrong.apply(logps - old), torch.zeros_like(mask))

MINE = replace(GRPO, name="mine", surrogate=surrogate)
""")
    assert [f.property for f in verify(f"{file}:MINE") if f.ok is False] == [DIFFERENCES]


def test_at_the_command_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}\nMINE = replace(GRPO, name='mine')\nBAD = replace(GRPO, kl=KL('loss', k1, 0.1))\nN = 3\n")
    said = klimb("verify", f"{file}:MINE")
    assert said.code == 0
    assert said.out.splitlines()[-1] == f"use it with algorithm={file}:MINE"
    assert {line.split()[0] for line in said.out.splitlines()[:-1]} == {"pass"}
    said = klimb("verify", f"{file}:BAD")
    assert said.code == 1
    assert "FAIL  the combination makes sense: kl.estimator: k1" in said.out
    assert said.out.splitlines()[-1] == f"{file}:BAD: 1 properties do not hold"
    rows = json.loads(klimb("verify", "dpo", "--json").out)
    assert all(row["ok"] is not False for row in rows)
    said = klimb("verify", f"{file}:N")
    assert (said.code, said.out) == (1, "")
    assert "N is int: neither an Algorithm nor a preference loss" in said.err


@dataclass(frozen=True)
class own:
    """R with a shift: not what any group compares."""

    shift: float = 1.0

    def __call__(self, rewards):
        return rewards.returns - self.shift


def test_a_property_that_is_not_asked_says_why(tmp_path):
    row = replace(ALGORITHMS["grpo"], advantage=own())
    from klimb.commands import verify as module

    text = module._zero_variance(row.resolve(max_length=5))
    assert isinstance(text, module.NotAsked)
    assert "does not compare" in text
    assert torch.is_grad_enabled()
