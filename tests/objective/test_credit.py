"""From scores to advantages: where rewards land, what counts, what is refused."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from klimb.metrics import results
from klimb.objective import GRPO, KL, NO_KL, PPO, REINFORCE, RLOO, assign_credit, k1, k3
from klimb.objective.advantage import discounted_return, gae, group_zscore, no_baseline
from klimb.objective.algorithms import DRO
from klimb.objective.sampling import extremes, leave_out, length_penalty, power_weights, soft_overlong

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
GROUP = torch.tensor([0, 0, 0, 1, 1])
SCORES = torch.tensor([1.0, -2.0, 50.0, 3.0, 0.5], dtype=torch.float64)
PRESENT = [0, 1, 3, 4]


def inputs(seed=0):
    """Log-probs with NaN wherever there is no token."""
    generator = torch.Generator().manual_seed(seed)
    names = ("logps", "ref_logps", "values")
    drawn = torch.randn(3, *MASK.shape, generator=generator)
    return {name: torch.where(MASK, part, torch.nan) for name, part in zip(names, drawn)}


def credit(algorithm, **changes):
    given = {"scores": SCORES, "mask": MASK, "group": GROUP, **inputs(), **changes}
    return assign_credit(algorithm, **given)


RETURNS_TO_GO = replace(REINFORCE, advantage=discounted_return(1.0), kl=KL("reward", k1, 0.5))


def test_the_score_lands_on_the_last_token_and_the_kl_on_each():
    x = inputs()["logps"].double() - inputs()["ref_logps"].double()
    found = credit(RETURNS_TO_GO).advantages
    for row in PRESENT:
        length = int(MASK[row].sum())
        for t in range(length):
            assert found[row, t].item() == pytest.approx(SCORES[row].item() - 0.5 * x[row, t:length].sum().item())


def test_the_estimator_of_the_leash_is_the_one_in_the_reward():
    x = (inputs()["logps"].double() - inputs()["ref_logps"].double())[1, 0].item()
    found = credit(replace(RETURNS_TO_GO, kl=KL("reward", k3, 0.5))).advantages
    assert found[1, 0].item() == pytest.approx(-2.0 - 0.5 * (math.exp(-x) - 1 + x))


def test_a_kl_in_the_loss_stays_out_of_the_reward():
    assert credit(replace(RETURNS_TO_GO, kl=KL("loss", k3, 0.5))).advantages[1, 0] == -2.0


def test_an_outcome_reaches_every_token_of_its_sample_alone():
    found = credit(replace(REINFORCE, advantage=no_baseline, kl=GRPO.kl)).advantages
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.where(MASK, SCORES[:, None], 0.0)[:].index_fill(0, torch.tensor([2]), 0.0))


@pytest.mark.parametrize("algorithm", [REINFORCE, RLOO, GRPO, PPO])
def test_a_sample_without_policy_tokens_takes_part_in_nothing(algorithm):
    """Its score of 50 would shift every baseline."""
    given = {"scores": SCORES, "mask": MASK, "group": GROUP, **inputs()}
    alone = assign_credit(algorithm, **{name: part[PRESENT] for name, part in given.items()})
    found = credit(algorithm)
    assert torch.equal(found.advantages[PRESENT], alone.advantages)
    assert (found.advantages[2] == 0).all()
    assert results(found.metrics) == results(alone.metrics)
    assert found.advantages.isfinite().all()


def test_an_update_without_any_policy_token():
    found = credit(GRPO, mask=torch.zeros_like(MASK))
    assert (found.advantages == 0).all()
    assert (found.returns == 0).all()
    assert credit(GRPO, mask=torch.zeros_like(MASK), values=None).returns is None


def test_an_update_of_one_sample_that_has_tokens():
    found = credit(replace(REINFORCE, advantage=no_baseline, kl=NO_KL), mask=MASK & (torch.arange(5) == 1)[:, None])
    assert found.advantages.nonzero().tolist() == [[1, 0]]
    assert found.advantages[1, 0] == -2.0


def test_an_estimator_that_is_not_zero_at_zero_counts_where_there_are_tokens():
    x = inputs()["logps"].double() - inputs()["ref_logps"].double()
    found = credit(replace(RETURNS_TO_GO, kl=KL("reward", lambda x: x + 1, 0.5))).advantages
    assert found[3, 0].item() == pytest.approx(3.0 - 0.5 * (x[3, :2].sum().item() + 2))


def test_the_critics_targets_are_advantage_plus_value_before_whitening():
    given = inputs()
    found = credit(PPO)
    raw = credit(replace(PPO, normalise=None))
    expected = torch.where(MASK, raw.advantages + given["values"].double(), 0.0)
    assert torch.allclose(found.returns[PRESENT], expected[PRESENT])
    tokens = found.advantages[MASK]
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert tokens.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert credit(GRPO, values=None).returns is None


def test_the_critic_may_learn_at_a_lambda_of_its_own():
    """At λ = 1 the targets are the rewards to go, whatever λ the policy's advantage has."""
    row = replace(PPO, advantage=gae(1.0, 0.3), critic=replace(PPO.critic, lam=1.0))
    assert torch.allclose(credit(row).returns, credit(replace(PPO, advantage=gae(1.0, 1.0))).returns)
    assert torch.equal(credit(row).advantages, credit(replace(PPO, advantage=gae(1.0, 0.3))).advantages)


def test_the_value_of_a_prompt_learns_the_score_less_the_leash():
    x = torch.where(MASK, inputs()["logps"].double() - inputs()["ref_logps"].double(), 0.0).sum(dim=1)
    found = credit(replace(DRO, kl=replace(DRO.kl, beta=0.5)))
    for row in PRESENT:
        value = inputs()["values"][row, 0].item()
        assert found.advantages[row, 0].item() == pytest.approx(SCORES[row].item() - value)
        assert found.returns[row, 0].item() == pytest.approx(SCORES[row].item() - 0.5 * x[row].item())
    elsewhere = credit(replace(DRO, kl=KL("loss", k3, 0.5)))  # no regression, no leash in what V learns
    assert elsewhere.returns[PRESENT, 0].tolist() == pytest.approx(SCORES[PRESENT].tolist())


def test_weights_of_samples():
    weights = power_weights(2.0)(torch.tensor([1.0, -2.0, 0.0, 1.0]))
    assert weights.tolist() == pytest.approx([4 / 6, 16 / 6, 0.0, 4 / 6])
    assert extremes(torch.tensor([3.0, -1.0, 0.0, 3.0])).tolist() == pytest.approx([4 / 3, 4 / 3, 0.0, 4 / 3])
    assert power_weights()(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_interrupted_samples_need_no_score():
    interrupted = torch.tensor([True, False, False, False, False])
    scores = torch.where(interrupted, torch.nan, SCORES)
    found = credit(PPO, scores=scores, interrupted=interrupted)
    assert found.advantages.isfinite().all()
    assert results(found.metrics)["reward/mean"] == pytest.approx((-2 + 3 + 0.5) / 3)
    with pytest.raises(ValueError, match="gae"):
        credit(GRPO, scores=scores, interrupted=interrupted)
    nobody = results(credit(PPO, scores=scores, interrupted=torch.ones(5, dtype=torch.bool)).metrics)
    assert (nobody["reward/mean"], nobody["reward/std"]) == (0.0, 0.0)


def test_an_interrupted_sample_has_nothing_for_its_score():
    """Seen by an advantage that is the sum of the rewards; the others keep theirs."""

    def outcome(rewards):
        return rewards.returns

    outcome.needs_values = True
    interrupted = torch.tensor([True, False, False, False, False])
    found = credit(replace(REINFORCE, advantage=outcome, kl=NO_KL), interrupted=interrupted).advantages
    assert found[PRESENT, 0].tolist() == [0.0, -2.0, 3.0, 0.5]


def test_an_interrupted_sample_is_not_weighed_and_does_not_weigh():
    interrupted = torch.tensor([True, False, False, False, False])
    holed = torch.where(interrupted, torch.nan, SCORES)
    row = replace(PPO, advantage=gae(1.0, 1.0), kl=NO_KL, normalise=None)
    plain, weighed = (
        credit(replace(row, weighting=weighting), scores=holed, interrupted=interrupted).advantages
        for weighting in (None, power_weights(1.0))
    )
    scored = [i for i in PRESENT if not interrupted[i]]
    weights = SCORES[scored].double().abs() / SCORES[scored].double().abs().mean()
    assert torch.allclose(weighed[scored], plain[scored] * weights[:, None])
    assert torch.equal(weighed[interrupted], plain[interrupted])


def test_what_is_paid_where_no_token_is_is_not_paid():
    paid = torch.where(MASK, 0.25, 0.0).double()
    junk = torch.where(MASK, paid, torch.nan)
    row = replace(REINFORCE, advantage=discounted_return(0.5), kl=NO_KL)
    plain, holed = (credit(row, step_rewards=each).advantages for each in (paid, junk))
    assert torch.equal(plain[MASK], holed[MASK])
    for i in PRESENT:  # the last token has what is left of the score
        length = int(MASK[i].sum())
        assert holed[i, length - 1].item() == pytest.approx(SCORES[i].item() - 0.25 * (length - 1))


def test_a_value_of_the_prompt_alone_cannot_stand_in_for_a_score():
    interrupted = torch.tensor([True, False, False, False, False])
    with pytest.raises(ValueError, match="only values can stand in"):
        credit(DRO, interrupted=interrupted)


def test_what_is_reported():
    x = torch.where(MASK, inputs()["logps"].double() - inputs()["ref_logps"].double(), 0.0)
    equal = SCORES.clone()
    equal[3:] = 1.25
    found = results(credit(GRPO, scores=equal).metrics)
    assert found["reward/mean"] == pytest.approx((1 - 2 + 1.25 + 1.25) / 4)
    assert found["groups/no_variance"] == 0.5
    r, a = [1.0, -2.0, 1.25, 1.25], credit(GRPO, scores=equal).advantages[MASK].tolist()
    assert found["reward/std"] == pytest.approx(statistics.pstdev(r))
    assert found["advantage/std"] == pytest.approx(statistics.pstdev(a))
    flat = torch.tensor([1.0, 1.0, 0.0, 3.0, 0.5])
    assert results(credit(GRPO, scores=flat, group=torch.tensor([0, 0, 0, 1, 2])).metrics)["groups/no_variance"] == 1.0
    assert "groups/no_variance" not in results(credit(GRPO, group=torch.arange(5)).metrics)
    assert found["kl"] == pytest.approx(x.sum().item() / 4)
    assert found["kl_per_token"] == pytest.approx(x.sum().item() / 9)
    assert found["beta"] == 0.04
    perfect = credit(replace(PPO, advantage=gae(1.0, 1.0)))
    same = credit(replace(PPO, advantage=gae(1.0, 1.0)), values=perfect.returns)
    assert results(same.metrics)["critic/explained_variance"] == pytest.approx(1.0)


def test_state_is_returned_and_never_changed_in_place():
    algorithm = replace(REINFORCE, kl=KL("reward", k1, beta=0.5, target=1.0))
    before = {"beta": torch.tensor(0.5, dtype=torch.float64), "mine": torch.tensor(7.0)}
    found = credit(algorithm, state=before)
    assert set(found.state) == {"beta", "baseline", "mine"}
    assert before["beta"] == 0.5
    observed = results(found.metrics)["kl"]
    expected = 0.5 * (1 + 0.1 * max(-0.2, min(0.2, observed - 1)))
    assert found.state["beta"].item() == pytest.approx(expected)
    logps = torch.where(MASK, -1.0, 0.0).double()  # 0.1 nats of each of 9 tokens, of 4 samples
    near = replace(REINFORCE, kl=KL("reward", k1, beta=0.5, target=0.2))
    state = credit(near, logps=logps, ref_logps=logps - 0.1).state
    assert state["beta"].item() == pytest.approx(0.5 * (1 + 0.1 * (0.225 / 0.2 - 1)))
    doubled = credit(replace(algorithm, advantage=discounted_return()), state={"beta": torch.tensor(1.0)})
    assert torch.allclose(doubled.advantages, credit(replace(RETURNS_TO_GO, kl=KL("reward", k1, 1.0))).advantages)


def test_small_differences_of_large_scores_survive():
    """In float32 the two scores are one number."""
    scores = torch.tensor([1e6, 1e6 + 2.0], dtype=torch.float64)
    mask = torch.ones(2, 1, dtype=torch.bool)
    found = assign_credit(
        replace(GRPO, kl=RETURNS_TO_GO.kl, advantage=group_zscore(0.0)),
        scores=scores,
        mask=mask,
        group=torch.zeros(2, dtype=torch.long),
        logps=torch.zeros(2, 1),
        ref_logps=torch.zeros(2, 1),
    )
    assert found.advantages[:, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_a_score_that_is_no_number_is_refused_with_its_row():
    with pytest.raises(ValueError, match="sample 1 is nan"):
        assign_credit(
            GRPO,
            scores=torch.tensor([1.0, torch.nan]),
            mask=MASK[:2],
            group=GROUP[:2],
            **{name: part[:2] for name, part in inputs().items()},
        )


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match="ref_logps"):
        credit(GRPO, ref_logps=None)


def test_overlong_completions_lose_in_a_line():
    shape = soft_overlong(buffer=0.2, max_length=100)
    length = torch.tensor([1, 80, 85, 90, 100, 120])
    assert shape(length).tolist() == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    algorithm = replace(RETURNS_TO_GO, kl=GRPO.kl, overlong=soft_overlong(buffer=0.5, max_length=4))
    # Half of 4 tokens is the buffer: one token costs nothing, three cost half.
    assert credit(algorithm).advantages[:2, 0].tolist() == [0.5, -2.0]
    with pytest.raises(ValueError, match="resolve"):
        credit(replace(algorithm, overlong=soft_overlong()))


def test_a_price_on_length_and_none():
    length = torch.tensor([0, 50, 100])
    assert length_penalty(weight=0.5, max_length=100)(length).tolist() == [0.0, -0.25, -0.5]
    assert leave_out()(length).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="resolve"):
        length_penalty()(length)
    assert replace(GRPO, overlong=length_penalty()).resolve(max_length=9).overlong == length_penalty(0.1, 9)
