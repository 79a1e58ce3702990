"""Combinations of axes that make no sense, each with the reason and the way out."""

from __future__ import annotations

from klimb.objective.advantage import ADVANTAGES, discounted_return, gae, preferred, prompt_value
from klimb.objective.aggregate import sequence_mean, sequence_sum
from klimb.objective.algorithm import Algorithm
from klimb.objective.group_advantage import COMPARING, optimal_token_baseline, parts_zscore
from klimb.objective.kl import k1
from klimb.objective.sampling import dynamic, length_penalty, soft_overlong
from klimb.objective.surrogate import anchor_of, clip, geometric_clip, product_clip, reinforce, sequence_clip
from klimb.objective.tokens import kl_cov


def adds_up(algorithm: Algorithm) -> bool:
    """Does its advantage look at the sum of a sample's rewards alone, wherever in the sample they are paid? Of an
    advantage that is not klimb's nobody knows."""
    own, by_token = algorithm.advantage, (gae, discounted_return, optimal_token_baseline)
    return (own in ADVANTAGES.values() or type(own) in ADVANTAGES.values()) and not isinstance(own, by_token)


def problems(algorithm: Algorithm, *, samples_per_prompt: int, updates_per_step: int) -> list[str]:
    """Why this combination makes no sense, each with the way out; empty if it does."""
    a, kl = algorithm, algorithm.kl
    alone = samples_per_prompt < 2
    compares = a.advantage in COMPARING or type(a.advantage) in COMPARING
    priced = kl.in_reward or isinstance(a.overlong, soft_overlong | length_penalty)
    needs_values = getattr(a.advantage, "needs_values", False)
    rules = [
        (
            compares and alone,
            "advantage: a group of one has nothing to compare with, its advantage is always 0; "
            "set samples_per_prompt to 2 or more, or advantage to running_mean",
        ),
        (
            a.sampling is dynamic and alone,
            "sampling: dynamic keeps groups whose scores differ, which a group of one never do; "
            "set samples_per_prompt to 2 or more, or sampling to none",
        ),
        (
            needs_values and a.critic is None,
            "advantage: it needs a critic's values; add critic: {value_clip: 0.2}, or set advantage to leave_one_out",
        ),
        (
            a.critic is not None and a.critic.lam is not None and not isinstance(a.advantage, gae),
            "critic.lam: the advantage has no λ of its own to differ from; set critic.lam to none",
        ),
        (
            a.critic is not None and not needs_values,
            "critic: the advantage does not look at its values; set advantage to gae, or critic to none",
        ),
        (
            kl.in_loss and kl.estimator is k1 and not kl.corrected,
            "kl.estimator: k1 in the loss has zero expected gradient; set kl.where to reward, or kl.estimator to k2",
        ),
        (
            isinstance(a.surrogate, sequence_clip) and a.aggregate not in (sequence_mean, sequence_sum(1.0)),
            "aggregate: sequence_clip has one ratio a sequence, a sum over tokens weighs it by length; "
            "set aggregate to sequence_mean, or to {sequence_sum: 1} where that is meant (luspo)",
        ),
        (
            isinstance(a.surrogate, geometric_clip) and a.aggregate is not sequence_mean,
            "aggregate: geometric_clip has one ratio a sequence, a sum over tokens weighs it by length; "
            "set aggregate to sequence_mean",
        ),
        (
            isinstance(a.surrogate, product_clip) and not isinstance(a.aggregate, sequence_sum),
            "aggregate: product_clip takes a completion as one action; set aggregate to {sequence_sum: 1}",
        ),
        (
            a.surrogate is reinforce and updates_per_step > 1 and not a.regression,
            "surrogate: reinforce knows no ratio, later updates would follow samples of an older policy; "
            "set updates_per_step to 1, or surrogate to clip",
        ),
        (
            a.importance is not None and anchor_of(a.surrogate) == "behavior",
            "importance: the surrogate's own ratio is to the policy that sampled, the correction would count twice; "
            "set importance to none, or surrogate to clip",
        ),
        (
            isinstance(a.advantage, parts_zscore | preferred) and priced,
            f"advantage: {type(a.advantage).__name__} compares bare scores, a KL or a price on length in the reward is "
            "no part of them; set kl.where to loss and overlong to none",
        ),
        (
            a.reference is not None and not a.needs.ref,
            "reference: it moves and nothing looks at it; set reference to none, or give the algorithm a kl",
        ),
        (
            isinstance(a.advantage, prompt_value) and not a.regression,
            "advantage: prompt_value belongs to a regression on log π/π_ref; set kl to {where: loss, estimator: k2, "
            "level: sequence, beta: 1} and aggregate to {sequence_sum: 1}, or advantage to gae",
        ),
    ]
    return [message for holds, message in rules if holds]


def hints(algorithm: Algorithm, *, updates_per_step: int) -> list[str]:
    """What does nothing with these batch numbers and is no mistake: a line each, for who starts the run."""
    a = algorithm
    higher = isinstance(a.surrogate, clip) and a.surrogate.high != a.surrogate.low
    if updates_per_step == 1 and (higher or isinstance(a.token_filter, kl_cov)):
        what = "token_filter" if isinstance(a.token_filter, kl_cov) else "surrogate"
        return [f"{what}: with one update a batch every ratio is 1 and it changes nothing; updates_per_step=2 uses it"]
    return []


def validate(algorithm: Algorithm, *, samples_per_prompt: int, updates_per_step: int) -> None:
    """Raises ValueError, in one line, when the algorithm makes no sense with these batch numbers."""
    found = problems(algorithm, samples_per_prompt=samples_per_prompt, updates_per_step=updates_per_step)
    if found:
        raise ValueError(f"algorithm {algorithm.name}: {'; '.join(found)}.")
