"""The table: rows that make sense, refusals that say what to do, names that people type."""

from __future__ import annotations

from dataclasses import replace

import pytest

from klimb.objective import (
    ALGORITHMS,
    CISPO,
    DAPO,
    DR_GRPO,
    GRPO,
    GSPO,
    KL,
    NO_KL,
    PPO,
    REINFORCE,
    RLOO,
    Algorithm,
    Critic,
    Needs,
    algorithm_row,
    algorithm_table,
    describe,
    k1,
    k2,
    parse_algorithm,
    problems,
    validate,
)
from klimb.objective.advantage import Draws, gae, group_mean, group_zscore, leave_one_out, preferred, running_mean
from klimb.objective.aggregate import sequence_mean, sequence_sum, token_mean
from klimb.objective.entropy import adaptive_entropy
from klimb.objective.group_advantage import over_mean
from klimb.objective.importance import sequence_drop, truncate
from klimb.objective.kl import k3_plus
from klimb.objective.reference import moving
from klimb.objective.refusals import hints
from klimb.objective.sampling import dynamic, extremes, leave_out, length_penalty, skip_solved, soft_overlong
from klimb.objective.surrogate import clip, product_clip, sequence_clip
from klimb.objective.tokens import top_entropy

NAMES = list(ALGORITHMS)
ONCE = ("reinforce", "rloo", "remax", "opo", "gpg", "nash_md")  # no ratio, hence one update a batch


def test_each_row_has_a_source():
    assert all(any(word in row.source for word in ("19", "arXiv", "verl", "AReaL")) for row in ALGORITHMS.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_row_makes_sense(name):
    updates = 1 if name in ONCE else 2
    assert problems(ALGORITHMS[name], samples_per_prompt=4, updates_per_step=updates) == []


def test_what_each_row_needs():
    assert GRPO.needs == Needs(ref=True, critic=False, old_logps=True, entropy=False)
    assert PPO.needs == Needs(ref=True, critic=True, old_logps=True, entropy=False)
    assert RLOO.needs == Needs(ref=True, critic=False, old_logps=False, entropy=False)
    assert DAPO.needs == Needs(ref=False, critic=False, old_logps=True, entropy=False)
    assert replace(GRPO, kl=replace(GRPO.kl, beta=0.0)).needs.ref is False
    nash = ALGORITHMS["nash_md"]
    assert nash.needs == Needs(True, False, False, False, Draws(8, mixture=0.5))
    assert replace(nash, kl=NO_KL).needs.ref  # it is drawn from
    assert not replace(nash, kl=NO_KL, advantage=preferred(0)).needs.ref
    assert replace(RLOO, importance=truncate(), entropy_bonus=0.1).needs == Needs(True, False, True, True)


def test_which_rows_are_regressions():
    """(β log π/π_ref − A)² of whole completions: each of its four parts is needed."""
    dro = ALGORITHMS["dro"]
    assert [name for name, row in ALGORITHMS.items() if row.regression] == ["a_star_po", "dro"]
    for change in (
        {"surrogate": clip()}, {"aggregate": token_mean}, {"kl": KL("loss", k2, 1.0)},
        {"kl": KL("loss", k1, 1.0, level="sequence")}, {"kl": KL("reward", k2, 1.0)},
    ):  # fmt: skip
        assert not replace(dro, **change).regression


@pytest.mark.parametrize("name", ["grpo", "rloo", "dapo"])
def test_two_samples_can_be_compared(name):
    assert problems(ALGORITHMS[name], samples_per_prompt=2, updates_per_step=1) == []


def test_resolving_fills_the_constants_of_the_run_and_leaves_set_ones():
    assert DR_GRPO.resolve(max_length=64).aggregate == sequence_sum(64.0)
    assert REINFORCE.resolve(max_length=64) == REINFORCE
    assert DAPO.resolve(max_length=64).overlong == soft_overlong(0.2, 64)
    assert DAPO.resolve(max_length=64).resolve(max_length=9).overlong == soft_overlong(0.2, 64)


@pytest.mark.parametrize(
    ("algorithm", "samples", "updates", "key", "way_out"),
    [
        (GRPO, 1, 1, "advantage", "samples_per_prompt"),
        (RLOO, 1, 1, "advantage", "running_mean"),
        (replace(GRPO, advantage=group_mean), 1, 1, "advantage", "running_mean"),
        (replace(PPO, sampling=dynamic), 1, 1, "sampling", "none"),
        (replace(PPO, critic=None), 4, 1, "advantage", "critic: {value_clip"),
        (replace(GRPO, critic=Critic()), 4, 1, "critic", "gae"),
        (replace(GRPO, kl=KL("loss", k1, 0.1)), 4, 1, "kl.estimator", "k2"),
        (replace(GSPO, aggregate=token_mean), 4, 1, "aggregate", "sequence_mean"),
        (replace(RLOO, surrogate=product_clip(), aggregate=sequence_mean), 4, 1, "aggregate", "sequence_sum"),
        (REINFORCE, 1, 2, "surrogate", "clip"),
        (ALGORITHMS["nash_md"], 4, 2, "surrogate", "clip"),
        (replace(ALGORITHMS["nash_md"], kl=REINFORCE.kl), 4, 1, "advantage", "kl.where to loss"),
        (replace(ALGORITHMS["nash_md"], overlong=length_penalty()), 4, 1, "advantage", "overlong to none"),
        (replace(GRPO, advantage=over_mean), 1, 1, "advantage", "running_mean"),
        (replace(ALGORITHMS["gmpo"], aggregate=token_mean), 4, 1, "aggregate", "sequence_mean"),
        (replace(ALGORITHMS["luspo"], aggregate=sequence_sum(8.0)), 4, 1, "aggregate", "luspo"),
        (replace(ALGORITHMS["dppo"], importance=truncate()), 4, 1, "importance", "surrogate to clip"),
        (replace(ALGORITHMS["gdpo"], kl=KL("reward", k1, 0.1)), 4, 1, "advantage", "kl.where"),
        (replace(ALGORITHMS["gdpo"], overlong=soft_overlong()), 4, 1, "advantage", "overlong to none"),
        (replace(ALGORITHMS["dro"], kl=GRPO.kl), 4, 1, "advantage", "level: sequence"),
        (replace(DAPO, reference=moving()), 4, 1, "reference", "a kl"),
        (replace(ALGORITHMS["dro"], critic=Critic(lam=1.0)), 4, 1, "critic.lam", "critic.lam to none"),
        (replace(ALGORITHMS["gdpo"], overlong=length_penalty()), 4, 1, "advantage", "overlong to none"),
    ],
)
def test_nonsense_is_refused_with_a_way_out(algorithm, samples, updates, key, way_out):
    found = problems(algorithm, samples_per_prompt=samples, updates_per_step=updates)
    assert len(found) == 1
    assert found[0].startswith(f"{key}: ")
    assert way_out in found[0]
    with pytest.raises(ValueError, match=f"algorithm {algorithm.name}: {key}") as error:
        validate(algorithm, samples_per_prompt=samples, updates_per_step=updates)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "updates", "key"),
    [
        ("dapo", 1, "surrogate"),
        ("kl_cov", 1, "token_filter"),
        ("dapo", 2, None),
        ("kl_cov", 2, None),
        ("grpo", 1, None),
        ("gspo", 1, None),  # its bounds are of another ratio
    ],
)
def test_what_does_nothing_with_one_update_is_said(name, updates, key):
    found = hints(ALGORITHMS[name], updates_per_step=updates)
    assert [line.split(":")[0] for line in found] == ([key] if key else [])


def test_dapos_four_parts_and_its_children():
    parts = (DAPO.surrogate, DAPO.aggregate, DAPO.sampling, DAPO.overlong)
    assert parts == (clip(0.2, 0.28), token_mean, dynamic, soft_overlong(0.2))
    assert CISPO.sampling is dynamic
    assert not DAPO.kl.active


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("grpo", GRPO),
        (GRPO, GRPO),
        ({"name": "grpo", "advantage": "group_mean"}, replace(GRPO, advantage=group_mean)),
        ({"name": "grpo", "advantage": group_mean}, replace(GRPO, advantage=group_mean)),
        ({"name": "grpo", "surrogate": {"clip": [0.2, 0.28]}}, replace(GRPO, surrogate=clip(0.2, 0.28))),
        ({"name": "grpo", "surrogate": {"clip": {"high": 0.3}}}, replace(GRPO, surrogate=clip(0.2, 0.3))),
        (
            {"name": "gspo", "surrogate": {"sequence_clip": ["3e-3", 0.1]}},
            replace(GSPO, surrogate=sequence_clip(3e-3, 0.1)),
        ),
        ({"name": "rloo", "advantage": {"running_mean": 0.5}}, replace(RLOO, advantage=running_mean(0.5))),
        ({"name": "ppo", "advantage": {"gae": {"lam": 1}}}, replace(PPO, advantage=gae(1.0, 1.0))),
        (
            {"name": "ppo", "normalise": "none", "critic": {"value_clip": None}},
            replace(PPO, normalise=None, critic=Critic(None)),
        ),
        ({"name": "grpo", "kl": {"beta": 0.15}}, replace(GRPO, kl=replace(GRPO.kl, beta=0.15))),
        (
            {"name": "grpo", "kl": {"where": "reward", "estimator": "k1", "beta": "5e-2"}},
            replace(GRPO, kl=KL("reward", k1, 0.05)),
        ),
        (
            {"name": "grpo", "kl": {"estimator": "k2", "level": "sequence"}},
            replace(GRPO, kl=KL("loss", k2, 0.04, level="sequence")),
        ),
        ({"name": "grpo", "kl": "none"}, replace(GRPO, kl=DAPO.kl)),
        ({"name": "grpo", "kl": {"where": "none"}}, replace(GRPO, kl=DAPO.kl)),
        ({"name": "dapo", "overlong": "none", "sampling": None}, replace(DAPO, overlong=None, sampling=None)),
        (
            {"name": "grpo", "importance": {"truncate": 3}, "entropy_bonus": 0.01},
            replace(GRPO, importance=truncate(3), entropy_bonus=0.01),
        ),
        ({"name": "grpo", "entropy_bonus": "5e-3"}, replace(GRPO, entropy_bonus=5e-3)),
        (
            {"name": "grpo", "entropy_bonus": {"adaptive_entropy": {"target": 1}}},
            replace(GRPO, entropy_bonus=adaptive_entropy(target=1)),
        ),
        ({"name": "grpo", "token_filter": {"top_entropy": 0.3}}, replace(GRPO, token_filter=top_entropy(0.3))),
        ({"name": "top_entropy", "token_filter": "none"}, replace(ALGORITHMS["top_entropy"], token_filter=None)),
        ({"name": "dapo", "overlong": "leave_out"}, replace(DAPO, overlong=leave_out())),
        ({"name": "grpo", "reference": {"moving": [200, 1]}}, replace(GRPO, reference=moving(200, 1))),
        ({"name": "grpo", "curriculum": "skip_solved"}, replace(GRPO, curriculum=skip_solved())),
        ({"name": "grpo", "kl": {"estimator": "k3+"}}, replace(GRPO, kl=replace(GRPO.kl, estimator=k3_plus))),
        ({"name": "grpo", "kl": {"corrected": True}}, replace(GRPO, kl=replace(GRPO.kl, corrected=True))),
        ({"name": "ppo", "critic": {"lam": 1}}, replace(PPO, critic=Critic(0.2, 1))),
        ({"name": "ppo", "weighting": "extremes"}, replace(PPO, weighting=extremes)),
        ({"name": "grpo", "importance": "sequence_drop"}, replace(GRPO, importance=sequence_drop())),
        ({"name": "rloo", "aggregate": "sequence_sum"}, replace(RLOO, aggregate=sequence_sum())),
        ({"name": "grpo", "advantage": {"group_zscore": 0}}, replace(GRPO, advantage=group_zscore(0.0))),
    ],
)
def test_what_people_write(spec, expected):
    assert parse_algorithm(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpro", "algorithm: unknown 'gpro', did you mean 'grpo'. Known: .*reinforce"),
        ({"surrogate": "clip"}, "algorithm: it has no name"),
        ({"name": "grpo", "surogate": "clip"}, "unknown key 'surogate', did you mean 'surrogate'"),
        ({"name": "grpo", "surrogate": "clipp"}, "algorithm.surrogate: unknown 'clipp', did you mean 'clip'"),
        (
            {"name": "grpo", "surrogate": {"clip": ["wide", 1]}},
            "algorithm.surrogate.clip: expected a number, got 'wide'",
        ),
        ({"name": "grpo", "surrogate": {"clip": [1, 2, 3]}}, "algorithm.surrogate.clip: .*3"),
        (
            {"name": "grpo", "surrogate": {"clip": {"hihg": 1}}},
            "unknown argument 'hihg', did you mean 'high'",
        ),
        ({"name": "grpo", "surrogate": {"clip": 1, "cispo": 2}}, "algorithm.surrogate: expected one"),
        ({"name": "grpo", "advantage": {"group_mean": 3}}, "group_mean takes no arguments"),
        ({"name": "grpo", "advantage": None}, "algorithm.advantage: None"),
        ({"name": "grpo", "kl": {"bta": 1}}, "algorithm.kl: unknown key 'bta', did you mean 'beta'"),
        ({"name": "grpo", "kl": {"where": "lossy"}}, "kl.where"),
        ({"name": "grpo", "kl": 0.1}, "algorithm.kl: 0.1"),
        ({"name": "dapo", "kl": {"beta": 0.1}}, "set kl.where"),
        ({"name": "grpo", "entropy_bonus": "adaptive"}, "algorithm.entropy_bonus: expected a number, got 'adaptive'"),
        (
            {"name": "grpo", "reference": {"moving": [0, 1]}},
            "moving: every = 0: it has to be a whole number",
        ),
        ({"name": "grpo", "kl": {"where": "none", "beta": 0.5}}, "algorithm.kl: where is none and beta is set"),
        ({"name": "grpo", "surrogate": {"clip": [-0.2, 0.2]}}, r"clip: low = -0\.2: it has to be at least 0"),
        ({"name": "grpo", "surrogate": {"dual_clip": {"bound": 0.5}}}, r"dual_clip: bound = 0\.5"),
        ({"name": "grpo", "surrogate": {"sapo": [0, 1]}}, "sapo: positive = 0: it has to be above 0"),
        ({"name": "grpo", "overlong": {"soft_overlong": 0}}, "soft_overlong: buffer = 0: it has to be above 0 and at"),
        ({"name": "grpo", "aggregate": {"sequence_sum": -5}}, "sequence_sum: constant = -5"),
        ({"name": "grpo", "importance": {"truncate": 0}}, "truncate: cap = 0"),
        (
            {"name": "grpo", "importance": {"drop_outside": [2, 1]}},
            "drop_outside: low = 2, high = 1: nothing lies betw",
        ),
        ({"name": "grpo", "importance": {"sequence_drop": [3, 1]}}, "sequence_drop: low = 3, high = 1"),
        ({"name": "grpo", "importance": {"geometric_drop": [3, 1]}}, "geometric_drop: low = 3, high = 1"),
        ({"name": "grpo", "token_filter": {"clip_cov": [0.1, 5, 1]}}, "clip_cov: low = 5, high = 1"),
        ({"name": "grpo", "entropy_bonus": {"adaptive_entropy": {"low": 2}}}, "adaptive_entropy: low = 2, high = 1"),
        ({"name": "grpo", "surrogate": {"clip": [0.2, None]}}, "surrogate.clip: high = none: it has to be at least 0"),
        (
            {"name": "a_star_po", "advantage": {"optimal_value": [1, 2.5]}},
            r"samples = 2\.5: it has to be a whole",
        ),
        ({"name": "ppo", "critic": {"value_clip": 0}}, "algorithm.critic: value_clip = 0: it has to be above 0"),
        ({"name": "ppo", "advantage": {"gae": [1, 1.5]}}, r"gae: lam = 1\.5: it has to be at least 0 and at most 1"),
        ({"name": "grpo", "token_filter": "top_entropi"}, "algorithm.token_filter: unknown 'top_entropi'"),
        ("nowhere.py:MINE", "there is no file nowhere.py"),
    ],
)
def test_what_people_get_wrong(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_algorithm(spec)
    assert "\n" not in str(error.value)


def test_a_row_and_an_axis_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from klimb.objective import GRPO\n"
        "def centred(rewards):\n    return rewards.returns - 1\n"
        "MY_GRPO = replace(GRPO, name='mine', advantage=centred)\n"
        "NUMBER = 3\n"
    )
    mine = parse_algorithm(f"{file}:MY_GRPO")
    assert mine.name == "mine"
    assert parse_algorithm({"name": f"{file}:MY_GRPO", "surrogate": "reinforce"}).advantage is mine.advantage
    assert parse_algorithm({"name": "grpo", "advantage": f"{file}:centred"}).advantage is mine.advantage
    assert describe(mine).startswith("mine(advantage=centred, surrogate=clip(0.2, 0.2)")
    file.write_text(
        file.read_text()
        + "class Shift:\n    def __init__(self, by=0.0):\n        self.by = by\n"
        + "    def __call__(self, rewards):\n        return rewards.returns - self.by\n"
    )
    for arguments, expected in (({"by": "2.5"}, 2.5), (3, 3), ([4], 4), (None, 0.0)):  # a class that is no dataclass
        assert parse_algorithm({"name": "grpo", "advantage": {f"{file}:Shift": arguments}}).advantage.by == expected
    with pytest.raises(ValueError, match="NUMBER is int, no Algorithm"):
        parse_algorithm(f"{file}:NUMBER")
    with pytest.raises(ValueError, match="did you mean 'MY_GRPO'"):
        parse_algorithm(f"{file}:MY_GPRO")
    with pytest.raises(ValueError, match="cannot be called"):
        parse_algorithm({"name": "grpo", "advantage": f"{file}:NUMBER"})


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [
        (GRPO, "grpo"),
        (
            replace(GRPO, advantage=group_mean, kl=replace(GRPO.kl, beta=0.15)),
            "grpo(advantage=group_mean, β=0.15)",
        ),
        (replace(GRPO, kl=replace(GRPO.kl, beta=0.0)), "grpo(β=0)"),
        (replace(GRPO, kl=DAPO.kl), "grpo(kl=none)"),
        (replace(GRPO, kl=KL("reward", k1, 0.05)), "grpo(kl=reward, estimator=k1, β=0.05)"),
        (
            replace(GSPO, kl=KL("loss", k2, 0.1, level="sequence")),
            "gspo(kl=loss, estimator=k2, β=0.1, level=sequence)",
        ),
        (
            replace(PPO, normalise=None, advantage=leave_one_out, critic=None),
            "ppo(advantage=leave_one_out, normalise=none, critic=none)",
        ),
        (replace(RLOO, kl=KL("reward", k1, 0.05, target=6.0)), "rloo(target=6, gain=0.1)"),
        (replace(RLOO, kl=KL("reward", k1, 0.05, target=6.0, gain=1.0)), "rloo(target=6, gain=1)"),
        (DR_GRPO.resolve(max_length=64), "dr_grpo(aggregate=sequence_sum(64))"),
        (replace(REINFORCE, entropy_bonus=0.01), "reinforce(entropy_bonus=0.01)"),
        (replace(GRPO, kl=replace(GRPO.kl, corrected=True)), "grpo(corrected=true)"),
        (replace(GRPO, kl=replace(GRPO.kl, estimator=k3_plus)), "grpo(estimator=k3+)"),
        (replace(RLOO, kl=replace(RLOO.kl, gain=0.3)), "rloo"),  # a gain without a target steers nothing
    ],
)
def test_a_run_is_described_by_what_it_changes(algorithm, text):
    assert describe(algorithm) == text


def test_the_printed_table_is_text_without_addresses():
    rows = algorithm_table()
    assert [row["name"] for row in rows] == NAMES
    assert rows[4]["kl"] == "loss k3, β=0.04"
    assert rows[5]["advantage"] == "group_mean"
    assert {rows[NAMES.index(name)]["kl"] for name in ("dro", "a_star_po", "dapo")} == {
        "loss k2, sequence, β=1", "loss k2, sequence, β=0.001", "none",
    }  # fmt: skip
    steered = replace(GRPO, kl=replace(GRPO.kl, corrected=True, target=6.0))
    assert algorithm_row(steered)["kl"] == "loss k3, corrected, β=0.04, target 6"
    for row in rows:
        assert all(isinstance(text, str) and " at 0x" not in text for text in row.values())


def test_an_algorithm_is_a_frozen_value():
    assert replace(GRPO) == GRPO
    assert hash(replace(GRPO)) == hash(GRPO)
    with pytest.raises(AttributeError):
        GRPO.name = "x"  # type: ignore[misc]
    assert isinstance(GRPO, Algorithm)
