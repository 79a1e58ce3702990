"""Every algorithm climbs a reward that anybody can check, and nothing climbs one that was dealt out at random."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
from world import FAST, SMALL_RL, WORDS, World, lines, play, write

from klimb.data.sampler import Sampler
from klimb.errors import KlimbError, RewardError
from klimb.objective.algorithms import ALGORITHMS, GRPO
from klimb.objective.kl import NO_KL
from klimb.stages import rl
from klimb.stages.experience import next_prompts
from klimb.types import Prompt

BEST_FIRST = '''
def best_first(completions, answer):
    """1 when the reply begins with the letter that was asked about."""
    return [float(reply.split()[:1] == [letter]) for reply, letter in zip(completions, answer)]
'''
EOS = len(WORDS) + 2
OWN = '''
from dataclasses import replace
import torch
from klimb.objective.algorithms import GRPO
from klimb.objective.kl import NO_KL

def centred(scores, group):
    """Score less the mean of its group."""
    means = torch.stack([scores[group == g].mean() for g in group])
    return scores - means

MINE = replace(GRPO, name="mine", kl=NO_KL)

def hinge(pairs):
    return (1 - pairs.margin()).clamp(min=0)

'''


def gold(rows: list[dict[str, Any]], part: slice) -> float:
    values = [row["gold/mean"] for row in rows[part]]
    return sum(values) / len(values)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_climbs(world: World, tmp_path: Path, algorithm: str) -> None:
    critic = {"critic": {"optimizer": FAST}} if ALGORITHMS[algorithm].critic else {}
    count: Any = world.reward("count")
    if ALGORITHMS[algorithm].needs.parts:
        count = [{"reward": count, "name": "count"}, {"reward": count, "weight": 0.0, "name": "again"}]
    done = play(
        "rl",
        tmp_path / "run",
        model=world.model,
        data=world.prompts,
        reward=count,
        # At its own β, of rewards in the hundreds, dro stays with the reference here; and between scores of 0 and 1 no
        # preference is far from ½.
        algorithm={"name": algorithm, "kl": {"beta": 0.02}} if algorithm in ("dro", "nash_md") else algorithm,
        steps=12,
        **SMALL_RL,
        **critic,
    )
    assert done.rows[0]["reward/mean"] < 0.3
    assert done.rows[-1]["reward/mean"] > 0.75
    assert done.result["algorithm"] == algorithm or done.result["algorithm"].startswith(f"{algorithm}(")
    assert len(list((done.path / "samples").iterdir())) == 12


def test_a_reference_set_anew_at_every_step_is_the_policy(world: World, tmp_path: Path) -> None:
    """From the second step on the KL at sampling is nothing; with an older one it grows."""
    common = {"model": world.model, "data": world.prompts, "reward": world.reward("count"), "steps": 4, **SMALL_RL}
    anew, half, fixed = (
        play("rl", tmp_path / f"run-{number}", algorithm={"name": "grpo", "reference": schedule}, **common).rows
        for number, schedule in enumerate([{"moving": [1, 1]}, {"moving": [2, 0.5]}, "none"])
    )
    assert max(row["kl"] for row in anew) < 1e-4 < 0.1 < fixed[-1]["kl"]
    assert [row["kl"] for row in half[:2]] == [row["kl"] for row in fixed[:2]]
    assert half[2]["kl"] < fixed[2]["kl"]


def test_samples_that_were_cut_are_compared_with_and_not_learnt_from(world: World, tmp_path: Path) -> None:
    algorithm = {"name": "dr_grpo", "overlong": "leave_out"}
    common = {"model": world.model, "data": world.prompts, "reward": world.reward("count"), "steps": 1, **SMALL_RL}
    found = play("rl", tmp_path / "run", algorithm=algorithm, **common)
    whole = play("rl", tmp_path / "whole", algorithm="dr_grpo", **common)
    assert 0 < found.rows[0]["finish/length"] < 1
    assert found.rows[0]["advantage/std"] == whole.rows[0]["advantage/std"]
    assert found.rows[0]["entropy"] != whole.rows[0]["entropy"]  # of the tokens that are learnt from


def test_solved_prompts_rest_and_come_back(world: World, tmp_path: Path) -> None:
    """Everything counts as solved: a prompt drawn at step 1 is not drawn at step 2, and all are when all rest."""
    common = {"model": world.model, "data": world.prompts, "reward": world.reward("count"), **SMALL_RL}
    common |= {"prompts_per_step": 2, "steps": 6, "algorithm": {"name": "grpo", "curriculum": {"skip_solved": [0, 2]}}}
    done = play("rl", tmp_path / "run", **common)
    drawn = []
    for step in range(1, 7):
        table = pyarrow.parquet.read_table(tmp_path / "run" / "samples" / f"step-{step:06d}.parquet").to_pylist()
        drawn.append({row["prompt_id"] for row in table})
    for one, two, three in zip(drawn, drawn[1:], drawn[2:]):
        assert len(one | two | three) == 6
    assert len(done.rows) == 6


def test_greedy_baselines_and_values_of_the_reference(world: World, tmp_path: Path) -> None:
    """The greedy reply of a prompt is one; π_ref's draws are made once for a prompt, at its first step."""
    asked: list[int] = []

    def counted(completions: list[str]) -> list[float]:
        asked.append(len(completions))
        return [float(text.count("yes")) for text in completions]

    common = {"model": world.model, "data": world.prompts, "reward": counted, "steps": 2, **SMALL_RL}
    play("rl", tmp_path / "greedy", algorithm="remax", **common)
    assert asked[-4:] == [48, 6, 48, 6]
    play("rl", tmp_path / "values", algorithm="a_star_po", **common)
    assert asked[-3:] == [48, 48, 48]  # 6 prompts of 8 samples each, 8 draws for each of the 6 prompts, and again 48


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_the_opponent_stays_with_the_reference_or_moves_with_the_policy(
    world: World, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    """Four further completions of each prompt a step, drawn anew, by whom the mixture says."""
    asked: list[list[float]] = []

    def noted(completions: list[str]) -> list[float]:
        asked.append([10 * text.split().count("yes") / max(len(text.split()), 1) for text in completions])
        return asked[-1]

    common = {"model": world.model, "data": world.prompts, "reward": noted, "lora": lora, "steps": 20, **SMALL_RL}
    levels = []
    for share in (0, 0.5, 1):
        asked.clear()
        algorithm = {"name": "nash_md", "advantage": {"preferred": [share, 4]}, "kl": {"beta": 0.02}}
        done = play("rl", tmp_path / f"run-{share}", algorithm=algorithm, **common)
        assert [len(scores) for scores in asked[-40:]] == [48, 24] * 20
        assert len({tuple(scores) for scores in asked[-39::2]}) > 10
        own, theirs = (statistics.mean(itertools.chain(*asked[-n::2])) for n in (12, 11))
        assert done.rows[-1]["samples/drawn"] == 20 * 72
        levels.append((own, theirs))
    self_play, between, fixed = levels
    assert min(own for own, _ in levels) > 5  # from 2 or so
    assert self_play[1] == pytest.approx(self_play[0], abs=1)
    assert fixed[1] < 2
    assert fixed[1] + 1 < between[1] < between[0] - 2


def test_without_a_kl_the_opponent_is_still_drawn_from_the_reference(world: World, tmp_path: Path) -> None:
    common = {"model": world.model, "data": world.prompts, "reward": world.reward("count"), "steps": 2, **SMALL_RL}
    done = play("rl", tmp_path / "run", algorithm={"name": "nash_md", "kl": "none"}, **common)
    assert "kl" in done.rows[-1]
    alone = {"name": "nash_md", "kl": "none", "advantage": {"preferred": 0}}
    assert "kl" not in play("rl", tmp_path / "alone", algorithm=alone, **common).rows[-1]


def test_nothing_is_learnt_from_shuffled_rewards(world: World, tmp_path: Path) -> None:
    """The control: the same numbers in random order. What climbs here climbs by mistake."""
    run = {"model": world.model, "data": world.prompts, "gold": world.reward("count"), "steps": 12, **SMALL_RL}
    honest = play("rl", tmp_path / "honest", reward=world.reward("count"), **run)
    control = play("rl", tmp_path / "control", reward=world.reward("shuffled"), **run)
    assert honest.rows[0]["gold/mean"] == control.rows[0]["gold/mean"]  # the same first samples
    assert gold(honest.rows, slice(-3, None)) > 0.8
    assert gold(control.rows, slice(-3, None)) < gold(control.rows, slice(0, 3)) + 0.2


def test_the_reward_arrives_at_the_sample_that_earned_it(world: World, tmp_path: Path) -> None:
    done = play(
        "rl",
        tmp_path / "run",
        model=world.model,
        data=world.prompts,
        reward=world.reward("count"),
        gold=world.reward("count"),
        steps=2,
        **SMALL_RL,
    )
    table = pyarrow.parquet.read_table(done.path / "samples" / "step-000002.parquet").to_pylist()
    assert len(table) == 6 * 8
    for row in table:
        words = row["completion"].split()
        assert row["score"] == row["reward.count"] == row["gold"] == words.count("yes") / max(len(words), 1)
        assert len(row["tokens"]) == len(row["logps"]) <= 4
        assert row["version"] == 2
        assert (row["finish"] == "stop") == (row["tokens"][-1] == EOS)
    assert done.rows[1]["reward/mean"] == pytest.approx(sum(row["score"] for row in table) / len(table))
    assert done.rows[1]["tokens"] == sum(len(row["tokens"]) for row in table)


def test_samples_without_a_score_leave_and_so_do_groups_that_are_too_small(world: World, tmp_path: Path) -> None:
    done = play(
        "rl", tmp_path / "run", model=world.model, data=world.prompts, reward=world.reward("some"), steps=2, **SMALL_RL
    )
    for step, measured in enumerate(done.rows, start=1):
        table = pyarrow.parquet.read_table(done.path / "samples" / f"step-{step:06d}.parquet").to_pylist()
        assert all(not row["completion"].startswith("no") for row in table)
        assert "b ?" not in {row["prompt"] for row in table}  # one scored sample has nothing to be compared with
        assert measured["groups/drawn"] == 6
        assert measured["groups/kept"] == 5
        assert measured["samples/dropped"] == 6 * 8 - len(table) >= 8
        assert measured["reward/mean"] == pytest.approx(sum(row["score"] for row in table) / len(table))


def groups_of_8(table: list[dict[str, Any]]) -> list[set[float]]:
    """The different scores of each group."""
    return [{row["score"] for row in table[place : place + 8]} for place in range(0, len(table), 8)]


def test_dynamic_sampling_says_when_refills_run_out(world: World, tmp_path: Path) -> None:
    run = {"model": world.model, "data": world.prompts, "reward": world.reward("rare"), "steps": 3, **SMALL_RL}
    done = play("rl", tmp_path / "run", algorithm="dapo", max_refills=0, **run)
    short = [row["step"] for row in done.rows if row["groups/kept"] < 6]
    assert short
    assert [(event["step"], event["kind"]) for event in done.events] == [(step, "too_few_groups") for step in short]
    kept, refused = (int(done.rows[short[0] - 1][f"groups/{what}"]) for what in ("kept", "refused"))
    assert kept + refused == 6
    assert done.events[0]["message"] == (
        f"trained on {kept} of 6 groups: after max_refills=0 further rounds of prompts {refused} groups were refused, "
        "all samples of each scored the same; use easier or harder prompts, or raise max_refills"
    )
    assert "groups/refused" not in play("rl", tmp_path / "all", algorithm="grpo", **run).rows[0]


def test_dynamic_sampling_refills_until_groups_differ(world: World, tmp_path: Path) -> None:
    run = {"model": world.model, "data": world.prompts, "reward": world.reward("rare"), "steps": 4, **SMALL_RL}
    done = play("rl", tmp_path / "run", algorithm="dapo", max_refills=30, **run)
    assert any(row["groups/drawn"] > 6 for row in done.rows)
    for step, measured in enumerate(done.rows, start=1):
        table = pyarrow.parquet.read_table(done.path / "samples" / f"step-{step:06d}.parquet").to_pylist()
        scores = {part: groups_of_8([row for row in table if row["trained"] is part]) for part in (True, False)}
        assert all(len(values) == 2 for values in scores[True])
        assert measured["groups/kept"] == len(scores[True]) == 6
        assert all(len(values) == 1 for values in scores[False])  # the refused are kept to be looked at
        assert measured["groups/refused"] == len(scores[False]) == measured["groups/drawn"] - 6
    assert not done.events
    hard = write(tmp_path / "impossible.jsonl", [{"prompt": "a ?", "answer": "never"}])
    run |= {"data": hard, "reward": "exact", "prompts_per_step": 1}
    with pytest.raises(KlimbError, match="no group to learn from out of 6"):
        play("rl", tmp_path / "none", algorithm="dapo", max_refills=5, **run)


def test_a_refill_takes_no_more_prompts_than_it_needs() -> None:
    prompts = [Prompt(str(i), [], "?") for i in range(10)]
    actors: Any = SimpleNamespace(prompts=prompts, sampler=Sampler(10, 4), algorithm=ALGORITHMS["dapo"])
    drawn = [next_prompts(actors, wanted, 1) for wanted in (4, 1, 2, 3)]
    assert [len(each) for each in drawn] == [4, 1, 2, 3]
    assert {prompt.id for each in drawn for prompt in each} == {prompt.id for prompt in prompts}


def test_the_parts_of_a_reward_are_logged_over_all_refills(world: World, tmp_path: Path) -> None:
    done = play("rl", tmp_path / "run", model=world.model, data=world.prompts, reward=world.reward("rare"), steps=3,
                algorithm="dapo", max_refills=30, **SMALL_RL)  # fmt: skip
    assert any(row["groups/drawn"] > 6 for row in done.rows)
    for step, row in enumerate(done.rows, start=1):
        table = pyarrow.parquet.read_table(done.path / "samples" / f"step-{step:06d}.parquet").to_pylist()
        assert row["reward/rare"] == pytest.approx(sum(each["score"] for each in table) / len(table))


def test_training_ends_when_so_many_completions_are_drawn(world: World, tmp_path: Path) -> None:
    """Refused groups count, and so do samples that only serve as baselines."""
    run = {"model": world.model, "data": world.prompts, "reward": world.reward("rare"), "steps": 20, **SMALL_RL}
    done = play("rl", tmp_path / "run", algorithm="dapo", max_refills=30, max_samples=600, **run)
    drawn = [row["samples/drawn"] for row in done.rows]
    assert drawn == list(itertools.accumulate(row["groups/drawn"] * 8 for row in done.rows))
    assert drawn[-2] < 600 <= drawn[-1]
    assert done.result["steps"] == len(drawn) < 12
    remax = play("rl", tmp_path / "remax", algorithm="remax", max_samples=108, **run)
    assert [row["samples/drawn"] for row in remax.rows] == [54, 108]  # 6 prompts, 8 samples and one greedy reply each


def test_a_reward_model_on_a_scale_that_follows_the_training(world: World, tmp_path: Path) -> None:
    judge = play("reward", tmp_path / "judge", model=world.model, data=world.preferences, steps=8, batch_size=18)
    run = {"model": world.model, "data": world.prompts, "steps": 3, "algorithm": "ppo", **SMALL_RL}
    reward = {"reward": judge.model, "normalise": "running", "clip": 1.0}
    done = play("rl", tmp_path / "run", reward=reward, **run)
    seen: list[float] = []
    for step, measured in enumerate(done.rows, start=1):
        table = pyarrow.parquet.read_table(done.path / "samples" / f"step-{step:06d}.parquet").to_pylist()
        given = [row["reward.judge"] for row in table]  # by the figures of the reference samples, for life
        seen += given
        mean, std = statistics.fmean(seen), statistics.stdev(seen)
        assert [row["score"] for row in table] == pytest.approx([min(1, max(-1, (x - mean) / std)) for x in given])
        assert measured["reward/judge"] == pytest.approx(statistics.fmean(given))
    assert any(abs(row["score"]) == 1.0 for row in table)
    measure = {"data": world.prompts, "max_tokens": 4}
    with pytest.raises(RewardError, match=r"two measurements incomparable; leave normalise out"):
        play("rl", tmp_path / "measured", reward=reward, measure={**measure, "reward": reward}, **run)
    with pytest.raises(RewardError, match=r"two measurements incomparable; leave normalise out"):
        play("rl", tmp_path / "gold", reward=reward, gold=reward, **run)
    frozen = play("evaluate", tmp_path / "frozen", model=world.model, measure={**measure, "reward": judge.model})
    bounded = {**measure, "reward": {"reward": judge.model, "clip": 1e-3}}
    assert abs(frozen.result["evaluation"]["proxy"]) > 1e-3
    assert (
        abs(play("evaluate", tmp_path / "bounded", model=world.model, measure=bounded).result["evaluation"]["proxy"])
        <= 1e-3
    )


@pytest.mark.parametrize("start", ["policy", "reward model"])
def test_the_critic_warms_up_alone(world: World, tmp_path: Path, start: str) -> None:
    critic: dict[str, Any] = {"optimizer": FAST, "warmup_steps": 3}
    if start == "reward model":
        judge = play("reward", tmp_path / "judge", model=world.model, data=world.preferences, steps=5, batch_size=18)
        critic["model"] = judge.model
    done = play(
        "rl",
        tmp_path / "run",
        model=world.model,
        data=world.prompts,
        reward=world.reward("count"),
        algorithm="ppo",
        steps=12,
        critic=critic,
        **SMALL_RL,
    )
    assert ["grad_norm" in row for row in done.rows] == [False] * 3 + [True] * 9
    assert all("critic/loss" in row for row in done.rows)
    assert all(abs(row["kl"]) < 1e-5 for row in done.rows[:4])  # the policy has not moved
    assert done.rows[5]["kl"] > 0
    assert done.rows[-1]["reward/mean"] > 0.75
    first = done.rows[0]["critic/explained_variance"]
    assert (first == pytest.approx(0, abs=1e-6)) == (start == "policy")  # a head of zeros says the same of all


def test_several_updates_on_one_batch_leave_the_ratio_behind(world: World, tmp_path: Path) -> None:
    done = play(
        "rl",
        tmp_path / "run",
        model=world.model,
        data=world.prompts,
        reward=world.reward("count"),
        steps=6,
        updates_per_step=3,
        **SMALL_RL,
    )
    assert max(row["ratio/max"] for row in done.rows) > 1.05
    assert done.rows[-1]["reward/mean"] > 0.75


def test_algorithms_rewards_and_losses_of_ones_own(world: World, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    reward = tmp_path / "reward.py"
    reward.write_text(BEST_FIRST)
    run = {"model": world.model, "data": world.prompts, "reward": f"{reward}:best_first", "steps": 15, **SMALL_RL}
    done = play("rl", tmp_path / "named", algorithm=f"{own}:MINE", **run)
    assert done.result["algorithm"].startswith("mine(")
    assert done.rows[-1]["reward/mean"] > done.rows[0]["reward/mean"] + 0.2
    value = play("rl", tmp_path / "value", algorithm=replace(GRPO, name="mine", kl=NO_KL), **run)
    assert [row["loss"] for row in value.rows] == [row["loss"] for row in done.rows]
    pairs = play(
        "preference",
        tmp_path / "pairs",
        model=world.model,
        data=world.preferences,
        loss=f"{own}:hinge",
        steps=20,
        batch_size=18,
    )
    assert pairs.rows[0]["loss"] == pytest.approx(1.0)
    assert pairs.rows[-1]["accuracy"] > 0.95


def test_a_callable_from_python_is_a_reward(world: World, tmp_path: Path) -> None:
    def shortness(completions: list[str]) -> list[float]:
        return [-float(len(text.split())) for text in completions]

    done = play("rl", tmp_path / "run", model=world.model, data=world.prompts, reward=shortness, steps=12, **SMALL_RL)
    assert done.rows[-1]["length/mean"] < done.rows[0]["length/mean"] - 1


def test_a_step_reads_no_algorithm_name() -> None:
    """An algorithm is a value of the table: the loop compares nothing with a name."""
    source = Path(str(rl.__file__)).read_text()
    assert not [name for name in ALGORITHMS if f'== "{name}"' in source or f"== '{name}'" in source]


def test_failures_carry_the_step_in_progress(world: World, tmp_path: Path) -> None:
    def broken(completions: list[str]) -> list[float]:
        return [math.nan if text.startswith("so") else 0.0 for text in completions]

    done = play(
        "rl",
        tmp_path / "run",
        model=world.model,
        data=world.prompts,
        reward=broken,
        steps=3,
        failure_limit=1.0,
        **SMALL_RL,
    )
    failures = [event for event in done.events if event["kind"] == "reward_failure"]
    assert {event["step"] for event in failures} == {1, 2, 3}
    assert all("returned nan" in event["message"] for event in failures)
    dropped = {step: sum(event["step"] == step for event in failures) for step in (1, 2, 3)}
    assert [row["samples/dropped"] for row in done.rows] == list(dropped.values())
    assert lines(done.path / "events.jsonl") == done.events
