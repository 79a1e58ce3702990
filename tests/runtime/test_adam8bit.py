"""8-bit moments against torch's AdamW, whose moments are in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import ragged
from torch import Tensor, nn

from klimb.batch import BatchTotals, TokenBatch
from klimb.metrics import Metrics
from klimb.runtime import adam8bit, checkpoint
from klimb.runtime.adam8bit import BLOCK, SMALLEST, AdamW8bit
from klimb.runtime.learner import Learner, Optimizer

BETAS, EPS, DECAY = (0.9, 0.99), 1e-8, 0.1


def weights(by_column: bool = False) -> list[nn.Parameter]:
    """A matrix with a last block that is not full, one of the smallest size that is quantised, and a bias."""
    torch.manual_seed(0)
    drawn = [torch.randn(90, 77), torch.randn(SMALLEST), torch.randn(50)]
    drawn[0] = drawn[0].t().contiguous().t() if by_column else drawn[0]
    return [nn.Parameter(each) for each in drawn]


def gradients(step: int) -> list[Tensor]:
    """Of very different sizes from row to row, as the rows of an embedding have them."""
    draw = torch.Generator().manual_seed(step)
    sizes = torch.logspace(-4, 0, 90)[:, None]
    return [
        torch.randn(90, 77, generator=draw) * sizes + 0.5 * sizes,
        torch.randn(SMALLEST, generator=draw),
        torch.randn(50, generator=draw),
    ]


def pair(by_column: bool = False) -> tuple[AdamW8bit, torch.optim.AdamW]:
    return (
        AdamW8bit(weights(by_column), lr=0.01, betas=BETAS, eps=EPS, weight_decay=DECAY),
        torch.optim.AdamW(weights(), lr=0.01, betas=BETAS, eps=EPS, weight_decay=DECAY),
    )


def run(optimizer: AdamW8bit | torch.optim.AdamW, steps: int) -> list[Tensor]:
    parameters = optimizer.param_groups[0]["params"]
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("by_column", [False, True])
def test_the_first_step_is_adamws(by_column: bool) -> None:
    """Before it nothing was rounded to 8 bits."""
    ours, theirs = pair(by_column)
    for mine, its in zip(run(ours, 1), run(theirs, 1), strict=True):
        assert torch.allclose(mine, its, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [BLOCK, 4 * BLOCK, 1 << 22])
def test_later_steps_stay_near_adamws(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam8bit, "_CHUNK", chunk)
    ours, theirs = pair()
    start = weights()
    moved = [mine - at for mine, at in zip(run(ours, 60), start, strict=True)]
    expected = [its - at for its, at in zip(run(theirs, 60), start, strict=True)]
    assert torch.allclose(moved[2], expected[2], rtol=1e-4, atol=1e-6)  # a bias is not quantised at all
    for mine, its in zip(moved[:2], expected[:2], strict=True):
        assert (mine - its).norm() < 0.05 * its.norm()  # codes are about 1 % apart at the top, 5 % a decade below


def test_the_second_moment_follows_slow_changes() -> None:
    """After large gradients small ones: 0.999 a step is below half a code, rounding to the nearest would never move."""
    parameter = nn.Parameter(torch.zeros(SMALLEST))
    optimizer = AdamW8bit([parameter], lr=0.0, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0)
    keeper = torch.ones(SMALLEST)
    keeper[::BLOCK] = 10.0  # holds the scale of its block
    for step in range(500):
        parameter.grad = keeper if step == 0 else torch.where(keeper > 1, 10.0, 0.0)
        optimizer.step()
    state = optimizer.state[parameter]
    decayed = adam8bit._read(state, "exp_avg_sq", slice(0, SMALLEST))[keeper == 1]
    assert float(decayed.mean()) == pytest.approx(0.001 * 0.999**499, rel=0.1)  # a mean of 4,080


def test_a_moment_takes_one_byte_and_a_64th() -> None:
    optimizer, _ = pair()
    run(optimizer, 1)
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    assert sum(tensor.nbytes for tensor in state.values()) <= SMALLEST * 2 * (1 + 4 / BLOCK) + 4


def test_a_resumed_learner_with_quantised_moments_goes_on_bit_by_bit(tmp_path: Path) -> None:
    batch = ragged()

    def loss(micro: TokenBatch, totals: BatchTotals, parameters: dict[str, nn.Parameter]) -> tuple[Tensor, Metrics]:
        target = torch.arange(77.0)
        return sum(((p if p.ndim > 1 else p[:77]) - target).square().mean() for p in parameters.values()), {}

    def learner() -> Learner:
        parameters = dict(zip("ab", weights(by_column=True)[:2], strict=True))
        return Learner(parameters, Optimizer(state="8bit"), lr=0.1, total_steps=9, budget=10_000)

    def step(one: Learner) -> None:
        one.step(batch, lambda micro, totals: loss(micro, totals, one.working))

    first = learner()
    for _ in range(3):
        step(first)
    checkpoint.save(tmp_path, 3, {"policy": first.tensors()}, {"steps": first.steps})
    found = checkpoint.load_latest(tmp_path, print)
    assert found is not None
    assert found.tensors["policy"]["adam.exp_avg.a"].dtype == torch.int8
    second = learner()
    second.load(found.tensors["policy"], found.state["steps"])
    for one in (first, second):
        step(one)
        step(one)
    assert first.tensors().keys() == second.tensors().keys()
    assert all(torch.equal(second.tensors()[name], tensor) for name, tensor in first.tensors().items())
