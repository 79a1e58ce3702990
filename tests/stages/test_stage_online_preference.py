"""Online preference optimisation: who is compared with whom, what is learnt from it, and XPO's term by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from kills import KILLED, at_call, differences, fork
from world import World, play

from klimb.batch import Row, TokenBatch
from klimb.errors import ConfigError, RewardError
from klimb.models.faces import policy_logps
from klimb.objective.preference import parse_preference
from klimb.stages.online_preference import part, ranked
from klimb.stages.preference import Update
from klimb.types import Group, Prompt, Sample, Segment

SMALL: dict[str, Any] = {"prompts_per_step": 6, "max_tokens": 4}


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "ipo"}, {"opponent": "reference"}, {"opponent": "reference", "optimism": 0.01}, {"loss": "beta_dpo"}],
    ids=str,
)
def test_the_reward_is_climbed(world: World, tmp_path: Path, settings: dict[str, Any]) -> None:
    done = play(
        "online_preference", tmp_path, model=world.model, data=world.prompts, reward=world.reward("count"),
        gold=world.reward("count"), steps=60, **{**SMALL, "prompts_per_step": 24, **settings},
    )  # fmt: skip
    after = sum(row["reward/mean"] for row in done.rows[-10:]) / 10
    assert after > done.rows[0]["reward/mean"] + 0.15
    assert done.rows[3]["gold/mean"] == pytest.approx(done.rows[3]["reward/mean"])


def test_the_second_completion_is_the_references(world: World, tmp_path: Path) -> None:
    """With a policy that is trained away from it, only the first sample of each prompt moves."""
    done = play(
        "online_preference", tmp_path, model=world.model, data=world.prompts, reward=world.reward("count"),
        opponent="reference", steps=80, **{**SMALL, "prompts_per_step": 24},
    )  # fmt: skip
    files = sorted((done.path / "samples").glob("*.parquet"))[-20:]
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    scores = [[row["score"] for row in rows if row["sample"] == which] for which in (0, 1)]
    first, second = (sum(each) / len(each) for each in scores)
    start = done.rows[0]["reward/mean"]  # of 48 samples, before the first update
    assert first > second + 0.15
    assert second == pytest.approx(start, abs=0.1)


def test_ranked_leaves_out_what_cannot_be_compared() -> None:
    prompt = Prompt("p", [1, 2], "a ?")

    def sample(token: int, score: float | None) -> Sample:
        return Sample("p", 0, [Segment([token], True, [-1.0], [0])], "stop", "x", {}, score)

    pairs = [
        ((5, 1.0), (6, 0.0)),
        ((5, 0.0), (6, 1.0)),
        ((5, 1.0), (6, 1.0)),
        ((5, None), (6, 1.0)),
        ((5, 1.0), (5, 0.0)),
    ]
    items, second = ranked([Group(prompt, [sample(*a), sample(*b)]) for a, b in pairs])
    assert [(item.chosen, item.rejected) for item in items] == [([5], [6]), ([6], [5])]
    assert second == [(False, True), (True, False)]


def test_optimism_is_alpha_times_log_pi_of_the_second_completions(world: World, tmp_path: Path) -> None:
    from klimb.models.backbone import Backbone
    from klimb.models.faces import Policy
    from klimb.models.load import load_causal

    network, _ = load_causal(world.model, torch.device("cpu"), torch.float64)
    policy = Policy(Backbone(network), None)
    rows = [[Row([1, 5, 4], done, [True] * len(done))] for done in ([11, 12, 2], [11, 2], [12, 2], [13, 11, 2])]
    batch = TokenBatch.from_rows(rows, [0, 0, 1, 1], list("abcd"), whole_groups=True)
    logps = policy_logps(policy, batch, budget=64).logps
    batch = batch.with_columns(
        side=torch.tensor([0, 1, 0, 1]), ref_logps=logps, theirs=torch.tensor([False, True, True, False])
    )
    update = Update(policy, parse_preference("dpo"), None)  # type: ignore[arg-type]
    plain, hopeful = (part(update, {}, alpha, batch, batch.totals)[0].item() for alpha in (0.0, 0.3))
    theirs = float(logps[1].sum() + logps[2].sum())
    assert hopeful - plain == pytest.approx(0.3 * theirs / 2, rel=1e-9)
    halves = [batch.select(index) for index in ([0, 1], [2, 3])]
    assert sum(part(update, {}, 0.3, half, batch.totals)[0].item() for half in halves) == pytest.approx(hopeful)


@pytest.mark.parametrize("nth", [2, 5])
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_one(world: World, tmp_path: Path, nth: int) -> None:
    run = partial(
        play, "online_preference", model=world.model, data=world.prompts, reward=world.reward("count"),
        opponent="reference", optimism=0.01, loss="beta_dpo", steps=6, checkpoint_every=2, **SMALL,
    )  # fmt: skip
    run(out=tmp_path / "whole")
    with at_call("klimb.stages.online_preference.drawn", nth):
        assert fork(lambda: run(out=tmp_path / "killed")) == KILLED
    run(out=tmp_path / "killed")
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"optimism": 0.1}, ConfigError, "set opponent=reference"),
        ({"loss": "kto"}, ConfigError, "loss=kto: it learns from labels"),
        ({"loss": "dpoo"}, ConfigError, "did you mean 'dpo"),
    ],
)
def test_what_makes_no_sense(
    world: World, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        play(
            "online_preference", tmp_path, model=world.model, data=world.prompts, reward=world.reward("count"),
            **SMALL, **settings,
        )  # fmt: skip


def test_a_reward_that_tells_nothing_apart(world: World, tmp_path: Path) -> None:
    rewards = tmp_path / "flat.py"
    rewards.write_text("def flat(completions):\n    return [1.0] * len(completions)\n")
    with pytest.raises(RewardError, match="step 1: no pair to learn from out of 6"):
        play(
            "online_preference", tmp_path / "run", model=world.model, data=world.prompts, reward=f"{rewards}:flat",
            steps=2, **SMALL,
        )  # fmt: skip
