"""The table: every algorithm is one frozen value, a point on a few independent axes.

    score − β·KL (reward) → advantage → normalise → surrogate × importance + β·KL (loss) → aggregate

A variant is ``replace(GRPO, name="mine", advantage=group_mean)``; a column that most rows leave alone has a
default. Rows carry the defaults of their papers, under the papers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from klimb.objective.advantage import (
    Advantage,
    Normalise,
    discounted_return,
    gae,
    group_mean,
    group_zscore,
    leave_one_out,
    running_mean,
    whiten,
)
from klimb.objective.aggregate import Aggregate, sequence_mean, sequence_sum, token_mean
from klimb.objective.critic import Critic
from klimb.objective.kl import KL, NO_KL, k1, k3
from klimb.objective.sampling import Sampling, dynamic, soft_overlong
from klimb.objective.surrogate import (
    Importance,
    Surrogate,
    cispo,
    clip,
    product_clip,
    reinforce,
    sequence_clip,
)


class Needs(NamedTuple):
    """What has to be computed for an algorithm besides the policy's log-probs."""

    ref: bool
    critic: bool
    old_logps: bool
    entropy: bool


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One way to climb E[r] − β · KL(π ‖ π_ref) on the policy's own samples. Call `resolve` before use."""

    name: str
    advantage: Advantage
    surrogate: Surrogate
    aggregate: Aggregate
    kl: KL = NO_KL
    normalise: Normalise | None = None
    critic: Critic | None = None
    sampling: Sampling | None = None
    overlong: soft_overlong | None = None
    importance: Importance | None = None
    entropy_bonus: float = 0.0
    """Coefficient of the policy's entropy in nats per token, added to what is maximised."""
    source: str = ""

    @property
    def needs(self) -> Needs:
        return Needs(
            ref=self.kl.active,
            critic=self.critic is not None,
            old_logps=self.surrogate is not reinforce or self.importance is not None,
            entropy=self.entropy_bonus != 0,
        )

    def resolve(self, *, max_length: int) -> Algorithm:
        """Fill the constants of the run. max_length: the most tokens that a completion may have."""
        aggregate, overlong = self.aggregate, self.overlong
        if isinstance(aggregate, sequence_sum) and aggregate.constant is None:
            aggregate = sequence_sum(float(max_length))
        if overlong is not None and overlong.max_length is None:
            overlong = replace(overlong, max_length=max_length)
        return replace(self, aggregate=aggregate, overlong=overlong)


REINFORCE = Algorithm(
    name="reinforce",
    advantage=running_mean(),
    surrogate=reinforce,
    aggregate=sequence_sum(1.0),
    kl=KL("reward", k1, beta=0.05),
    source="Williams 1992; for language models arXiv 2402.14740, its part on REINFORCE (β is TRL's)",
)
RLOO = replace(
    REINFORCE,
    name="rloo",
    advantage=leave_one_out,
    source="arXiv 2402.14740, its part on RLOO (β is TRL's; TRL clips, as surrogate: product_clip)",
)
REINFORCE_PP = Algorithm(
    name="reinforce++",
    advantage=discounted_return(gamma=1.0),
    normalise=whiten,
    surrogate=clip(0.2, 0.2),
    aggregate=token_mean,
    kl=KL("reward", k1, beta=0.01),
    source="arXiv 2501.03262, its part on REINFORCE++ (β is OpenRLHF's)",
)
PPO = replace(
    REINFORCE_PP,
    name="ppo",
    advantage=gae(gamma=1.0, lam=0.95),
    kl=KL("reward", k1, beta=0.02),
    critic=Critic(value_clip=0.2),
    source="arXiv 1707.06347, equation 7; with β, γ and λ of arXiv 2203.02155, appendix C.4",
)
GRPO = Algorithm(
    name="grpo",
    advantage=group_zscore(),
    surrogate=clip(0.2, 0.2),
    aggregate=sequence_mean,
    kl=KL("loss", k3, beta=0.04),
    source="arXiv 2402.03300, equations 3-4",
)
DR_GRPO = replace(
    GRPO,
    name="dr_grpo",
    advantage=group_mean,
    aggregate=sequence_sum(),
    kl=NO_KL,
    source="arXiv 2503.20783, section 3.2",
)
DAPO = replace(
    GRPO,
    name="dapo",
    surrogate=clip(0.2, 0.28),
    aggregate=token_mean,
    kl=NO_KL,
    sampling=dynamic,
    overlong=soft_overlong(0.2),
    source="arXiv 2503.14476, section 3",
)
GSPO = replace(
    GRPO,
    name="gspo",
    surrogate=sequence_clip(3e-4, 4e-4),
    kl=NO_KL,
    source="arXiv 2507.18071, equation 5; the clip of its experiments",
)
CISPO = replace(
    DAPO,
    name="cispo",
    surrogate=cispo(low=1.0, high=4.0),
    source="arXiv 2506.13585, its part on CISPO; the bound of arXiv 2510.13786",
)

ALGORITHMS: Mapping[str, Algorithm] = {
    algorithm.name: algorithm for algorithm in (REINFORCE, RLOO, REINFORCE_PP, PPO, GRPO, DR_GRPO, DAPO, GSPO, CISPO)
}


def problems(algorithm: Algorithm, *, samples_per_prompt: int, updates_per_step: int) -> list[str]:
    """Why this combination makes no sense, each with the way out; empty if it does."""
    a, kl = algorithm, algorithm.kl
    alone = samples_per_prompt < 2
    compares = a.advantage in (group_mean, leave_one_out) or isinstance(a.advantage, group_zscore)
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
            a.critic is not None and not needs_values,
            "critic: the advantage does not look at its values; set advantage to gae, or critic to none",
        ),
        (
            kl.in_loss and kl.estimator is k1,
            "kl.estimator: k1 in the loss has zero expected gradient; set kl.where to reward, or kl.estimator to k2",
        ),
        (
            isinstance(a.surrogate, sequence_clip) and a.aggregate is not sequence_mean,
            "aggregate: sequence_clip has one ratio a sequence, a sum over tokens weighs it by length; "
            "set aggregate to sequence_mean",
        ),
        (
            isinstance(a.surrogate, product_clip) and not isinstance(a.aggregate, sequence_sum),
            "aggregate: product_clip takes a completion as one action; set aggregate to {sequence_sum: 1}",
        ),
        (
            a.surrogate is reinforce and updates_per_step > 1,
            "surrogate: reinforce knows no ratio, later updates would follow samples of an older policy; "
            "set updates_per_step to 1, or surrogate to clip",
        ),
    ]
    return [message for holds, message in rules if holds]


def validate(algorithm: Algorithm, *, samples_per_prompt: int, updates_per_step: int) -> None:
    """Raises ValueError, in one line, when the algorithm makes no sense with these batch numbers."""
    found = problems(algorithm, samples_per_prompt=samples_per_prompt, updates_per_step=updates_per_step)
    if found:
        raise ValueError(f"algorithm {algorithm.name}: {'; '.join(found)}.")
