"""The learner on losses whose gradient is known by hand: loss = Σ (w·x − y)² / samples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from families import ragged, tiny
from torch import Tensor, nn

from klimb import metrics
from klimb.batch import BatchTotals, TokenBatch
from klimb.errors import KlimbError
from klimb.metrics import Metrics
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.packing import flat_length
from klimb.runtime import checkpoint
from klimb.runtime.learner import Learner, Loss, NotFinite, Optimizer
from klimb.runtime.loss_scale import GROW_AFTER

WIDTH = 5


def problem(dtype: torch.dtype = torch.float32, paired: bool = False) -> tuple[dict[str, nn.Parameter], TokenBatch]:
    draw = torch.Generator().manual_seed(0)
    weights = {
        "w": nn.Parameter(torch.randn(WIDTH, generator=draw).to(dtype)),
        "b": nn.Parameter(torch.ones(1, dtype=dtype)),
    }
    drawn = ragged(groups=5, samples=2)
    batch = TokenBatch.from_rows(drawn.rows, drawn.group.tolist(), drawn.ids, whole_groups=paired)
    x = torch.randn(len(batch), generator=draw)
    return weights, batch.with_columns(x=x, y=3 * x + 1)


def squares(weights: dict[str, nn.Parameter], batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    """The features of a sample are the powers of its x."""
    features = batch["x"][:, None] ** torch.arange(WIDTH)
    error = features.to(weights["w"].dtype) @ weights["w"] + weights["b"] - batch["y"]
    return error.square().sum() / totals.samples, {"error": metrics.mean(error)}


def learner_of(weights: dict[str, nn.Parameter], budget: int = 10_000, steps: int = 10, **changes: object) -> Learner:
    optimizer = Optimizer(**changes)  # type: ignore[arg-type]
    return Learner(weights, optimizer, lr=0.1, total_steps=steps, budget=budget)


def step(learner: Learner, batch: TokenBatch) -> dict[str, float]:
    return metrics.results(learner.step(batch, lambda micro, totals: squares(learner.working, micro, totals)))


# The step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.5, 1e6, None])
@pytest.mark.parametrize("budget", [10_000, 30])
def test_a_step_is_adamw_on_the_clipped_sum_of_the_gradients(bound: float | None, budget: int) -> None:
    weights, batch = problem()
    own, _ = problem()
    reference = torch.optim.AdamW(own.values(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.02)
    learner = learner_of(weights, budget, max_grad_norm=bound, betas=(0.9, 0.95), weight_decay=0.02)
    for _ in range(3):
        reference.zero_grad()
        squares(own, batch, batch.totals)[0].backward()
        norm = nn.utils.clip_grad_norm_(own.values(), math.inf if bound is None else bound)
        reference.step()
        measured = step(learner, batch)
        assert measured["grad_norm"] == pytest.approx(float(norm), rel=1e-5)  # before clipping
        for name, weight in weights.items():
            assert torch.allclose(weight, own[name], rtol=1e-5, atol=1e-6)


def test_totals_are_those_of_the_whole_batch_in_every_micro_batch() -> None:
    weights, batch = problem()
    seen: list[tuple[int, BatchTotals]] = []

    def loss(micro: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        seen.append((len(micro), totals))
        return squares(weights, micro, totals)

    learner_of(weights, budget=30).step(batch, loss)
    assert len(seen) > 3
    assert sum(size for size, _ in seen) == len(batch)
    assert {totals for _, totals in seen} == {batch.totals}


def test_metrics_of_micro_batches_are_merged_by_weight() -> None:
    weights, batch = problem()
    whole = squares(weights, batch, batch.totals)[1]["error"].result()
    assert step(learner_of(weights, budget=30), batch)["error"] == pytest.approx(whole, rel=1e-5)


def test_a_parameter_that_no_sample_uses_is_left_alone() -> None:
    weights, batch = problem()
    weights["unused"] = nn.Parameter(torch.ones(2))
    learner = learner_of(weights, weight_decay=0.5)
    step(learner, batch)
    assert torch.equal(weights["unused"], torch.ones(2))
    assert not any("unused" in name for name in learner.tensors() if name.startswith("adam."))


# The rate -----------------------------------------------------------------------------------------------------------


def rates(steps: int = 12, **changes: object) -> list[float]:
    learner = learner_of(problem()[0], steps=steps, **changes)
    return [learner.rate(i) / learner.lr for i in range(steps)]


def test_the_rate_warms_up_in_equal_steps_and_stays() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert rates(3) == [1.0, 1.0, 1.0]


def test_the_rate_falls_in_a_line_to_the_share_that_is_left() -> None:
    # 8 steps after the warm-up: 1, 7/8, …, 1/8 of the way, then the end at final_lr
    expected = [0.25, 0.5, 0.75, 1.0, *(0.1 + 0.9 * (1 - k / 8) for k in range(8))]
    assert rates(12, warmup_steps=4, decay="linear", final_lr=0.1) == pytest.approx(expected)


def test_the_rate_falls_as_a_cosine() -> None:
    assert rates(4, decay="cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_the_rate_after_the_end_stays_at_the_end() -> None:
    learner = learner_of(problem()[0], steps=5, decay="linear", final_lr=0.2)
    assert learner.rate(5) == learner.rate(50) == pytest.approx(0.1 * 0.2)


def test_every_step_uses_its_rate() -> None:
    weights, batch = problem()
    learner = learner_of(weights, steps=3, warmup_steps=2)
    assert [step(learner, batch)["lr"] for _ in range(3)] == pytest.approx([0.05, 0.1, 0.1])


# What is not finite -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [10_000, 30])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_is_named_and_nothing_changes(bad: float, budget: int) -> None:
    weights, batch = problem()
    learner = learner_of(weights, budget)
    step(learner, batch)
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    y = batch["y"].clone()
    y[7] = bad
    with pytest.raises(NotFinite, match=r"update 2.*rows row 7;"):
        step(learner, batch.with_columns(y=y))
    assert {name: tensor.tolist() for name, tensor in learner.tensors().items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
    assert learner.steps == 1
    other_weights, _ = problem()
    other = learner_of(other_weights, budget)
    for one in (learner, other, other):
        step(one, batch)
    assert torch.equal(weights["w"], other_weights["w"])  # as if the bad batch had never been


def test_a_row_whose_gradient_alone_is_not_finite_is_named() -> None:
    weights, batch = problem()
    y = torch.ones(len(batch))
    y[4] = 0.0

    def loss(micro: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        return (micro["y"] * weights["w"].sum()).abs().sqrt().sum() / totals.samples, {}

    with pytest.raises(NotFinite, match="rows row 4;"):  # d√z/dz at 0 is infinite, √0 is 0
        learner_of(weights).step(batch.with_columns(y=y), loss)


def test_of_a_pair_both_rows_are_named() -> None:
    weights, batch = problem(paired=True)
    y = batch["y"].clone()
    y[5] = math.nan

    def loss(micro: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        gap = (micro["y"][0::2] - micro["y"][1::2]) * weights["w"].sum()
        return gap.square().sum() / totals.groups, {}

    with pytest.raises(NotFinite, match="rows row 4, row 5;"):
        learner_of(weights).step(batch.with_columns(y=y), loss)


# bfloat16 -----------------------------------------------------------------------------------------------------------


def test_the_working_copy_is_the_master_rounded() -> None:
    weights, batch = problem(torch.bfloat16)
    learner = learner_of(weights)
    for _ in range(5):
        step(learner, batch)
        for name, weight in weights.items():
            assert weight.dtype == torch.bfloat16
            assert learner.masters[name].dtype == torch.float32
            assert torch.equal(weight, learner.masters[name].bfloat16())
            assert weight.grad is None
            assert learner.masters[name].grad is None


def test_updates_far_below_the_resolution_of_bfloat16_add_up() -> None:
    """Beside 1 bfloat16 knows steps of 2⁻⁷; Adam moves by lr = 1e-4 against a gradient that keeps its sign."""
    batch = problem()[1]

    def slope(weight: Tensor, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        return -weight.sum() / totals.samples, {}

    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    learner = Learner({"w": weight}, Optimizer(), lr=1e-4, total_steps=100, budget=10_000)
    for _ in range(100):
        learner.step(batch, lambda micro, totals: slope(weight, totals))
    assert torch.allclose(learner.masters["w"], torch.full((3,), 1 + 100 * 1e-4), rtol=1e-4)
    assert torch.equal(weight, torch.full((3,), 1 + 2**-7, dtype=torch.bfloat16))

    alone = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([alone], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        alone.grad = -torch.ones_like(alone)
        plain.step()
    assert torch.equal(alone, torch.ones_like(alone))  # what would happen without a master


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    """In bfloat16 1 + 0.001 is 1: of a large and many small gradients the small ones would be lost."""
    _, batch = problem()
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    small = torch.full((len(batch),), 0.001)
    small[0] = 1.0
    batch = batch.with_columns(y=small)
    learner = Learner({"w": weight}, Optimizer(max_grad_norm=None), lr=0.1, total_steps=1, budget=1)
    found = learner.step(batch, lambda micro, totals: ((weight * micro["y"].bfloat16()).sum(), {}))
    assert metrics.results(found)["grad_norm"] == pytest.approx(1 + 9 * 0.001, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_that_was_broken_off_leaves_no_gradient_to_the_next(dtype: torch.dtype) -> None:
    """Nor to another learner of the same weights: sums of micro-batches hang on the weights themselves."""
    batch = ragged(groups=5, samples=2)

    def learner_and_policy() -> tuple[Learner, Policy]:
        policy = Policy(Backbone(tiny("llama", dtype=dtype)), None)
        return Learner(policy.trainable(), Optimizer(), lr=0.0, total_steps=9, budget=1), policy

    def norm(learner: Learner, policy: Policy, at_most: int = 100) -> float:
        left = iter(range(at_most))

        def loss(micro: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return policy(micro).logps.sum() / totals.tokens, {}

        return metrics.results(learner.step(batch, loss))["grad_norm"]

    expected = norm(*learner_and_policy())
    learner, policy = learner_and_policy()
    with pytest.raises(KeyboardInterrupt):
        norm(learner, policy, at_most=3)
    another = Learner(policy.trainable(), Optimizer(), lr=0.0, total_steps=9, budget=1)
    assert norm(another, policy) == norm(learner, policy) == expected


# Resume -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_resumed_learner_goes_on_bit_by_bit(dtype: torch.dtype, state: str, tmp_path: Path) -> None:
    changes = {"warmup_steps": 2, "decay": "cosine", "weight_decay": 0.01, "state": state}
    weights, batch = problem(dtype)
    weights["unused"] = nn.Parameter(torch.ones(2, dtype=dtype))
    learner = learner_of(weights, 30, **changes)
    for _ in range(4):
        step(learner, batch)
    checkpoint.save(tmp_path, 4, {"policy": learner.tensors()}, {"steps": learner.steps})

    fresh, _ = problem(dtype)
    fresh["unused"] = nn.Parameter(torch.zeros(2, dtype=dtype))
    resumed = learner_of(fresh, 30, **changes)
    found = checkpoint.load_latest(tmp_path, print)
    assert found is not None
    resumed.load(found.tensors["policy"], found.state["steps"])
    for name, weight in weights.items():
        assert torch.equal(fresh[name], weight)
    for _ in range(4):
        assert step(resumed, batch) == step(learner, batch)
    for name, tensor in learner.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name
    assert all(torch.equal(fresh[name], weight) for name, weight in weights.items())


# Memory -------------------------------------------------------------------------------------------------------------


def never_more_than(most: int, weights: dict[str, nn.Parameter], tried: list[int]) -> Loss:
    """A device that holds the gradients of `most` samples: the error comes in the backward pass, when a part of the
    gradients is there already."""

    def loss(micro: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        tried.append(len(micro))
        value, measured = squares(weights, micro, totals)
        if len(micro) > most:
            value = value + Overflowing.apply(weights["b"]).sum()
        return value, measured

    return loss


class Overflowing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_that_does_not_fit_is_computed_in_smaller_parts_to_the_same_result(
    most: int, dtype: torch.dtype
) -> None:
    weights, batch = problem(dtype)
    own, _ = problem(dtype)
    learner, tried, said = learner_of(weights), list[int](), list[str]()
    learner.say = said.append
    found = metrics.results(learner.step(batch, never_more_than(most, weights, tried)))
    small = learner_of(own, learner.budget)
    assert found == step(small, batch)  # bit by bit what the budget that fits gives
    assert all(torch.equal(weights[name], own[name]) for name in own)
    assert tried[0] == len(batch)
    assert max(tried[-len(batch) // most :]) <= most
    assert said[0].startswith("update 1: ")
    assert "do not fit into the memory of cpu" in said[0]
    tried.clear()
    learner.step(batch, never_more_than(most, weights, tried))
    assert max(tried) <= most  # it does not run into the wall again
    assert int(learner.tensors()["budget"]) == learner.budget < 10_000  # and a resumed run neither


def test_one_sample_that_does_not_fit_is_an_error_that_names_it() -> None:
    weights, batch = problem()
    learner = learner_of(weights)
    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(KlimbError, match=r"^update 1: row \d does not fit into the memory of cpu: \d+ tokens at once"):
        learner.step(batch, never_more_than(0, weights, []))
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_of_a_pair_that_does_not_fit_both_are_named() -> None:
    weights, batch = problem(paired=True)
    with pytest.raises(KlimbError, match=r"row \d and row \d does not fit"):
        learner_of(weights).step(batch, never_more_than(1, weights, []))


def test_a_sample_longer_than_the_budget_is_named_once_and_trained_on() -> None:
    weights, batch = problem()
    lengths = [flat_length(rows) for rows in batch.rows]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    learner, said = learner_of(weights, budget=lengths[longest] - 1), list[str]()
    learner.say = said.append
    step(learner, batch)
    step(learner, batch)
    assert len(said) == 1
    length = lengths[longest]
    assert said[0].startswith(f"token_budget={length - 1}: 1 of ")
    assert f"the longest, {length} tokens (row {longest}), decides how much memory is needed" in said[0]
    assert said[0].endswith(f"with token_budget={length} shorter ones are computed together")
    quiet = learner_of(weights, budget=lengths[longest])
    quiet.say = said.append
    step(quiet, batch)
    assert len(said) == 1


# float16 ------------------------------------------------------------------------------------------------------------


def scaled(weights: dict[str, nn.Parameter], factor: float, budget: int = 30, **changes: object) -> Learner:
    optimizer = Optimizer(**changes)  # type: ignore[arg-type]
    learner = Learner(weights, optimizer, lr=0.1, total_steps=10, budget=budget, scaled=True)
    assert learner.scale is not None
    learner.scale.factor = factor
    return learner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_that_fits_changes_no_bit(dtype: torch.dtype) -> None:
    """It is a power of two, and in these types nothing over- or underflows."""
    (weights, batch), (own, _) = problem(dtype), problem(dtype)
    plain, learner = learner_of(own, 30, max_grad_norm=0.5), scaled(weights, 2.0**16, max_grad_norm=0.5)
    for _ in range(4):
        expected, found = step(plain, batch), step(learner, batch)
        assert {
            key: found[key] for key in expected
        } == expected  # the norm before clipping is that of the true gradient
        assert (found["loss_scale"], found["skipped"]) == (2.0**16, 0.0)
    assert all(torch.equal(weights[name], own[name]) for name in own)


def test_a_gradient_too_small_for_float16_is_not_lost() -> None:
    """1e-9 is zero in float16; times 2¹⁶ it is not."""
    _, batch = problem()

    def loss(micro: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        return (weight.float() * 1e-9).sum() * micro.totals.samples / totals.samples, {}

    norms = []
    for factor in (1.0, 2.0**16):
        weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
        norms.append(metrics.results(scaled({"w": weight}, factor, budget=10_000).step(batch, loss))["grad_norm"])
    assert norms[0] == 0.0
    assert norms[1] == pytest.approx(2e-9, rel=2e-3)  # 6.6e-5 has 10 bits


def test_an_overflow_leaves_the_update_out_and_halves_the_scale() -> None:
    weights, batch = problem(torch.float16)
    learner, said = scaled(weights, 64.0), list[str]()
    learner.say = said.append
    step(learner, batch)
    assert learner.scale is not None
    learner.scale.factor = 2.0**16
    before = {name: tensor.clone() for name, tensor in learner.tensors().items() if name != "loss_scale"}
    large = batch.with_columns(y=batch["y"] * 30)  # gradients of hundreds, times the scale
    found = step(learner, large)
    assert found["skipped"] == 1.0
    assert "grad_norm" not in found
    assert (learner.scale.factor, learner.scale.skipped, learner.steps) == (2.0**15, 1, 2)
    assert all(torch.equal(learner.tensors()[name], tensor) for name, tensor in before.items())
    assert said[-1] == ("update 2: a gradient overflowed in float16, the weights stay as they were; from here on the "
                        "loss scale is 32768 (skipped so far: 1)")  # fmt: skip
    while found["skipped"]:
        found = step(learner, large)
    assert learner.scale.factor < 2.0**15
    assert not torch.equal(learner.masters["w"], before["weights.w"])


def test_what_is_not_finite_whatever_the_scale_is_an_error() -> None:
    weights, batch = problem(torch.float16)
    y = batch["y"].clone()
    y[7] = math.inf
    with pytest.raises(NotFinite, match="rows row 7;"):  # at once: the loss itself is infinite
        step(scaled(weights, 2.0**16), batch.with_columns(y=y))

    def endless(micro: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        return (micro["y"] * weights["w"].float().sum()).abs().sqrt().sum() / totals.samples, {}

    learner, zero = scaled(weights, 2.0), torch.ones(len(batch))
    zero[4] = 0.0
    assert metrics.results(learner.step(batch.with_columns(y=zero), endless))["skipped"] == 1.0
    with pytest.raises(NotFinite, match="rows row 4;"):  # a scale of 1 is none
        learner.step(batch.with_columns(y=zero), endless)


def test_the_scale_grows_after_a_long_time_without_overflow() -> None:
    weights, batch = problem()
    learner = scaled(weights, 4.0)
    assert learner.scale is not None
    learner.scale.fitted = GROW_AFTER - 2
    assert [step(learner, batch)["loss_scale"] for _ in range(4)] == [4.0, 4.0, 8.0, 8.0]


def test_a_resumed_learner_goes_on_with_its_scale(tmp_path: Path) -> None:
    """Through the skipped updates in which the scale is found."""
    large = problem()[1]
    large = large.with_columns(y=large["y"] * 30)
    learner = scaled(problem(torch.float16)[0], 2.0**16)
    assert step(learner, large)["skipped"] == 1.0
    checkpoint.save(tmp_path, 1, {"policy": learner.tensors()}, {"steps": learner.steps})
    found = checkpoint.load_latest(tmp_path, print)
    assert found is not None
    resumed = scaled(problem(torch.float16)[0], 2.0**16)
    resumed.load(found.tensors["policy"], found.state["steps"])
    rows = [(step(resumed, large), step(learner, large)) for _ in range(12)]
    assert all(one == other for one, other in rows)
    assert sum(one["skipped"] for one, _ in rows) > 1
    assert rows[-1][0]["skipped"] == 0.0
    assert resumed.scale == learner.scale
    for name, tensor in learner.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name
