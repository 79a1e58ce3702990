import re
import time

import pytest

from klimb.errors import RewardError
from klimb.rewards.function import from_callable
from klimb.rewards.rules import exact, format, last_number, length, numeric, plain_text, regex, rule_function


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 42", 42.0),
        ("42.", 42.0),
        ("$1,234.50 in all", 1234.5),
        ("1,234,567", 1234567.0),
        ("a list: 1,2,3", 3.0),
        ("-7", -7.0),
        ("−7", -7.0),
        ("-$3", -3.0),
        ("5-3", 3.0),
        ("(2)-3", 3.0),
        ("5 - 3", 3.0),
        ("= -3", -3.0),
        (".5", 0.5),
        ("2e-3", 0.002),
        ("3/4", 0.75),
        ("3/0", None),
        ("1e999", None),
        ("9" * 5_000, None),  # too large for a float
        ("48/2=24 #### 24", 24.0),
        ("#### 24\nand then 7 more words", 7.0),
        ("1 #### 2 #### 3", 3.0),
        ("5 ####", None),
        ("x5", None),
        ("", None),
        ("none at all", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers_are_compared_within_a_relative_tolerance() -> None:
    assert numeric().score("3.0000001", "3") == 1.0
    assert numeric().score("3.0001", "3") == 0.0
    assert numeric(tolerance=0.01).score("101", 100) == 1.0  # |101 − 100| ≤ 0.01 · 100
    assert numeric(tolerance=0.01).score("101.1", 100) == 0.0
    assert numeric(tolerance=0.01).score("0.009", 0) == 1.0  # below 1 the tolerance is absolute
    assert numeric().score("no idea", "3") == 0.0
    assert numeric().score("4", [3, 4]) == 1.0
    assert numeric().score("4", None) is None


def test_a_reference_without_a_number_fails_its_row_only() -> None:
    reward = from_callable(rule_function(numeric()), name="numeric")
    scores = reward(["p"] * 3, ["1", "2", "3"], {"answer": ["1", "two", "4"]})
    reward.close()
    assert scores.values == [1.0, None, 0.0]
    assert "the reference 'two' in column 'answer' holds no number" in scores.failures[0].reason


def test_exact_match() -> None:
    assert exact().score(" yes\n", "yes") == 1.0
    assert exact().score("Yes", "yes") == 0.0
    assert exact(ignore_case=True).score("Yes", "yes") == 1.0
    assert exact().score("42", 42) == 1.0
    assert exact().score("b", ["a", "b"]) == 1.0
    assert exact().score("", "a") == 0.0
    assert exact().score("a", None) is None


def test_regex_compares_its_first_group_where_it_matches_last() -> None:
    rule = regex(r"answer: (\w+)")
    assert rule.score("answer: no. In fact answer: yes", "yes") == 1.0
    assert rule.score("answer: no. In fact answer: yes", "no") == 0.0
    assert rule.score("yes", "yes") == 0.0
    assert regex(r"answer: (\w+)|(nothing)").score("nothing", "None") == 0.0  # the group took no part


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>why</think> <answer>4</answer>", True),
        ("\n<think></think>\n<answer>4</answer>\n", True),
        ("<think>why</think><answer>4</answer> and more", False),
        ("well <think>why</think><answer>4</answer>", False),
        ("<answer>4</answer><think>why</think>", False),
        ("<think>a</think><think>b</think><answer>4</answer>", False),
        ("<think><answer>3</answer></think><answer>4</answer>", False),
        ("<think>why</think><answer>4", False),
        ("<think>why<answer>4</answer>", False),
        ("", False),
    ],
)
def test_tags_have_to_come_once_in_order_with_nothing_outside(text: str, fits: bool) -> None:
    assert format(tags=["think", "answer"]).score(text) == float(fits)


def test_a_pattern_is_looked_for_anywhere() -> None:
    assert format(pattern=r"a.b").score("xx a\nb xx") == 1.0
    assert format(pattern=r"^a").score("ba") == 0.0


def test_length_in_each_unit() -> None:
    assert length().score("one two", 5) == 5.0
    assert length(unit="words").score("one  two\n") == 2.0
    assert length(unit="characters").score("one") == 3.0


def test_a_rule_asks_for_its_columns_and_reads_messages() -> None:
    reward = from_callable(rule_function(exact(column="solution")), name="exact")
    completions = [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]]
    assert reward(["p"] * 2, completions, {"solution": ["yes", "yes"], "other": [1, 2]}).values == [1.0, 0.0]
    with pytest.raises(RewardError, match=r"exact: the function wants 'solution'.*did you mean 'solutions'"):
        reward(["p"], ["yes"], {"solutions": ["yes"]})
    reward.close()


def test_text_of_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert plain_text([{"role": "assistant", "content": parts}, {"role": "assistant", "content": "c"}]) == "abc"
    assert plain_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""
    assert plain_text("as it is") == "as it is"


def test_the_number_of_a_hostile_text_is_found_in_linear_time() -> None:
    started = time.monotonic()
    for text in ["1," * 500_000, "1/" * 500_000, "-" * 1_000_000, "#" * 1_000_000, "1e" * 500_000]:
        last_number(text)
    assert time.monotonic() - started < 1.0


def test_a_pattern_that_takes_for_ever_is_stopped() -> None:
    from klimb.rewards import catalogue, spec

    original, catalogue.TIMEOUT = catalogue.TIMEOUT, 0.4
    try:
        reward = spec.parse_reward({"format": {"pattern": "(a+)+$"}})
    finally:
        catalogue.TIMEOUT = original
    scores = reward(["p"] * 2, ["aaa", "a" * 40 + "b"], {})
    reward.close()
    assert scores.values == [1.0, None]
    assert re.search("no answer within", scores.failures[0].reason)
