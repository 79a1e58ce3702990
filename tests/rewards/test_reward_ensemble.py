"""Ensembles of reward models: each way to combine, by hand; what is kept of a row; what cannot be an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from klimb.errors import RewardError
from klimb.rewards.ensemble import Ensemble, combined, spread
from klimb.rewards.protocol import FakeReward, Reward
from klimb.rewards.scorer import Scorer
from klimb.rewards.spec import parse_reward, reward_files
from klimb.types import Group, Prompt, Sample

OPINIONS = {"a": {"x": 1.0, "y": -1.0}, "b": {"x": 3.0, "y": -1.0}, "c": {"x": 8.0, "y": 2.0}}


def load(name: str) -> Reward:
    opinion = OPINIONS[Path(name).name]
    return FakeReward(lambda text: opinion.get(str(text)), name=Path(name).name)


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    for name in OPINIONS:
        (tmp_path / name).mkdir()
    return [str(tmp_path / name) for name in OPINIONS]


def ensemble(models: list[str], **options: Any) -> Reward:
    return parse_reward({"ensemble": {"models": models, **options}}, model_loader=load)


def test_a_row_by_hand() -> None:
    scores = [1.0, 3.0, 8.0]  # mean 4; squared distances 9, 1, 16: variance 26/3
    assert combined(scores, "mean") == 4.0
    assert combined(scores, "min") == 1.0
    assert combined(scores, "uncertainty", 0.5) == pytest.approx(4 - 0.5 * 26 / 3, rel=1e-12)
    assert spread(scores) == pytest.approx((26 / 3) ** 0.5, rel=1e-12)
    assert spread([2.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    ("options", "x", "y"),
    [
        ({}, 4.0, 0.0),
        ({"combine": "mean"}, 4.0, 0.0),
        ({"combine": "min"}, 1.0, -1.0),
        ({"combine": "uncertainty", "lambda": 0.1}, 4 - 0.1 * 26 / 3, 0 - 0.1 * 2),
    ],
)
def test_each_way_to_combine(models: list[str], options: dict[str, Any], x: float, y: float) -> None:
    scores = ensemble(models, **options)(["p", "p"], ["x", "y"], {})
    assert scores.values == pytest.approx([x, y], rel=1e-12)
    assert scores.parts["ensemble"] == scores.values
    assert scores.parts["disagreement"] == pytest.approx([(26 / 3) ** 0.5, 2**0.5], rel=1e-12)
    assert not scores.failures


def test_disagreement_is_a_metric_and_stays_with_each_sample(models: list[str]) -> None:
    samples = [Sample("p", i, [], "stop", text) for i, text in enumerate("xy")]
    group = Group(Prompt("p", [], "p"), samples)
    report = Scorer(ensemble(models, combine="min")).score([group])
    assert report.metrics["reward/disagreement"] == pytest.approx(((26 / 3) ** 0.5 + 2**0.5) / 2)
    assert samples[0].score == samples[0].rewards["ensemble"] == 1.0
    assert samples[1].rewards["disagreement"] == pytest.approx(2**0.5)


def test_within_a_sum_and_under_a_scale(models: list[str]) -> None:
    spec = [
        {"reward": {"ensemble": {"models": models}}, "weight": 2.0, "name": "rm", "clip": 3.0},
        {"reward": {"length": {"unit": "words"}}},
    ]
    scores = parse_reward(spec, model_loader=load)(["p"], ["x"], {})
    assert scores.values == [2 * 3.0 + 1.0]
    assert scores.parts == {"rm": [4.0], "rm/disagreement": [pytest.approx((26 / 3) ** 0.5)], "length": [1.0]}
    assert scores.weights == {"rm": 2.0, "length": 1.0}


def test_a_row_that_a_member_does_not_score_has_no_score() -> None:
    silent = FakeReward(lambda text: None if text == "y" else 1.0, name="silent")
    broken = FakeReward(lambda text: 2.0, fail=lambda call, row: row == 2, name="broken")
    both = Ensemble([silent, broken])
    scores = both(["p"] * 3, ["x", "y", "z"], {})
    assert scores.values == [1.5, None, None]
    assert scores.parts["disagreement"] == [0.5, None, None]
    assert [(failure.row, failure.reason) for failure in scores.failures] == [(2, "broken: told to fail")]
    both.close()
    assert silent.closed
    assert broken.closed


def test_the_folders_of_an_ensemble_are_its_files(models: list[str]) -> None:
    spec = [{"reward": {"ensemble": {"models": models, "combine": "min"}}, "weight": 2.0}, "exact"]
    assert reward_files(spec) == [Path(model) for model in models]


def test_members_that_were_opened_are_closed_when_one_cannot_be(models: list[str]) -> None:
    opened: list[FakeReward] = []

    def some(name: str) -> Reward:
        if opened:
            raise RewardError("no")
        opened.append(FakeReward())
        return opened[0]

    with pytest.raises(RewardError, match=r"^no$"):
        parse_reward({"ensemble": {"models": models}}, model_loader=some)
    assert opened[0].closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["a"]}, r"models is \['a'\]: it takes two members"),
        ({"models": "a"}, r"models is 'a'"),
        ({}, r"models is None"),
        ({"models": ["a", "a"]}, r"named twice: it agrees with itself"),
        ({"models": ["a", "b"], "combine": "max"}, r"combine is 'max'; known: mean, min, uncertainty"),
        ({"models": ["a", "b"], "combine": "uncertainty"}, r"uncertainty with lambda None.*give it with"),
        ({"models": ["a", "b"], "lambda": 0.5}, r"mean with lambda 0.5"),
        ({"models": ["a", "b"], "combine": "uncertainty", "lambda": -1}, r"lambda is -1; give a finite number above 0"),
        ({"models": ["a", "b"], "combine": "uncertainty", "lambda": True}, r"lambda is True"),
        ({"models": ["a", "b"], "lamda": 0.5}, r"unknown option 'lamda'; did you mean 'lambda'"),
    ],
)
def test_what_is_no_ensemble(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        parse_reward({"ensemble": options}, model_loader=load)


def test_where_no_model_can_be_used() -> None:
    with pytest.raises(RewardError, match="cannot be used here"):
        parse_reward({"ensemble": {"models": ["a", "b"]}})
