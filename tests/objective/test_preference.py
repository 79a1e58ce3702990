"""Preference losses: each against plain numbers, its known start, its parts, its empty cases, and where it stops."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import by_hand
import pytest
import torch
from torch import Tensor

from klimb.metrics import merge, results
from klimb.objective.preference import (
    PREFERENCE_LOSSES,
    Completions,
    Mixed,
    Needs,
    Pairs,
    known_start,
    needs_of,
    parse_preference,
    preference_loss,
    statistics_of,
)
from klimb.objective.preference.batchwise import aot, aot_unpaired, beta_dpo, wpo
from klimb.objective.preference.divergence import fdpo_alpha
from klimb.objective.preference.likelihood import chosen_nll, cpo, log_odds, orpo, rpo, simpo, tpo, tpo_l
from klimb.objective.preference.margin import (
    cdpo,
    discopop,
    dpo,
    dpo_shift,
    dpop,
    exo,
    hinge,
    ipo,
    ld_dpo,
    robust,
)
from klimb.objective.preference.pointwise import bco, kto, nca, sppo_hard

NAMES = list(PREFERENCE_LOSSES)
LN2 = math.log(2)


def loss_of(name: str) -> Any:
    return parse_preference(name)


def made_up(name: str, seed: int = 0) -> by_hand.World:
    """Ragged completions; for a loss of labels the two heaps differ in size."""
    draw = random.Random(seed)

    def said() -> by_hand.Said:
        logps = [-draw.uniform(0.1, 1.5) for _ in range(draw.randint(1, 5))]
        return by_hand.Said(logps, [a + draw.gauss(0, 0.6) for a in logps], [a - draw.uniform(0, 0.5) for a in logps])

    counts = (3, 5) if needs_of(loss_of(name)).data == "labels" else (4, 4)
    won, lost, gold = ([said() for _ in range(count)] for count in (*counts, 4))
    return by_hand.World(won, lost, gold, [draw.gauss(0.3, 1) for _ in range(6)], {})


def completions(said: list[by_hand.Said]) -> Completions:
    width = max(1, *(each.length for each in said)) if said else 1
    mask = torch.tensor([[i < each.length for i in range(width)] for each in said], dtype=torch.bool).reshape(-1, width)

    def grid(name: str) -> Tensor:
        rows = [[*getattr(each, name), *[0.0] * (width - each.length)] for each in said]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, width)

    return Completions(grid("logps").requires_grad_(), grid("refs"), mask, grid("collisions"))


def pairs_of(world: by_hand.World) -> Pairs:
    sides = [completions(side) for side in (world.won, world.lost, world.gold)]
    return Pairs(*sides, torch.tensor(world.mismatched, dtype=torch.float64))


def with_statistics(loss: Any, pairs: Pairs, state: dict[str, Tensor] | None = None) -> Pairs:
    with torch.no_grad():
        given, _ = statistics_of(loss, pairs, state or {}, 7)
    return replace(pairs, given=given)


def one(loss: Any, chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)) -> tuple[float, float, float]:
    """Loss and its gradients with respect to the two log-ratios, for one pair whose tokens share them evenly."""
    h = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    sides = [
        Completions((x / n).expand(1, n), torch.zeros(1, n, dtype=torch.float64), torch.ones(1, n, dtype=torch.bool))
        for x, n in zip(h, lengths)
    ]
    value = loss(with_statistics(loss, Pairs(*sides))).sum()
    value.backward()
    return value.item(), *(0.0 if x.grad is None else x.grad.item() for x in h)


# Each against plain numbers -----------------------------------------------------------------------------------------


def test_every_loss_is_written_by_hand_too() -> None:
    assert by_hand.LOSSES.keys() == PREFERENCE_LOSSES.keys()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_plain_numbers(name: str, seed: int) -> None:
    """The gradient with respect to every token's log-prob, by central differences of the loss written by hand."""
    loss, world = loss_of(name), made_up(name, seed)
    pairs = with_statistics(loss, pairs_of(world))
    fixed = by_hand.fixed(name, world)
    if name == "beta_dpo":
        kept = [i for i, weight in enumerate(pairs.given["weight"].tolist()) if weight]
        margins = [by_hand.delta(w, r) for w, r in zip(world.won, world.lost)]
        running = 0.1 * sum(margins) / 4  # momentum 0.9, from 0
        seen = sum(margins[i] for i in kept) / len(kept)
        fixed = {"kept": kept, "beta": max(1e-3, 0.1 * (1 + 0.6 * (seen - running)))}
        assert len(kept) == 3  # 80 % of 4
    world = world._replace(fixed=fixed)
    hand = by_hand.LOSSES[name]
    value = loss(pairs).mean()
    assert value.item() == pytest.approx(hand(world), rel=1e-10)
    value.backward()
    for side, heap in (("chosen", world.won), ("rejected", world.lost), ("gold", world.gold)):
        gradient = getattr(pairs, side).logps.grad
        for row, said in enumerate(heap):
            for place in range(said.length):
                slope = 0.0
                for step in (1e-5, -1e-5):
                    moved = [*said.logps[:place], said.logps[place] + step, *said.logps[place + 1 :]]
                    there = [*heap[:row], said._replace(logps=moved), *heap[row + 1 :]]
                    at = {"chosen": "won", "rejected": "lost", "gold": "gold"}[side]
                    slope += hand(world._replace(**{at: there})) / (2 * step)
                found = 0.0 if gradient is None else gradient[row, place].item()
                # Central differences of step 1e-5 err by about 1e-10 of the third derivative; rounding is 1e-11.
                assert found == pytest.approx(slope, rel=1e-5, abs=1e-8), (side, row, place)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_reaches_a_masked_position(name: str) -> None:
    loss, pairs = loss_of(name), pairs_of(made_up(name))
    mended = with_statistics(loss, pairs)
    for side in (pairs.chosen, pairs.rejected, pairs.gold):
        side.logps.data[~side.mask] = torch.nan
        side.ref_logps[~side.mask] = torch.nan
    again = with_statistics(loss, pairs)
    loss(again).sum().backward()
    assert torch.equal(loss(mended), loss(again))
    for side in (pairs.chosen, pairs.rejected, pairs.gold):
        if side.logps.grad is not None:
            assert not side.logps.grad[~side.mask].any()


# Known starts -------------------------------------------------------------------------------------------------------

STARTS = {
    **dict.fromkeys(
        ("dpo", "step_dpo", "cdpo", "robust", "aot", "aot_unpaired", "fdpo_kl", "fdpo_js", "fdpo_alpha", "ld_dpo",
         "dpo_norm", "beta_dpo", "dpo_shift", "dpop", "bco"), LN2,
    ),
    "ipo": 25.0, "ipo_average": 25.0, "hinge": 1.0, "nca": 2 * LN2, "sppo_hard": 50.0, "bco_pair": 2 * LN2,
    "apo_zero": 1.0, "apo_down": 1.0, "kto": 0.5, "discopop": (LN2 + 1) / 2,
    "exo": -LN2 - (math.log(1 - 1e-3) + math.log(1e-3)) / 2,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_policy_that_is_its_reference(name: str) -> None:
    assert known_start(loss_of(name)) == (pytest.approx(STARTS[name]) if name in STARTS else None)
    world = made_up(name)
    world = by_hand.World(
        *([said._replace(refs=said.logps) for said in heap] for heap in world[:3]), mismatched=[0.0], fixed={}
    )
    loss = loss_of(name)
    found = loss(with_statistics(loss, pairs_of(world))).mean().item()
    averages = [sum(said.average for said in heap) / len(heap) for heap in world[:3]]
    weights = [by_hand.weight(w) * by_hand.weight(r) for w, r in zip(world.won, world.lost)]
    known = STARTS | {
        "rpo": LN2 - averages[0], "mpo": 1.2 * LN2 - averages[0], "chosen_nll": -averages[0],
        "wpo": LN2 * sum(weights) / len(weights),
    }  # fmt: skip
    if name in known:
        assert found == pytest.approx(known[name])


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("orpo", 0.5 + 0.1 * LN2), ("cpo", LN2 + 0.5), ("simpo", math.log1p(math.e)),
        ("alphapo", math.log1p(math.exp(0.1))),
        ("tpo", LN2 + 0.25), ("tpo_l", math.log1p(math.exp(0.5)) + 0.25),
    ],
)  # fmt: skip
def test_the_loss_where_both_sides_are_as_likely(name: str, known: float) -> None:
    """Of losses without a reference: log-probs of −0.5 a token, gold of −0.25."""
    same, gold = (by_hand.Said([a, a], [0, 0], [0, 0]) for a in (-0.5, -0.25))
    pairs = pairs_of(by_hand.World([same], [same], [gold], [], {}))
    assert loss_of(name)(pairs).item() == pytest.approx(known)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("chosen_nll", "apo_down", "discopop")])
def test_descent_raises_the_chosen_and_lowers_the_rejected_at_the_start(name: str) -> None:
    """apo_down lowers both, by design; discopop's slope is the wrong way there, by its formula: see its page."""
    if needs_of(loss_of(name)).data == "triples" or not needs_of(loss_of(name)).reference:
        loss, pairs = loss_of(name), pairs_of(made_up(name))
        loss(pairs).sum().backward()
        assert (pairs.chosen.logps.grad <= 0).all()
        assert (pairs.rejected.logps.grad >= 0).all()
        return
    loss = wpo_alone if name == "wpo" else loss_of(name)
    _, chosen, rejected = one(loss, 0.0, 0.0)
    assert chosen < 0 <= rejected
    assert rejected > 0 or name == "hinge"


def wpo_alone(pairs: Pairs) -> Tensor:
    return wpo()(replace(pairs, given={"weight": torch.ones(len(pairs.chosen.mask))}))


def test_discopop_has_its_valley_where_the_paper_says() -> None:
    """arXiv 2406.08414 names optima at Δ = −2.3714 and 1.44012 for β = τ = 0.05."""
    assert one(discopop(0.05, 0.05), -2.3714, 0.0)[1] == pytest.approx(0.0, abs=1e-4)
    assert one(discopop(0.05, 0.05), 1.44012, 0.0)[1] == pytest.approx(0.0, abs=1e-4)
    assert one(discopop(), 0.0, 0.0)[1] == pytest.approx(0.1 * (-0.75 + (1 - LN2) / (4 * 0.05)))


# Parts, and nothing at all ------------------------------------------------------------------------------------------


def part_of(pairs: Pairs, rows: list[int], rejected: list[int] | None = None) -> Pairs:
    def side(whole: Completions, index: list[int]) -> Completions:
        return Completions(*(column[index] for column in (whole.logps, whole.ref_logps, whole.mask, whole.collisions)))

    given = {name: value[rows] if value.ndim else value for name, value in pairs.given.items()}
    gold = side(pairs.gold, rows) if pairs.gold is not None else None
    return Pairs(side(pairs.chosen, rows), side(pairs.rejected, rejected if rejected is not None else rows), gold,
                 None, given)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up(name: str) -> None:
    """With statistics over the whole update, whatever the parts: value, gradient and metrics."""
    loss, world = loss_of(name), made_up(name)
    labels = needs_of(loss).data == "labels"
    units = 8 if labels else 4
    cuts = [([0], [0, 1]), ([], [4, 2]), ([2, 1], [3])] if labels else [([0, 3], None), ([1], None), ([2], None)]
    gradients, found = [], []
    for parts in ([([*range(len(world.won))], [*range(len(world.lost))] if labels else None)], cuts):
        pairs = with_statistics(loss, pairs_of(world))
        values, measured = zip(*(preference_loss(loss, part_of(pairs, *part), units) for part in parts))
        sum(values).backward()
        gradients.append([side.logps.grad for side in (pairs.chosen, pairs.rejected, pairs.gold)])
        found.append(results(merge(measured)) | {"objective": sum(values).item()})
    assert found[0] == pytest.approx(found[1])
    assert found[0]["loss"] == pytest.approx(found[0]["objective"])
    for a, b in zip(*gradients):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["nothing", "one", "without tokens", "one side"])
def test_small_updates_are_finite(name: str, case: str) -> None:
    loss = loss_of(name)
    some, empty = by_hand.Said([-0.5], [-0.7], [-0.6]), by_hand.Said([], [], [])
    if case == "one side" and needs_of(loss).data != "labels":
        return
    won, lost = {
        "nothing": ([], []), "one": ([some], [some]), "without tokens": ([empty], [some]), "one side": ([some], []),
    }[case]  # fmt: skip
    pairs = pairs_of(by_hand.World(won, lost, won, [], {}))
    with torch.no_grad():
        given, state = statistics_of(loss, pairs, {})
        statistics_of(loss, pairs, state)
    value, measured = preference_loss(loss, replace(pairs, given=given), len(won))
    value.backward()
    assert value.isfinite()
    assert all(math.isfinite(x) for x in results(measured).values())
    assert all(tensor.isfinite().all() for tensor in (*given.values(), *state.values()))
    for side in (pairs.chosen, pairs.rejected, pairs.gold):
        assert side.logps.grad is None or side.logps.grad.isfinite().all()
    if case == "nothing":
        assert value.item() == 0.0


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("ipo", "ipo_average", "sppo_hard", "robust")])
def test_large_margins_stay_finite(name: str) -> None:
    for sign in (1.0, -1.0):
        loss = wpo_alone if name == "wpo" else loss_of(name)
        sides = (sign * 3e3, -sign * 3e3) if needs_of(loss_of(name)).reference else (-0.0, -1e3)[:: int(sign)]
        if needs_of(loss_of(name)).data != "triples":
            assert all(math.isfinite(x) for x in one(loss, *sides))


# Where they stop, and what they are elsewhere -----------------------------------------------------------------------


def test_where_each_stops() -> None:
    """cDPO where σ(βΔ) = 1 − ε, IPO at Δ = 1/(2β), hinge at 1/β, NCA at σ(βh_w) = 2/3, DPO nowhere."""
    margin = math.log(0.8 / 0.2) / 0.5
    assert one(cdpo(0.5, 0.2), margin, 0.0)[1] == pytest.approx(0.0, abs=1e-12)
    assert one(ipo(0.25), 2.0, 0.0)[1] == pytest.approx(0.0, abs=1e-12)
    assert one(exo(0.5, 0.2), margin, 0.0)[1] == pytest.approx(0.0, abs=1e-12)
    assert one(hinge(0.5), 2.01, 0.0)[1] == 0.0
    assert one(nca(0.5), math.log(2) / 0.5, 0.0)[1] == pytest.approx(0.0, abs=1e-12)
    assert one(sppo_hard(0.25), 2.0, -2.0)[1:] == pytest.approx((0.0, 0.0))
    assert one(dpo(0.5), 100.0, 0.0)[1] < 0


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_robust_dpo_over_flipped_labels_is_dpo_on_the_clean_ones(epsilon: float) -> None:
    for delta in (-7.0, -0.3, 0.0, 2.0, 40.0):
        right, wrong = (one(robust(0.3, epsilon), *pair) for pair in ((delta, 0.0), (0.0, delta)))
        clean = one(dpo(0.3), delta, 0.0)
        assert (1 - epsilon) * right[0] + epsilon * wrong[0] == pytest.approx(clean[0])
        assert (1 - epsilon) * right[1] + epsilon * wrong[2] == pytest.approx(clean[1])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1.5), (3.0, 1.0)])
def test_kto_has_no_finite_optimum(weights: tuple[float, float]) -> None:
    """A completion that is desirable in a share p of its rows rises for ever where p > λ_U/(λ_D + λ_U), else it falls:
    σ' is even, so both labels pull with the same strength wherever the completion stands."""
    loss = kto(0.5, *weights)
    threshold = weights[1] / sum(weights)

    def slope(h: float, share: float) -> float:
        given = {"baseline": torch.tensor(0.7, dtype=torch.float64)}
        x = torch.tensor([[h]], dtype=torch.float64, requires_grad=True)
        side = Completions(x, torch.zeros_like(x), torch.ones(1, 1, dtype=torch.bool))
        up, down = loss(Pairs(side, side, given=given))
        (share * up + (1 - share) * down).backward()
        return x.grad.item()

    for h in (-30.0, -1.0, 0.7, 2.0, 30.0):
        assert slope(h, threshold + 0.01) < 0 < slope(h, threshold - 0.01)
        assert slope(h, threshold) == pytest.approx(0.0, abs=1e-12)


def test_kto_drives_two_answers_apart_without_end() -> None:
    """π over two answers, one always desirable, one never: the log-odds pass every bound that IPO keeps."""

    def height(loss: Any, steps: int, rate: float = 2.0) -> float:
        z = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            h = z.log_softmax(0) + LN2
            sides = [Completions(x.reshape(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)) for x in h]
            value = loss(Pairs(*sides, given={"baseline": torch.zeros(())})).sum()
            (gradient,) = torch.autograd.grad(value, z)
            z = (z - rate * gradient).detach().requires_grad_()
        return (z[0] - z[1]).item()

    heights = [height(kto(1.0), steps) for steps in (100, 1000, 10_000)]
    # dz/dt ~ e^(−z): the log-odds grow with the logarithm of time, by ln 10 for ten times the steps.
    assert heights[2] - heights[1] == pytest.approx(math.log(10), rel=0.1)
    assert heights[1] > heights[0] + 1.5
    assert height(ipo(0.25), 1000, rate=0.1) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "other"),
    [
        (cdpo(0.3, 0.0), dpo(0.3)), (robust(0.3, 0.0), dpo(0.3)), (dpo_shift(0.3, 1.0), dpo(0.3)),
        (dpop(0.3, 0.0), dpo(0.3)), (ld_dpo(0.3, 1.0), dpo(0.3)), (fdpo_alpha(0.3, 1.0), dpo(0.3)),
        (fdpo_alpha(0.1, 0.0), parse_preference("fdpo_kl")), (aot(0.3), dpo(0.3)), (aot_unpaired(0.3), dpo(0.3)),
        (beta_dpo(0.3, gain=0.0, keep=1.0), dpo(0.3)), (rpo(0.3, 0.0), dpo(0.3)), (orpo(0.0), chosen_nll()),
        (Mixed(((1.0, ipo()),)), ipo()),
    ],
)  # fmt: skip
def test_where_one_is_another(loss: Any, other: Any) -> None:
    """One pair of completions of two and three tokens."""
    for sides in ((-1.0, -2.5), (-3.0, -0.2)):
        assert one(loss, *sides, (2, 3)) == pytest.approx(one(other, *sides, (2, 3)))


def test_dpop_fines_a_chosen_that_falls() -> None:
    assert one(dpop(), 0.1, -1.0) == pytest.approx(one(dpo(0.3), 0.1, -1.0))
    assert one(dpop(), -0.1, -1.0)[1] == pytest.approx(51 * one(dpop(), -0.1, -1.0)[2] * -1)


def test_the_odds_of_a_certain_completion_are_bounded() -> None:
    assert log_odds(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(math.log((1 - 1e-6) / 1e-6))


def test_labels_may_weigh_little_or_nothing() -> None:
    assert kto(0.1, 0.5, 0.0).undesirable == 0.0


def test_tpo_of_the_chosen_as_gold_is_cpo() -> None:
    pairs = pairs_of(made_up("tpo"))
    same = replace(pairs, gold=pairs.chosen)
    assert torch.allclose(tpo(0.1)(same), cpo(0.1)(pairs))
    assert torch.allclose(tpo_l(2.0, 0.0, 1.0)(same), simpo()(pairs))


# What is remembered -------------------------------------------------------------------------------------------------


def test_bco_shifts_by_the_mean_over_the_updates() -> None:
    state: dict[str, Tensor] = {}
    shifts = []
    for seed in range(3):
        world = made_up("bco", seed)
        shifts.append(by_hand.fixed("bco", world)["shift"])
        given, state = statistics_of(bco(), pairs_of(world), state)
        assert given["shift"].item() == pytest.approx(sum(shifts) / len(shifts))
    assert torch.equal(state["shift"], given["shift"])


def test_beta_dpo_follows_the_margins_and_leaves_out_the_unusual() -> None:
    margins = [1.0] * 9 + [50.0]
    side = lambda values: Completions(  # noqa: E731
        torch.tensor(values, dtype=torch.float64)[:, None], torch.zeros(10, 1), torch.ones(10, 1, dtype=torch.bool)
    )
    pairs = Pairs(side(margins), side([0.0] * 10))
    state = {"mean": torch.tensor(1.0), "spread": torch.tensor(0.5)}
    kept = torch.stack([statistics_of(beta_dpo(), pairs, state, seed)[0]["weight"] for seed in range(50)])
    assert (kept[:, 9] == 0).all()  # 24 standard deviations away
    assert (kept.sum(dim=1) == 10).all()
    assert ((kept > 0).sum(dim=1) == 8).all()
    assert (kept[:, :9] > 0).double().mean(dim=0).min() > 0.7  # 8 of 9, by lot
    given, after = statistics_of(beta_dpo(), pairs, state, 0)
    assert after["mean"].item() == pytest.approx(0.9 + 0.1 * 5.9)
    assert after["spread"].item() == pytest.approx(0.45 + 0.1 * torch.tensor(margins).std().item())
    assert given["beta"].item() == pytest.approx(0.1 * (1 + 0.6 * (1.0 - after["mean"].item())))
    assert torch.equal(statistics_of(beta_dpo(), pairs, state, 3)[0]["weight"], kept[3])
    far = {"mean": torch.tensor(100.0), "spread": torch.tensor(0.5)}
    assert statistics_of(beta_dpo(), pairs, far)[0]["beta"].item() == pytest.approx(1e-3)


def of_margins(margins: list[float]) -> Pairs:
    values = torch.tensor(margins, dtype=torch.float64)[:, None]
    mask = torch.ones_like(values, dtype=torch.bool)
    return Pairs(*(Completions(side, torch.zeros_like(side), mask) for side in (values, torch.zeros_like(values))))


def test_beta_dpo_draws_the_pairs_by_the_normal_density_of_their_margins() -> None:
    """One of three is kept. M = 0.9 · 1 + 0.1 · 4/3, σ = 0.9 · 1 + 0.1 · std, over 3,000 seeds."""
    margins = [0.0, 3.0, 1.0]
    pairs, state = of_margins(margins), {"mean": torch.tensor(1.0), "spread": torch.tensor(1.0)}
    loss = beta_dpo(keep=0.34)
    kept = sum(statistics_of(loss, pairs, state, seed)[0]["weight"] / 3 for seed in range(3000))
    mean, spread = 0.9 + 0.1 * 4 / 3, 0.9 + 0.1 * torch.tensor(margins).std().item()
    density = [math.exp(-0.5 * ((margin - mean) / spread) ** 2) for margin in margins]
    expected = [3000 * each / sum(density) for each in density]
    assert sum((a - b) ** 2 / b for a, b in zip(kept.tolist(), expected)) < 13.8  # χ², two degrees, p = 0.001


def test_beta_dpo_at_its_start_and_with_few_pairs() -> None:
    alike = [statistics_of(beta_dpo(), of_margins([0.0] * 5), {}, seed)[0]["weight"] for seed in range(200)]
    assert (torch.stack(alike) > 0).double().mean(dim=0).min() > 0.7  # four of five, by lot: nothing sets them apart
    assert (statistics_of(beta_dpo(keep=0.2), of_margins([1.0, 2.0, 3.0, 4.0]), {})[0]["weight"] > 0).sum() == 1
    after = statistics_of(beta_dpo(), of_margins([1.0, 4.0]), {})[1]
    assert after["spread"].item() == pytest.approx(0.1 * 3 / math.sqrt(2))


def test_a_baseline_below_the_reference_is_none() -> None:
    pairs = replace(pairs_of(made_up("kto")), mismatched=torch.tensor([-3.0, 1.0]))
    assert statistics_of(kto(), pairs, {})[0]["baseline"].item() == 0.0
    pairs = replace(pairs, mismatched=torch.tensor([3.0, -1.0]))
    assert statistics_of(kto(), pairs, {})[0]["baseline"].item() == 1.0


def test_a_mixture_needs_what_any_of_its_parts_needs() -> None:
    assert Mixed(((1.0, dpo()),)).needs == needs_of(dpo())
    assert Mixed(((1.0, dpo()), (1.0, wpo()))).needs == Needs(collisions=True)
    assert Mixed(((1.0, simpo()), (1.0, dpo()))).needs == Needs()


def test_a_mixture_keeps_the_state_of_each_part() -> None:
    mixed = Mixed(((0.5, bco(0.1)), (2.0, bco(0.4)), (1.0, kto())))
    assert mixed.needs == Needs(data="labels", mismatched=True)
    pairs = pairs_of(made_up("bco"))
    given, state = statistics_of(mixed, pairs, {})
    alone = [statistics_of(loss, pairs, {}) for _, loss in mixed.parts]
    assert state.keys() == {"0.shift", "0.updates", "1.shift", "1.updates"}
    assert state["1.shift"] == alone[1][1]["shift"] != state["0.shift"]
    expected = sum(w * loss(replace(pairs, given=found[0])) for (w, loss), found in zip(mixed.parts, alone))
    assert torch.allclose(mixed(replace(pairs, given=given)), expected)
