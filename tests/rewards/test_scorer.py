import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from klimb.errors import RewardError
from klimb.rewards.combine import Part, WeightedSum
from klimb.rewards.function import from_callable
from klimb.rewards.protocol import Failure, FakeReward, Scores
from klimb.rewards.scorer import RESERVED, Scorer, dry_run
from klimb.rewards.spec import parse_reward
from klimb.types import Group, Prompt, Sample, Segment


def group(name: str, texts: list[str], **columns: Any) -> Group:
    samples = [
        Sample(name, index, [Segment([1] * len(text)), Segment([2, 2], policy=False)], "stop", text)
        for index, text in enumerate(texts)
    ]
    return Group(Prompt(name, [0], f"{name}?", columns), samples)


def by_text(table: dict[str, float | None]) -> FakeReward:
    return FakeReward(score=lambda text: table[str(text)])


@dataclass
class ByHand:
    """A reward of which the scores are given."""

    scores: Scores
    name: str = "by hand"

    def __call__(self, *_: Any) -> Scores:
        return self.scores

    def close(self) -> None: ...


def test_scores_and_parts_land_in_the_samples() -> None:
    groups = [group("p", ["a", "bb"]), group("q", ["ccc", "dddd"])]
    reward = WeightedSum([Part("length", FakeReward(), 2.0), Part("one", FakeReward(score=lambda _: 1.0), -1.0)])
    report = Scorer(reward).score(groups)
    assert [sample.score for g in groups for sample in g.samples] == [1.0, 3.0, 5.0, 7.0]
    assert groups[1].samples[0].rewards == {"length": 3.0, "one": 1.0}
    assert report.groups == groups
    assert (report.scored, report.failed, report.abstained) == (4, 0, 0)
    # mean (1+3+5+7)/4 = 4, variance (9+1+1+9)/4 = 5
    assert {key: value for key, value in report.metrics.items() if not key.startswith("verdict/")} == {
        "reward/mean": 4.0,
        "reward/std": math.sqrt(5),
        "reward/length": 2.5,
        "reward/one": 1.0,
    }


def test_none_leaves_its_group_and_small_groups_are_dropped_and_counted() -> None:
    groups = [group("p", ["a", "b", "c"]), group("q", ["a", "b"]), group("r", ["b", "b"])]
    table = {"a": 1.0, "b": None, "c": 3.0}
    report = Scorer(by_text(table)).score(groups)
    assert [(g.prompt.id, [s.text for s in g.samples]) for g in report.groups] == [("p", ["a", "c"])]
    assert (report.scored, report.abstained, report.failed) == (3, 4, 0)
    assert (report.dropped_groups, report.dropped_samples) == (2, 5)
    assert [len(g.samples) for g in groups] == [3, 2, 2]  # what was given stays whole, for the record
    report = Scorer(by_text(table), min_scored=1).score(groups)
    assert [g.prompt.id for g in report.groups] == ["p", "q"]
    assert report.dropped_groups == 1


def test_zero_is_a_score() -> None:
    report = Scorer(by_text({"a": 0.0, "b": None})).score([group("p", ["a", "a", "b"])])
    assert [[s.score for s in g.samples] for g in report.groups] == [[0.0, 0.0]]
    assert (report.scored, report.dropped_samples) == (2, 1)


def test_a_failure_is_an_event_and_no_score() -> None:
    events: list[dict[str, Any]] = []
    groups = [group("p", ["a", "bb", "c"])]
    report = Scorer(FakeReward(fail=lambda call, row: row == 1), on_event=events.append).score(groups)
    assert [sample.score for sample in groups[0].samples] == [1.0, None, 1.0]
    assert report.failed == 1
    assert events == [
        {
            "kind": "reward_failure",
            "message": "told to fail",
            "reward": "fake",
            "prompt_id": "p",
            "sample": 1,
            "traceback": "",
        }
    ]


def test_a_retry_is_an_event() -> None:
    events: list[dict[str, Any]] = []

    reward = ByHand(Scores([1.0, 2.0], notes=["scored again"]))
    Scorer(reward, on_event=events.append).score([group("p", ["a", "b"])])
    assert events == [{"kind": "reward_retry", "message": "scored again", "reward": "by hand"}]


def rows_until_stop(limit: float, fail: Callable[[int, int], bool], calls: int = 100) -> int | None:
    """How many batches of 10 rows pass before the run is stopped."""
    scorer = Scorer(FakeReward(fail=fail), failure_limit=limit)
    for call in range(calls):
        try:
            scorer.score([group("p", ["a"] * 10)])
        except RewardError:
            return call + 1
    return None


def test_the_share_of_failures_stops_the_run() -> None:
    assert rows_until_stop(0.05, lambda call, row: True) == 1  # 10 of 10
    assert rows_until_stop(0.05, lambda call, row: call == 0 and row < 5) is None  # 5 of the first 100 are accepted
    assert rows_until_stop(0.05, lambda call, row: call == 0 and row < 6) == 1
    assert rows_until_stop(0.05, lambda call, row: row < 1) == 6  # 10 % of all: the sixth failure is too many
    assert rows_until_stop(0.10, lambda call, row: row < 1) is None  # just at the limit
    assert rows_until_stop(0.0, lambda call, row: call == 7 and row == 3) == 8
    assert rows_until_stop(1.0, lambda call, row: True) is None


def test_the_counts_of_a_run_go_on_after_a_resume() -> None:
    def fail(call: int, row: int) -> bool:
        return row < 1

    whole = Scorer(FakeReward(fail=fail))
    for _ in range(5):
        whole.score([group("p", ["a"] * 10)])
    resumed = Scorer(FakeReward(fail=fail))
    resumed.counts = dict(whole.counts)
    with pytest.raises(RewardError, match=r"6 of 60 rows failed, more than failure_limit=0\.05 accepts"):
        resumed.score([group("p", ["a"] * 10)])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (Scores([1.0]), "1 scores for 2 completions"),
        (Scores([1.0, float("nan")]), "scores of row 1 is nan"),
        (Scores([1.0, "2"]), "scores of row 1 is '2'"),  # type: ignore[list-item]
        (Scores([1.0, 2.0], parts={"x": [1.0]}), "1 x for 2 completions"),
        (Scores([1.0, 2.0], [Failure(1, "boom")]), "row 1 has failed and has a score"),
    ],
)
def test_a_reward_written_by_hand_is_checked_as_well(scores: Scores, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Scorer(ByHand(scores)).score([group("p", ["a", "b"])])


def test_functions_get_columns_tokens_and_finish() -> None:
    seen: dict[str, Any] = {}

    def look(**columns: list[Any]) -> list[float]:
        seen.update(columns)
        return [0.0] * len(columns["completions"])

    scorer = Scorer(from_callable(look))
    scorer.score([group("p", ["a", "bb"], answer=4), group("q", ["c"], level="hard")])
    scorer.close()
    assert seen["prompts"] == ["p?", "p?", "q?"]
    assert seen["completions"] == ["a", "bb", "c"]
    assert seen["answer"] == [4, 4, None]
    assert seen["level"] == [None, None, "hard"]
    assert seen["completion_ids"] == [[1, 2, 2], [1, 1, 2, 2], [1, 2, 2]]
    assert seen["completion_tokens"] == [1, 2, 1]  # what the policy chose
    assert seen["finish"] == ["stop"] * 3
    assert set(RESERVED) <= set(seen)


def test_a_column_with_a_reserved_name_is_refused() -> None:
    with pytest.raises(RewardError, match=r"column 'finish'.*rename it"):
        Scorer(FakeReward()).score([group("p", ["a"], finish="x")])


def test_a_sum_leaves_out_parts_that_abstain_but_not_parts_that_fail() -> None:
    first = by_text({"a": 1.0, "b": None, "c": None, "d": 4.0})
    second = by_text({"a": 10.0, "b": 20.0, "c": None, "d": 40.0})
    second.fail = lambda call, row: row == 3
    scores = WeightedSum([Part("first", first, 1.0), Part("second", second, 0.5)])(["p"] * 4, list("abcd"), {})
    assert scores.values == [6.0, 10.0, None, None]
    assert scores.failures == [Failure(3, "second: told to fail")]
    assert scores.parts == {"first": [1.0, None, None, 4.0], "second": [10.0, 20.0, None, None]}


def test_a_sum_that_overflows_is_a_failure() -> None:
    big = FakeReward(score=lambda _: 1e308)
    scores = WeightedSum([Part("big", big, 100.0)])(["p"], ["a"], {})
    assert scores.values == [None]
    assert scores.failures == [Failure(0, "the weighted sum is inf")]


def test_closing_a_sum_closes_its_parts() -> None:
    parts = [FakeReward(name="x"), FakeReward(name="y")]
    Scorer(WeightedSum([Part(part.name, part, 1.0) for part in parts])).close()
    assert all(part.closed for part in parts)


def prompts(count: int, **columns: Any) -> list[Prompt]:
    return [Prompt(f"id{row}", [], f"question {row}", columns) for row in range(count)]


def test_a_dry_run_scores_reference_answers() -> None:
    reward = parse_reward("exact")
    dry = dry_run(reward, prompts(20, answer="42"))
    reward.close()
    assert dry.scores.values == [1.0] * 8
    assert dry.lines()[0] == "question 0 → 42: 1.0"
    assert dry_run(FakeReward(), prompts(2)).completions == ["test", "test"]
    messages = Prompt("m", [], [{"role": "user", "content": "hi"}], {"answer": 3})
    conversational = dry_run(from_callable(lambda completions: [len(c[0]["content"]) for c in completions]), [messages])
    assert conversational.lines() == ["hi → 3: 1.0"]
    assert dry_run(parse_reward("length"), prompts(1, answer="one two")).scores.values == [2.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda completions: completions[0].nothing,
            r"AttributeError: .*nothing.*in the dry run on 3 rows: row 1",
        ),
        (lambda completions: [1.0], r"returned 1 scores for 3 completions"),
        (lambda completions: 1.0, r"returned 1.0 \(float\) instead of a list of 3 scores"),
        (lambda completions: None, r"returned None \(NoneType\) instead of a list"),
        (lambda completions: ["1"] * 3, r"returned '1' \(str\)"),
        (lambda completions: [1.0, float("nan"), 1.0], r"returned nan in the dry run on 3 rows: row 2"),
        (lambda completions: [None] * 3, r"None for all 3 rows"),
        (lambda completions, answr: [1.0] * 3, r"wants 'answr'.*did you mean 'answer'"),
    ],
)
def test_a_dry_run_says_what_is_wrong(function: Callable[..., Any], message: str) -> None:
    reward = from_callable(function, name="mine")
    with pytest.raises(RewardError, match=message) as caught:
        dry_run(reward, prompts(3, answer="x"))
    reward.close()
    assert str(caught.value).startswith("reward mine: ") or str(caught.value).startswith("mine: ")
    assert "\n" not in str(caught.value)
