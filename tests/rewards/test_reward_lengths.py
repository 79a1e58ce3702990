"""Terms for repetition and length."""

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klimb.errors import RewardError
from klimb.rewards.spec import parse_reward, reward_files
from klimb.rewards.verifiers.lengths import cosine, repetition


def test_repetition_by_hand() -> None:
    # a b, b a, a b, b c: three distinct of four
    assert repetition(n=2).score("a b A b c") == pytest.approx(1 / 4)
    assert repetition(n=1).score("no no no no") == pytest.approx(3 / 4)
    assert repetition().score("each word is new here") == 0.0
    assert repetition().score("two words") == 0.0
    assert repetition().score("") == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 4))
def test_repetition_is_a_share_and_finds_a_copy(words: list[str], n: int) -> None:
    rule, text = repetition(n=n), " ".join(words)
    assert 0.0 <= rule.score(text) < 1.0
    if (once := len(words) - n + 1) > 0:
        # Of the 2 · once + n - 1 n-grams of a text and its copy, those of the copy are there already.
        assert rule.score(f"{text} {text}") >= once / (2 * once + n - 1) - 1e-12


def test_a_megabyte_of_words_is_bounded_in_time() -> None:
    started = time.process_time()
    for text in ("a " * 500_000, " ".join(map(str, range(150_000))), "x" * 1_000_000):
        repetition().score(text)
    assert time.process_time() - started < 3.0  # about 0.3 s when it was written


def test_cosine_at_its_ends_and_in_the_middle() -> None:
    rule = cosine(max_length=100, of="exact", right=(2.0, 1.0), wrong=(-10.0, 0.0), too_long=-7.0)
    assert rule.scaled(1.0, 0) == 2.0
    assert rule.scaled(1.0, 50) == pytest.approx(1.5)
    assert rule.scaled(1.0, 25) == pytest.approx(1 + 0.5 * (1 + math.cos(math.pi / 4)))
    assert rule.scaled(0.0, 0) == -10.0
    assert rule.scaled(0.0, 50) == pytest.approx(-5.0)
    assert rule.scaled(0.0, 99) == pytest.approx(0.0, abs=0.01)
    assert rule.scaled(1.0, 100) == rule.scaled(0.0, 5_000) == -7.0
    assert rule.scaled(None, 3) is None


@given(st.integers(0, 98), st.integers(1, 50))
def test_short_beats_long_among_the_right_and_long_beats_short_among_the_wrong(tokens: int, more: int) -> None:
    rule, longer = cosine(max_length=200, of="exact"), tokens + more
    assert rule.scaled(1.0, tokens) > rule.scaled(1.0, longer)
    assert rule.scaled(0.0, tokens) < rule.scaled(0.0, longer)
    assert rule.scaled(1.0, longer) > rule.scaled(0.0, tokens)


def test_cosine_scales_any_reward_and_keeps_its_score() -> None:
    reward = parse_reward({"cosine": {"max_length": 10, "of": {"exact": {"column": "c"}}}})
    scores = reward(["p"] * 3, ["a", "b", "a"], {"c": ["a", "a", None], "completion_tokens": [5, 5, 5]})
    reward.close()
    assert scores.values == [pytest.approx(0.75), pytest.approx(-0.75), None]
    assert scores.parts == {"cosine": scores.values, "exact": [1.0, 0.0, None]}
    assert scores.counts["ok"] == scores.counts["wrong"] == scores.counts["abstain"] == 1
    assert reward_files({"cosine": {"max_length": 10, "of": f"{__file__}:f"}}) == [Path(__file__)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"cosine": {"max_length": 10}},
            r"reward cosine: an option is missing: 'of'; give a reward that says what is right",
        ),
        ({"cosine": {"max_length": 0, "of": "exact"}}, r"max_length is 0; give the tokens"),
        ({"cosine": {"max_length": 10, "of": "exct"}}, r"unknown reward 'exct'; did you mean 'exact'"),
        ({"cosine": {"max_length": 10, "of": "exact", "right": [1]}}, r"right is \[1.0\]; give two numbers"),
        ({"sql": {"timeout": 0}}, r"reward sql: timeout is 0.0; give the seconds of one row, up to 3600"),
        ({"repetition": {"n": 0}}, r"reward repetition: n is 0"),
        ({"repetition": {"n": "three"}}, r"reward repetition: n is 'three': .*integer"),
        ({"exact": {"ignore_case": "maybe"}}, r"ignore_case is 'maybe'; write true or false"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(spec: object, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        parse_reward(spec)
    assert "\n" not in str(caught.value)


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    reward = parse_reward({"numeric": {"tolerance": "1e-1"}})
    assert reward(["p"], ["10.5"], {"answer": [10]}).values == [1.0]
    reward.close()
