"""A scale that follows the training, held against the same figures taken of all scores at once."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass, field

import pytest

from klimb.rewards.combine import Part, WeightedSum
from klimb.rewards.normalise import Moments, Normalised
from klimb.rewards.protocol import Failure, FakeReward, Scores


@dataclass
class Played:
    """A reward of which the scores of each call are given."""

    calls: list[list[float | None]]
    failures: list[Failure] = field(default_factory=list)
    name: str = "played"

    def __call__(self, *_: object) -> Scores:
        return Scores(self.calls.pop(0), self.failures)

    def close(self) -> None: ...


def batches(sizes: list[int], offset: float = 0.0) -> list[list[float]]:
    stream = random.Random("moments")
    return [[offset + stream.gauss(3 * place, 1 + place) for _ in range(size)] for place, size in enumerate(sizes)]


# Means far from zero are where the sum of squares less the square of the sum would have lost all digits.
@pytest.mark.parametrize(("offset", "relative"), [(0.0, 1e-12), (1e8, 1e-7)])
def test_the_figures_are_those_of_all_scores_so_far(offset: float, relative: float) -> None:
    moments, seen = Moments(), []
    for batch in batches([1, 7, 2, 30], offset):
        moments, seen = moments.including(batch), [*seen, *batch]
        assert moments.n == len(seen)
        assert moments.mean == pytest.approx(statistics.fmean(seen), rel=1e-14)
        if len(seen) > 1:
            assert moments.std == pytest.approx(statistics.stdev(seen), rel=relative)
    assert moments.including([]) == moments
    assert moments == Moments(*json.loads(json.dumps(moments)))  # a checkpoint is JSON


def test_no_scale_is_made_up_where_all_scores_are_equal() -> None:
    assert Moments().std == Moments().including([2.0]).std == Moments().including([2.0, 2.0, 2.0]).std == 1.0
    reward = Normalised(Played([[2.0, 2.0], [3.0]]), running=True, clip=None)
    assert reward([], [], {}).values == [0.0, 0.0]
    # Of 2, 2, 3: mean 7/3, variance 1/3.
    assert reward([], [], {}).values == pytest.approx([(3 - 7 / 3) * 3**0.5])


def test_scores_are_centred_and_scaled_by_all_so_far_and_those_of_now() -> None:
    calls = batches([6, 4])
    reward = Normalised(Played([*calls]), running=True, clip=None)
    for place in range(2):
        seen = [value for call in calls[: place + 1] for value in call]
        scores = reward([], [], {})
        mean, std = statistics.fmean(seen), statistics.stdev(seen)
        assert scores.values == pytest.approx([(value - mean) / std for value in calls[place]])
        assert scores.raw == calls[place]  # as they were given, to be logged


def test_clipping_bounds_what_is_trained_on_and_not_the_figures() -> None:
    calls = [[-9.0, 0.5, 2.0, 40.0], [1.0, 0.0, 0.0, -1.0]]
    clipped = Normalised(Played([*calls]), running=False, clip=1.5)
    assert clipped([], [], {}).values == [-1.5, 0.5, 1.5, 1.5]
    both = Normalised(Played([*calls]), running=True, clip=0.5)
    both([], [], {})
    both([], [], {})
    assert both.moments == Moments().including(calls[0]).including(calls[1])
    free = Normalised(Played([*calls]), running=True, clip=None)
    assert Normalised(Played([*calls]), running=True, clip=0.5)([], [], {}).values == [
        max(-0.5, min(0.5, value or 0.0)) for value in free([], [], {}).values
    ]


def test_rows_without_a_score_count_for_nothing() -> None:
    reward = Normalised(Played([[1.0, None, 3.0, None]], [Failure(3, "boom")]), running=True, clip=1.0)
    scores = reward([], [], {})
    assert scores.values == [pytest.approx(-(0.5**0.5)), None, pytest.approx(0.5**0.5), None]
    assert scores.failures == [Failure(3, "boom")]
    assert reward.moments == Moments(2, 2.0, 2.0)


def test_in_a_sum_the_weight_is_that_of_the_normalised_score() -> None:
    inner = FakeReward(name="model")
    reward = WeightedSum(
        [Part("judge", Normalised(inner, running=True, clip=None), 2.0), Part("one", FakeReward(), 1.0)]
    )
    scores = reward(["p"] * 2, ["a", "aaa"], {})
    assert scores.parts == {"judge": [1.0, 3.0], "one": [1.0, 3.0]}
    assert scores.values == pytest.approx([1 - 2 * 0.5**0.5, 3 + 2 * 0.5**0.5])
    reward.close()
    assert inner.closed
