"""The composed loss: against loops, over any split, and blind to what is masked."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.metrics import merge, results
from klimb.objective import ALGORITHMS, GRPO, KL, NO_KL, REINFORCE, assign_credit, k2, policy_loss, update_columns
from klimb.objective.aggregate import sequence_sum
from klimb.objective.importance import truncate
from klimb.objective.surrogate import PerToken, clip, product_clip, sequence_clip, tv_mask
from klimb.objective.tokens import clip_cov

SAMPLES, LENGTH = 8, 5
LENGTHS = torch.tensor([5, 1, 3, 0, 4, 2, 5, 3])
MASK = torch.arange(LENGTH)[None, :] < LENGTHS[:, None]
GROUP = torch.arange(SAMPLES) // 4
TOTALS = BatchTotals.of(MASK, GROUP)
TOKENS = ("logps", "old_logps", "behavior_logps", "ref_logps", "entropy", "values", "collisions")

VARIANTS = {name: row.resolve(max_length=LENGTH) for name, row in ALGORITHMS.items()} | {
    "rloo, product clip": replace(ALGORITHMS["rloo"], surrogate=product_clip()),
    "grpo, sequence k2": replace(GRPO, kl=KL("loss", k2, 0.1, level="sequence"), aggregate=sequence_sum(1.0)),
    "grpo, entropy, importance": replace(GRPO, entropy_bonus=0.01, importance=truncate(1.05)),
}


def inputs(dtype=torch.float64, hole=0.0, seed=0):
    """Policies about 0.2 apart, so that many tokens clip; `hole` stands where there is no token."""
    generator = torch.Generator().manual_seed(seed)
    base = -torch.rand(SAMPLES, LENGTH, generator=generator, dtype=torch.float64) - 0.5
    drawn = {name: base + 0.2 * torch.randn(base.shape, generator=generator, dtype=torch.float64) for name in TOKENS}
    tokens = {name: torch.where(MASK, part, hole).to(dtype) for name, part in drawn.items()}
    p = tokens["behavior_logps"].exp()  # Σ_v π² is that of this token and a share of what the others could be at most
    tokens["collisions"] = p.square() + tokens["collisions"].exp() * (1 - p).square()
    tokens["scores"] = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    tokens["parts"] = torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64)
    tokens["part_weights"] = torch.tensor([1.0, 0.5], dtype=torch.float64)
    tokens["baseline"] = torch.tensor([0.3, -0.2], dtype=torch.float64)[GROUP]
    return tokens


def advantages_of(algorithm, given):
    names = ("scores", "ref_logps", "values", "parts", "part_weights", "baseline", "collisions")
    parts = {name: given[name] for name in names}
    return assign_credit(algorithm, mask=MASK, group=GROUP, logps=given["behavior_logps"], **parts).advantages


def columns_of(algorithm, given, advantages):
    """What is decided over the whole update."""
    names = ("logps", "old_logps", "behavior_logps", "scores", "entropy")
    tokens = {name: given[name] for name in names}
    return update_columns(algorithm, advantages=advantages, mask=MASK, seed=3, **tokens)


def loss_and_gradient(algorithm, given, parts):
    """The loss computed part by part, as micro-batches do."""
    logps = given["logps"].clone().requires_grad_()
    advantages = advantages_of(algorithm, given)
    columns = columns_of(algorithm, given, advantages)
    losses, found = [], []
    for part in parts:
        loss, part_metrics = policy_loss(
            algorithm,
            logps=logps[part],
            advantages=advantages[part],
            mask=MASK[part],
            totals=TOTALS,
            **{name: given[name][part] for name in ("old_logps", "behavior_logps", "ref_logps", "entropy")},
            **{name: column[part] for name, column in columns.items()},
        )
        loss.backward()
        losses.append(loss.detach())
        found.append(part_metrics)
    return sum(losses), logps.grad, results(merge(found))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_any_split_gives_the_same_loss_gradient_and_metrics(name, dtype, tolerance):
    """The bounds are the project's promise; row 3 is fully masked, and is a part of its own."""
    algorithm, given = VARIANTS[name], inputs(dtype)
    loss, gradient, found = loss_and_gradient(algorithm, given, [list(range(SAMPLES))])
    assert gradient.norm() > 0
    for parts in (
        [[0, 1, 2], [3], [4, 5, 6, 7]],
        [[i] for i in range(SAMPLES)],
        [[6, 1], [3, 0, 7, 4], [2, 5]],
    ):
        split_loss, split_gradient, split_found = loss_and_gradient(algorithm, given, parts)
        assert abs(split_loss - loss) <= tolerance * max(1.0, abs(loss))
        assert (split_gradient - gradient).norm() <= tolerance * gradient.norm()
        assert split_found == pytest.approx(found, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_where_no_token_is_does_not_matter(name):
    algorithm = VARIANTS[name]
    everything = [list(range(SAMPLES))]
    clean = loss_and_gradient(algorithm, inputs(), everything)
    holed = loss_and_gradient(algorithm, inputs(hole=torch.nan), everything)
    assert torch.equal(clean[0], holed[0])
    assert torch.equal(clean[1], holed[1])
    assert clean[2] == holed[2]


def grpo_by_loops(given, advantages, low, high, beta, length_of):
    """−1/B Σ_i 1/L_i Σ_t [min(r A, clip(r) A) − β (e^(ref−π) − (ref−π) − 1)], equations 3 and 4."""
    total, clipped = 0.0, 0
    for i in range(SAMPLES):
        for t in range(int(LENGTHS[i])):
            new, old, ref = (given[name][i, t].item() for name in ("logps", "old_logps", "ref_logps"))
            advantage, ratio = advantages[i, t].item(), math.exp(new - old)
            bounded = min(max(ratio, 1 - low), 1 + high)
            clipped += min(ratio * advantage, bounded * advantage) != ratio * advantage
            leash = math.exp(ref - new) - (ref - new) - 1
            total -= (min(ratio * advantage, bounded * advantage) - beta * leash) / length_of(i)
    return total, clipped


@pytest.mark.parametrize(
    ("name", "low", "high", "beta", "length_of"),
    [
        ("grpo", 0.2, 0.2, 0.04, lambda i: 7 * int(LENGTHS[i])),  # 7 samples have tokens
        ("dr_grpo", 0.2, 0.2, 0.0, lambda i: 7 * LENGTH),
        ("dapo", 0.2, 0.28, 0.0, lambda i: int(LENGTHS.sum())),
    ],
)
def test_the_grpo_family_by_loops(name, low, high, beta, length_of):
    given = inputs()
    advantages = advantages_of(VARIANTS[name], given)
    expected, clipped = grpo_by_loops(given, advantages, low, high, beta, length_of)
    loss, _, found = loss_and_gradient(VARIANTS[name], given, [list(range(SAMPLES))])
    assert loss.item() == pytest.approx(expected)
    assert found["clip_fraction"] == pytest.approx(clipped / int(LENGTHS.sum()))
    assert 0.1 < found["clip_fraction"] < 0.6


def test_without_old_logps_every_ratio_is_exactly_one():
    given = inputs(torch.float32)
    common = {"advantages": advantages_of(GRPO, given), "mask": MASK, "totals": TOTALS}
    logps = given["logps"].requires_grad_()
    _, found = policy_loss(GRPO, logps=logps, ref_logps=given["ref_logps"], **common)
    assert results(found)["ratio/max"] == 1.0
    assert results(found)["approx_kl"] == 0.0
    assert results(found)["clip_fraction"] == 0.0


def test_without_old_logps_the_gradient_is_that_of_the_first_update():
    given = inputs()
    common = {"advantages": advantages_of(GRPO, given), "mask": MASK, "totals": TOTALS, "ref_logps": given["ref_logps"]}
    gradients = []
    for old in (None, given["logps"].clone()):
        logps = given["logps"].clone().requires_grad_()
        loss, _ = policy_loss(GRPO, logps=logps, old_logps=old, **common)
        gradients.append(torch.autograd.grad(loss, logps)[0])
    assert torch.equal(*gradients)


def test_what_is_reported():
    given, name = inputs(), VARIANTS["grpo"]
    loss, _, found = loss_and_gradient(name, given, [list(range(SAMPLES))])
    without, _, _ = loss_and_gradient(replace(name, kl=NO_KL), given, [list(range(SAMPLES))])
    moved = (given["logps"] - given["old_logps"])[MASK].tolist()
    assert found["loss"] == pytest.approx(loss.item())
    assert found["loss/kl"] == pytest.approx((loss - without).item())
    assert found["ratio/max"] == pytest.approx(math.exp(max(moved)))
    # E[r log r] of samples of the old policy would be the KL; r − 1 − log r is never below zero.
    assert found["approx_kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in moved) / len(moved))
    vapo = VARIANTS["vapo"]
    whole, _, parts = loss_and_gradient(vapo, given, [list(range(SAMPLES))])
    alone, _, _ = loss_and_gradient(replace(vapo, imitation=None), given, [list(range(SAMPLES))])
    assert parts["loss/imitation"] == pytest.approx((whole - alone).item())


def test_a_weight_is_not_differentiated_and_knows_the_mask():
    def by_now(log_weight, mask, advantages):
        return log_weight.exp() * mask

    by_now.of_current = True
    given = inputs()
    row = replace(REINFORCE, importance=by_now)
    advantages = advantages_of(row, given)
    loss, gradient, _ = loss_and_gradient(row, given, [list(range(SAMPLES))])
    weight = (given["logps"] - given["behavior_logps"]).exp()
    expected = torch.where(MASK, -advantages * weight / 7, 0.0)
    assert torch.allclose(gradient, expected)
    assert loss.item() == pytest.approx((expected * given["logps"])[MASK].sum().item())


@pytest.mark.parametrize(("surrogate", "anchor"), [(clip(0.1, 0.15), "old_logps"), (tv_mask(0.03), "behavior_logps")])
def test_a_filter_knows_what_the_surrogate_lets_go(surrogate, anchor):
    """Clip-Cov over the whole range leaves out all that is not clipped yet."""
    given = inputs(hole=torch.nan)
    row = replace(GRPO, surrogate=surrogate, token_filter=clip_cov(share=1.0, low=-1e9, high=1e9))
    advantages = advantages_of(row, given)
    new, old = given["logps"], given[anchor]
    if anchor == "old_logps":
        r = (new - old).exp()
        clipped = ((advantages > 0) & (r > 1.15)) | ((advantages < 0) & (r < 0.9))
    else:
        away = new.exp() - old.exp()
        clipped = ((advantages > 0) & (away > 0.2)) | ((advantages < 0) & (away < -0.03))
    kept = columns_of(row, given, advantages)["kept"]
    assert torch.equal(kept, MASK & clipped)
    assert 0 < int(kept.sum()) < int(MASK.sum())


def test_a_filter_is_given_the_mask_that_ratios_of_sequences_are_made_with():
    given = inputs()
    row = replace(GRPO, surrogate=sequence_clip(0.05, 0.05), token_filter=clip_cov(share=1.0, low=-1e9, high=1e9))
    advantages = advantages_of(row, given)
    gap = torch.where(MASK, given["logps"] - given["old_logps"], 0.0)
    s = (gap.sum(dim=1) / LENGTHS.clamp(min=1)).exp()[:, None]
    clipped = ((advantages > 0) & (s > 1.05)) | ((advantages < 0) & (s < 0.95))
    kept = columns_of(row, given, advantages)["kept"]
    assert torch.equal(kept, MASK & clipped)
    assert 0 < int(kept.sum()) < int(MASK.sum())


class Summing:
    """Functions of one's own that add up over a sample and never look at the mask."""

    anchor = "old"

    def __init__(self, anchor="old"):
        self.anchor = anchor

    def __call__(self, logps, old_logps, advantages, mask):
        whole = ((logps - old_logps) * advantages).sum(dim=1, keepdim=True) + advantages.sum(dim=1, keepdim=True)
        return PerToken(whole.expand_as(logps), whole.expand_as(logps) > 0)


def weigh_by_the_whole(log_weight, mask, advantages):
    return (log_weight + 0.1 * advantages).sum(dim=1, keepdim=True).exp().expand_as(log_weight)


def above_the_mean(tokens):
    """Over everything that it is given."""
    return tokens.logps + tokens.behavior_logps + tokens.advantages > tokens.logps.mean() + tokens.advantages.mean()


def kl_of_the_whole(log_ratio):
    return log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)


@pytest.mark.parametrize("anchor", ["old", "behavior"])
def test_what_is_given_to_functions_of_ones_own_is_zero_where_no_token_is(anchor):
    row = replace(
        GRPO, surrogate=Summing(anchor), importance=weigh_by_the_whole if anchor == "old" else None,
        token_filter=above_the_mean, kl=KL("loss", kl_of_the_whole, 0.1),
    )  # fmt: skip
    clean, holed = inputs(), inputs(hole=torch.nan)
    junk = torch.where(MASK, advantages_of(row, clean), torch.nan)
    kept = columns_of(row, holed, junk)["kept"]
    logps, behavior, advantages = clean["logps"], clean["behavior_logps"], advantages_of(row, clean)
    above = logps + behavior + advantages > logps.sum() / MASK.numel() + advantages.sum() / MASK.numel()
    assert torch.equal(kept[MASK], above[MASK])
    found = []
    for given, advantages in ((clean, advantages_of(row, clean)), (holed, junk)):
        logps = given["logps"].clone().requires_grad_()
        others = {name: given[name] for name in ("old_logps", "behavior_logps", "ref_logps")}
        loss, _ = policy_loss(row, logps=logps, advantages=advantages, mask=MASK, totals=TOTALS, kept=kept, **others)
        loss.backward()
        found.append((loss.item(), logps.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_an_imitation_is_masked_too():
    given, holed = inputs(), torch.where(MASK, 0.1, torch.nan).double()
    vapo = VARIANTS["vapo"]
    losses = [
        policy_loss(
            vapo, logps=given["logps"], old_logps=given["old_logps"], advantages=torch.zeros(MASK.shape), mask=MASK,
            totals=TOTALS, imitation=imitation,
        )[0] for imitation in (torch.nan_to_num(holed), holed)
    ]  # fmt: skip
    assert losses[0] == losses[1] != 0


def test_importance_weighs_the_surrogate_and_not_the_leash():
    given = inputs()
    weighed = replace(VARIANTS["grpo"], importance=truncate(1.05))
    advantages = torch.zeros_like(given["logps"])  # nothing but the leash is left
    common = {name: given[name] for name in ("logps", "old_logps", "behavior_logps", "ref_logps")}
    common |= {"advantages": advantages, "mask": MASK, "totals": TOTALS}
    assert policy_loss(weighed, **common)[0] == policy_loss(VARIANTS["grpo"], **common)[0]


def test_an_entropy_bonus_lowers_the_loss_by_its_share():
    given = inputs()
    bonus = replace(REINFORCE, entropy_bonus=0.3)
    plain, _, _ = loss_and_gradient(REINFORCE, given, [list(range(SAMPLES))])
    lowered, _, found = loss_and_gradient(bonus, given, [list(range(SAMPLES))])
    total = given["entropy"][MASK].sum().item()
    assert (plain - lowered).item() == pytest.approx(0.3 * total / 7)
    assert found["entropy"] == pytest.approx(total / int(LENGTHS.sum()))


def test_beta_comes_from_the_state():
    given = inputs()
    common = {name: given[name] for name in ("logps", "old_logps", "ref_logps")}
    common |= {"advantages": torch.zeros_like(given["logps"]), "mask": MASK, "totals": TOTALS}
    usual = policy_loss(GRPO, **common)[0]
    doubled = policy_loss(GRPO, state={"beta": torch.tensor(0.08, dtype=torch.float64)}, **common)[0]
    assert doubled.item() == pytest.approx(2 * usual.item())


@pytest.mark.parametrize(
    ("algorithm", "missing"),
    [
        (GRPO, "ref_logps"),
        (replace(REINFORCE, entropy_bonus=0.1), "entropy"),
        (replace(REINFORCE, importance=truncate()), "behavior_logps"),
    ],
)
def test_a_missing_input_is_named(algorithm, missing):
    given = inputs()
    with pytest.raises(ValueError, match=missing):
        policy_loss(
            algorithm,
            logps=given["logps"],
            advantages=given["logps"],
            mask=MASK,
            totals=TOTALS,
            ref_logps=None,
        )
