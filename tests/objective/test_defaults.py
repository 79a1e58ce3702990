"""What one gets without saying anything: the numbers of the papers and of the libraries that are named beside them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from klimb.objective import ALGORITHMS, KL, PREFERENCE_LOSSES, Critic, k1, k2, k3
from klimb.objective.advantage import gae, optimal_value
from klimb.objective.spec import AXES
from klimb.objective.surrogate import cispo, clip, dual_clip, geometric_clip, sequence_clip
from klimb.objective.tokens import imitate_correct

DEFAULTS = {
    "running_mean": (0.9,),
    "group_zscore": (1e-4,),
    "group_mean_batch_std": (1e-4,),
    "best_of_group": (True, 1e-6),
    "parts_zscore": (1e-4,),
    "leave_one_out_zscore": (1e-6,),
    "optimal_value": (0.5, 8),
    "preferred": (0.5, 8),
    "discounted_return": (1.0,),
    "gae": (1.0, 0.95, None),
    "quadratic": (0.1,),
    "clip": (0.2, 0.2),
    "dual_clip": (0.2, 0.2, 3.0),
    "sequence_clip": (3e-4, 4e-4),
    "geometric_clip": (0.4, 0.4),
    "product_clip": (0.2, 0.2),
    "cispo": (1.0, 4.0),
    "sapo": (1.0, 1.05),
    "vespo": (2.0, 3.0, 3.0, 2.0),
    "taper": (1.0,),
    "tv_mask": (0.2, 0.2),
    "kl_mask": (0.05, 0.05),
    "truncate": (2.0,),
    "drop_outside": (0.5, 2.0),
    "sequence_truncate": (2.0,),
    "sequence_drop": (0.0, 3.0),
    "geometric_drop": (0.999, 1.002),
    "off_policy_drop": (0.5,),
    "sequence_sum": (None,),
    "soft_overlong": (0.2, None),
    "length_penalty": (0.1, None),
    "power_weights": (2.0,),
    "skip_solved": (1.0, 10),
    "moving": (512, 0.6),
    "top_entropy": (0.2,),
    "clip_cov": (2e-4, 1.0, 5.0),
    "kl_cov": (2e-4, 1.0),
    "second_moment": (0.04,),
    "imitate_correct": (0.1, 0.0),
    "adaptive_entropy": (0.2, 0.005, 0.0, 1.0, 0.0),
    "dpo": (0.1,),
    "ipo": (0.1,),
    "ipo_average": (0.1,),
    "hinge": (0.1,),
    "nca": (0.1,),
    "sppo_hard": (0.1,),
    "bco_pair": (0.1,),
    "bco": (0.1,),
    "apo_zero": (0.1,),
    "apo_down": (0.1,),
    "aot": (0.1,),
    "aot_unpaired": (0.1,),
    "fdpo_kl": (0.1,),
    "fdpo_js": (0.1,),
    "wpo": (0.1,),
    "orpo": (0.1,),
    "step_dpo": (0.5,),
    "cdpo": (0.1, 0.1),
    "robust": (0.1, 0.1),
    "exo": (0.1, 0.001),
    "discopop": (0.1, 0.05),
    "fdpo_alpha": (0.1, 0.5),
    "ld_dpo": (0.1, 0.5),
    "dpo_norm": (5.0,),
    "rpo": (0.1, 1.0),
    "kto": (0.1, 1.0, 1.0),
    "cpo": (0.1, 1.0),
    "simpo": (2.0, 1.0),
    "alphapo": (2.5, 0.25, 0.1),
    "tpo": (0.01, 1.0),
    "tpo_l": (0.01, 1.0, 0.5),
    "beta_dpo": (0.1, 0.6, 0.8, 0.9),
    "dpo_shift": (0.1, 0.95),
    "dpop": (0.3, 50.0),
}
LEASHES = {
    "reinforce": KL("reward", k1, 0.05),
    "rloo": KL("reward", k1, 0.05),
    "remax": KL("reward", k1, 0.05),
    "reinforce++": KL("reward", k1, 0.01),
    "reinforce++_baseline": KL("loss", k2, 0.01),
    "ppo": KL("reward", k1, 0.02),
    "pf_ppo": KL("reward", k1, 0.02),
    "grpo": KL("loss", k3, 0.04),
    "gdpo": KL("loss", k3, 0.04),
    "intellect2": KL("loss", k3, 0.001),
    "a_star_po": KL("loss", k2, 0.001, level="sequence"),
    "dro": KL("loss", k2, 1.0, level="sequence"),
    "nash_md": KL("loss", k2, 0.1, level="sequence"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_of_a_value(name):
    kinds = {name: kind for known in (*AXES.values(), PREFERENCE_LOSSES) for name, kind in known.items()}
    value = kinds[name]()
    assert tuple(getattr(value, field.name) for field in fields(value)) == DEFAULTS[name]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_of_the_leash_of_a_row(name):
    """A row that is not listed has none."""
    expected = LEASHES.get(name)
    assert ALGORITHMS[name].kl == expected if expected else not ALGORITHMS[name].kl.active


def test_of_the_leash_and_the_critic_themselves():
    assert (KL("reward", k1, 0.1).gain, KL("reward", k1, 0.1).target) == (0.1, None)
    assert (Critic().value_clip, ALGORITHMS["ppo"].critic, ALGORITHMS["vapo"].critic.lam) == (0.2, Critic(0.2), 1.0)


def test_of_what_a_row_sets_itself():
    rows = ALGORITHMS
    assert rows["gspo"].surrogate == sequence_clip(3e-4, 4e-4)
    assert rows["luspo"].surrogate == sequence_clip(2e-3, 2.5e-3)
    assert rows["gmpo"].surrogate == geometric_clip(0.4, 0.4)
    assert rows["cispo"].surrogate == cispo(1.0, 4.0)
    assert rows["intellect2"].surrogate == dual_clip(0.2, 0.2, 4.0)
    assert rows["a_star_po"].advantage == optimal_value(0.5, 8)
    vapo = rows["vapo"]
    assert (vapo.advantage, vapo.critic) == (gae(1.0, 0.95, 0.05), Critic(0.2, 1.0))
    assert (vapo.surrogate, vapo.imitation) == (clip(0.2, 0.28), imitate_correct(0.1))
