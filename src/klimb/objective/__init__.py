"""The heart: the algebra of post-training as pure functions of tensors. No models, files or configuration.

credit = assign_credit(algorithm, scores=…, mask=…, group=…, logps=…)       once, over the whole update
loss, metrics = policy_loss(algorithm, advantages=credit.advantages, …)     for each part of it
"""

from klimb.objective.advantage import ADVANTAGES
from klimb.objective.aggregate import AGGREGATES
from klimb.objective.algorithm import Algorithm, Needs
from klimb.objective.algorithms import (
    ALGORITHMS,
    CISPO,
    DAPO,
    DR_GRPO,
    GRPO,
    GSPO,
    PPO,
    REINFORCE,
    REINFORCE_PP,
    RLOO,
)
from klimb.objective.credit import Credit, assign_credit
from klimb.objective.critic import Critic, bradley_terry, critic_loss, reward_loss, value_loss
from klimb.objective.grouped import Rewards
from klimb.objective.kl import KL, NO_KL, k1, k2, k3
from klimb.objective.policy_loss import policy_loss, update_columns
from klimb.objective.preference import (
    PREFERENCE_LOSSES,
    Completions,
    Pairs,
    PreferenceLoss,
    known_start,
    parse_preference,
    preference_loss,
)
from klimb.objective.preference.margin import cdpo, dpo, ipo, ipo_average
from klimb.objective.refusals import problems, validate
from klimb.objective.spec import algorithm_row, algorithm_table, describe, parse_algorithm
from klimb.objective.supervised import forward_kl, nll, reverse_kl, sft_loss
from klimb.objective.surrogate import SURROGATES

__all__ = [
    "ADVANTAGES",
    "AGGREGATES",
    "ALGORITHMS",
    "CISPO",
    "DAPO",
    "DR_GRPO",
    "GRPO",
    "GSPO",
    "KL",
    "NO_KL",
    "PPO",
    "PREFERENCE_LOSSES",
    "REINFORCE",
    "REINFORCE_PP",
    "RLOO",
    "SURROGATES",
    "Algorithm",
    "Completions",
    "Credit",
    "Critic",
    "Needs",
    "Pairs",
    "PreferenceLoss",
    "Rewards",
    "algorithm_row",
    "algorithm_table",
    "assign_credit",
    "bradley_terry",
    "cdpo",
    "critic_loss",
    "describe",
    "dpo",
    "forward_kl",
    "ipo",
    "ipo_average",
    "k1",
    "k2",
    "k3",
    "known_start",
    "nll",
    "parse_algorithm",
    "parse_preference",
    "policy_loss",
    "preference_loss",
    "problems",
    "reverse_kl",
    "reward_loss",
    "sft_loss",
    "update_columns",
    "validate",
    "value_loss",
]
