"""The table: every algorithm is one row, a value with the defaults of its paper, under the paper's name.

A variant is ``replace(GRPO, name="mine", advantage=group_mean)``; a column that most rows leave alone has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from klimb.objective.advantage import (
    discounted_return,
    gae,
    greedy_baseline,
    optimal_value,
    preferred,
    prompt_value,
    running_mean,
    whiten,
)
from klimb.objective.aggregate import sequence_mean, sequence_sum, token_mean
from klimb.objective.algorithm import Algorithm
from klimb.objective.critic import Critic
from klimb.objective.group_advantage import (
    best_of_group,
    group_mean,
    group_mean_batch_std,
    group_mean_scaled_up,
    group_zscore,
    leave_one_out,
    length_weighted_mean,
    optimal_token_baseline,
    over_mean,
    parts_zscore,
)
from klimb.objective.kl import KL, NO_KL, k1, k2, k3
from klimb.objective.sampling import dynamic, power_weights, soft_overlong
from klimb.objective.surrogate import (
    cispo,
    clip,
    dual_clip,
    geometric_clip,
    kl_mask,
    quadratic,
    ratio,
    reinforce,
    sapo,
    sequence_clip,
    taper,
    tv_mask,
    vespo,
)
from klimb.objective.tokens import clip_cov, imitate_correct, kl_cov, second_moment, top_entropy

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

# Other baselines ------------------------------------------------------------------------------------------------------

REMAX = replace(
    REINFORCE,
    name="remax",
    advantage=greedy_baseline(),
    source="arXiv 2310.10505 (β is that of reinforce)",
)
REINFORCE_PP_BASELINE = replace(
    REINFORCE_PP,
    name="reinforce++_baseline",
    advantage=group_mean,
    kl=KL("loss", k2, beta=0.01),
    source="arXiv 2501.03262, section 3.2, equations 6-8 (it names no β: that of reinforce++)",
)
OPO = replace(
    DR_GRPO,
    name="opo",
    advantage=length_weighted_mean,
    surrogate=reinforce,
    source="arXiv 2505.23585",
)
GPG = replace(
    GRPO,
    name="gpg",
    advantage=group_mean_scaled_up,
    surrogate=reinforce,
    kl=NO_KL,
    source="arXiv 2504.02546; mean over samples as in its authors' code",
)
LITE_PPO = replace(
    GRPO,
    name="lite_ppo",
    advantage=group_mean_batch_std(),
    aggregate=token_mean,
    kl=NO_KL,
    source="arXiv 2508.08221",
)
PASSK_GRPO = replace(
    DR_GRPO,
    name="passk_grpo",
    advantage=best_of_group(),
    source="arXiv 2503.19595; scaled by the group's std as in verl",
)
GDPO = replace(GRPO, name="gdpo", advantage=parts_zscore(), source="arXiv 2601.05242 (all else is GRPO's)")
MAXRL = replace(DR_GRPO, name="maxrl", advantage=over_mean, source="arXiv 2602.02710 (all else is Dr. GRPO's)")
OTB = replace(
    DR_GRPO,
    name="otb",
    advantage=optimal_token_baseline(),
    source="the optimal token baseline, as in verl (all else is Dr. GRPO's)",
)
VAPO = replace(
    PPO,
    name="vapo",
    advantage=gae(gamma=1.0, alpha=0.05),
    critic=Critic(value_clip=0.2, lam=1.0),
    surrogate=clip(0.2, 0.28),
    imitation=imitate_correct(0.1),
    kl=NO_KL,
    source="arXiv 2504.05118, sections 4 and 5.1 (value clip and whitening are PPO's, it names none)",
)

# Other restraints -----------------------------------------------------------------------------------------------------

INTELLECT2 = replace(
    GRPO,
    name="intellect2",
    surrogate=dual_clip(0.2, 0.2, bound=4.0),
    kl=KL("loss", k3, beta=0.001),
    source="arXiv 2505.07291, section 4.1: the two-sided clip, which is a dual clip",
)
SAPO = replace(GRPO, name="sapo", surrogate=sapo(), kl=NO_KL, source="arXiv 2511.20347")
GMPO = replace(GRPO, name="gmpo", surrogate=geometric_clip(0.4, 0.4), kl=NO_KL, source="arXiv 2507.20673, section 4")
LUSPO = replace(
    GSPO,
    name="luspo",
    surrogate=sequence_clip(2e-3, 2.5e-3),
    aggregate=sequence_sum(1.0),
    source="arXiv 2602.05261, section 5.1: GSPO, each sequence times its length",
)
VESPO = replace(
    GRPO,
    name="vespo",
    surrogate=vespo(),
    aggregate=token_mean,
    kl=NO_KL,
    source="arXiv 2602.10693; denominator of TRL",
)
TOPR = replace(
    DR_GRPO,
    name="topr",
    surrogate=taper(),
    source="arXiv 2503.14286; its baseline is a constant, all else here is Dr. GRPO's",
)
DPPO = replace(
    DR_GRPO,
    name="dppo",
    surrogate=tv_mask(),
    source="arXiv 2602.04879, binary TV; advantage and denominator of its authors' example in verl",
)
DPPO_KL = replace(DPPO, name="dppo_kl", surrogate=kl_mask(), source=DPPO.source.replace("TV", "KL"))
CLIP_COV = replace(
    GRPO,
    name="clip_cov",
    aggregate=token_mean,
    token_filter=clip_cov(),
    kl=NO_KL,
    source="arXiv 2505.22617, its part on Clip-Cov",
)
KL_COV = replace(
    CLIP_COV,
    name="kl_cov",
    surrogate=ratio,
    token_filter=kl_cov(),
    source="arXiv 2505.22617, its part on KL-Cov",
)
M2PO = replace(
    KL_COV,
    name="m2po",
    token_filter=second_moment(0.04),
    source='Zheng et al. 2025, "Prosperity before collapse", as in AReaL',
)
TOP_ENTROPY = replace(
    DAPO, name="top_entropy", token_filter=top_entropy(0.2), source="arXiv 2506.01939: DAPO on a fifth of the tokens"
)
PF_PPO = replace(PPO, name="pf_ppo", weighting=power_weights(2.0), source="arXiv 2409.06957, in verl's form")

# Regressions of log π/π_ref on the reward -----------------------------------------------------------------------------

A_STAR_PO = replace(
    REINFORCE,
    name="a_star_po",
    advantage=optimal_value(beta=0.5, samples=8),
    kl=KL("loss", k2, beta=1e-3, level="sequence"),
    source="arXiv 2505.20686 (its loss divided by 2 β₂)",
)
DRO = replace(
    A_STAR_PO,
    name="dro",
    advantage=prompt_value(),
    kl=KL("loss", k2, beta=1.0, level="sequence"),
    critic=Critic(value_clip=None),
    source="arXiv 2405.19107: DRO-V (β is its τ, best at 1 of 0.1, 1 and 5)",
)
DRO_OLD = replace(
    DR_GRPO,
    name="dro_old",
    surrogate=quadratic(beta=0.1),
    source="arXiv 2501.12599 and verl: pulled to π_old instead of π_ref (neither names a β: 0.1 is this table's)",
)

# Games ----------------------------------------------------------------------------------------------------------------

NASH_MD = replace(
    REINFORCE,
    name="nash_md",
    advantage=preferred(mixture=0.5),
    kl=KL("loss", k2, beta=0.1, level="sequence"),
    source="arXiv 2312.00886, section 7.2, its Nash-MD-PG (mixture and β are TRL's)",
)

ALGORITHMS: Mapping[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        REINFORCE, RLOO, REINFORCE_PP, PPO, GRPO, DR_GRPO, DAPO, GSPO, CISPO,
        REMAX, REINFORCE_PP_BASELINE, OPO, GPG, LITE_PPO, PASSK_GRPO, GDPO, MAXRL, OTB, VAPO,
        INTELLECT2, SAPO, GMPO, LUSPO, VESPO, TOPR, DPPO, DPPO_KL, CLIP_COV, KL_COV, M2PO, TOP_ENTROPY, PF_PPO,
        A_STAR_PO, DRO, DRO_OLD, NASH_MD,
    )
}  # fmt: skip
