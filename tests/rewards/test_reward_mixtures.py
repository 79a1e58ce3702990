"""Sums, products, gates and routes: what each row is worth, what is asked for it, and what is kept of it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest

from klimb.config import parse_value
from klimb.errors import RewardError
from klimb.rewards.catalogue import pages
from klimb.rewards.normalise import Normalised
from klimb.rewards.protocol import Failure, FakeReward, Scores
from klimb.rewards.scorer import Scorer
from klimb.rewards.spec import parse_reward, reward_files
from klimb.types import Group, Prompt, Sample, Segment


class Table:
    """A reward that knows what each completion is worth, and remembers what it was asked."""

    def __init__(self, name: str, values: dict[str, float | str | None]) -> None:
        self.name = name
        self._values = values
        self.asked: list[list[str]] = []
        self.closed = False

    def __call__(self, prompts: Any, completions: Any, columns: Any) -> Scores:
        assert len(prompts) == len(completions)
        assert all(len(values) == len(completions) for values in columns.values())
        self.asked.append(list(completions))
        found = [self._values[text] for text in completions]
        failures = [Failure(row, value) for row, value in enumerate(found) if isinstance(value, str)]
        return Scores([None if isinstance(value, str) else value for value in found], failures)

    def close(self) -> None:
        self.closed = True


TEXTS = ["a", "b", "c", "d", "e", "f"]


def scored(spec: Any, texts: list[str] = TEXTS, **columns: list[Any]) -> Scores:
    with contextlib.closing(parse_reward(spec)) as reward:
        return reward(["p"] * len(texts), texts, columns)


def table(name: str, *values: float | str | None) -> Table:
    return Table(name, dict(zip(TEXTS, values, strict=True)))


def test_a_product_multiplies_and_an_unknown_factor_makes_it_unknown() -> None:
    quality = table("quality", 0.5, 2.0, -1.0, None, "it broke", -1.0)
    safety = table("safety", 0.5, 0.0, 3.0, 1.0, 1.0, -2.0)
    scores = scored({"product": [quality, safety]})
    assert scores.values == [0.25, 0.0, -3.0, None, None, None]
    assert [(f.row, f.reason) for f in scores.failures] == [
        (4, "quality: it broke"),
        (5, "more than one factor is negative (-1, -2)"),
    ]
    assert scores.parts == {
        "quality": [0.5, 2.0, -1.0, None, None, -1.0],
        "safety": [0.5, 0.0, 3.0, 1.0, 1.0, -2.0],
    }
    assert scored({"product": [table("x", *[1e200] * 6), table("y", *[1e200] * 6)]}).values == [None] * 6


@pytest.mark.parametrize("otherwise", [0, -1.5, None])
def test_a_gate_asks_only_for_what_passed(otherwise: float | None) -> None:
    shape, content = table("shape", 1.0, 0.0, 0.5, None, "it broke", 1.0), table("content", 3.0, 9.0, 4.0, 9, 9, None)
    scores = scored({"gate": {"when": shape, "then": content, "else": otherwise}})
    assert scores.values == [3.0, otherwise, 4.0, None, None, None]
    assert [(f.row, f.reason) for f in scores.failures] == [(4, "shape: it broke")]
    assert content.asked == [["a", "c", "f"]]
    assert scores.parts == {
        "shape": [1.0, 0.0, 0.5, None, None, 1.0],
        "content": [3.0, None, 4.0, None, None, None],
    }
    strict = scored({"gate": {"when": shape, "then": content, "else": otherwise, "above": 0.5}})
    assert strict.values == [3.0, otherwise, otherwise, None, None, None]


def test_a_gate_that_nothing_passes_asks_nothing() -> None:
    content = table("content", *[1.0] * 6)
    scores = scored({"gate": {"when": table("shape", *[0.0] * 6), "then": content, "else": -1}})
    assert scores.values == [-1.0] * 6
    assert content.asked == []
    assert scores.parts["content"] == [None] * 6


def test_a_route_asks_the_reward_that_the_column_names() -> None:
    math, code = table("any", 1.0, 2.0, 3.0, 4.0, 5.0, 6.0), table("other", 10.0, 20.0, 30.0, None, "it broke", 60.0)
    spec = {"route": {"column": "source", "to": {"math": math, "code": {"reward": code, "weight": 0.5}, "1": "length"}}}
    scores = scored(spec, source=["math", "code", "poetry", "code", "code", None])
    assert scores.values == [1.0, 10.0, None, None, None, None]
    assert [(f.row, f.reason) for f in scores.failures] == [
        (2, "source 'poetry' has no reward, known: math, code, 1"),
        (4, "code: it broke"),
        (5, "source 'None' has no reward, known: math, code, 1"),
    ]
    assert (math.asked, code.asked) == ([["a"]], [["b", "d", "e"]])
    assert list(scores.parts) == ["math", "code", "1"]
    assert scores.parts["code"] == [None, 20.0, None, None, None, None]
    assert scored(spec, ["a"], source=[1], completion_tokens=[7]).values == [7.0]  # a number is known by its digits
    with pytest.raises(RewardError, match=r"reward route: the data has no column 'source'; known: kind"):
        scored(spec, kind=["math"] * 6)


def test_mixtures_within_mixtures_keep_every_part_under_its_own_name() -> None:
    shape, content, style = table("shape", 1, 0, 1, 1, 1, 1), table("content", *range(6)), table("style", *[4.0] * 6)
    gate = {"gate": {"when": shape, "then": {"product": [content, style]}, "else": 0}}
    running: list[Normalised] = []
    spec = [
        {"reward": gate, "weight": 2, "clip": 10},
        {"reward": {"route": {"column": "s", "to": {
            "m": [{"reward": style, "normalise": "running"}, content], "n": {"reward": content, "normalise": "running"},
        }}}, "name": "by source"},
    ]  # fmt: skip
    reward = parse_reward(spec, running=running)
    scores = reward(["p"] * 6, TEXTS, {"s": [*"mmmnnn"]})
    assert list(scores.parts) == [
        "gate", "gate/shape", "gate/product", "gate/product/content", "gate/product/style",
        "by source", "by source/m", "by source/m/style", "by source/m/content", "by source/n",
    ]  # fmt: skip
    assert scores.parts["gate"] == [0.0, 0.0, 8.0, 12.0, 16.0, 20.0]  # as it was given; what counts is at most 10
    assert scores.parts["by source/m/style"] == [4.0, 4.0, 4.0, None, None, None]
    # Of source m: style − its mean = 0, and content. Of source n: (3, 4, 5) − 4 by a std of 1.
    assert scores.values == [0 + 0, 0 + 1, 16 + 2, 20 - 1, 20 + 0, 20 + 1]
    assert [one.moments.n for one in running if one.moments] == [3, 3]  # each source by its own scores
    reward.close()
    assert shape.closed
    assert style.closed


def test_counts_add_up_to_the_rows_of_each_part() -> None:
    shape = table("shape", 1.0, 0.0, None, "it broke", 1.0, 1.0)
    samples = [Sample("p", n, [Segment([1])], "stop", text) for n, text in enumerate(TEXTS)]
    spec = [{"gate": {"when": shape, "then": {"exact": {"column": "x"}}, "else": 0}}, {"length": {"unit": "words"}}]
    report = Scorer(parse_reward(spec), failure_limit=1.0).score([Group(Prompt("p", [0], "p?", {"x": "a"}), samples)])
    found = {key: value for key, value in report.metrics.items() if key.startswith("verdict/")}
    assert found == {
        "verdict/scored": 5, "verdict/abstain": 0, "verdict/timeout": 0, "verdict/error": 1,
        "verdict/gate/scored": 4, "verdict/gate/abstain": 1, "verdict/gate/timeout": 0, "verdict/gate/error": 1,
        "verdict/gate/shape/scored": 4, "verdict/gate/shape/abstain": 1,
        "verdict/gate/shape/timeout": 0, "verdict/gate/shape/error": 1,
        "verdict/gate/exact/ok": 1, "verdict/gate/exact/wrong": 2, "verdict/gate/exact/abstain": 0,
        "verdict/gate/exact/timeout": 0, "verdict/gate/exact/error": 0,
        "verdict/length/scored": 6, "verdict/length/abstain": 0, "verdict/length/timeout": 0, "verdict/length/error": 0,
    }  # fmt: skip
    assert samples[0].rewards == {"gate": 1.0, "gate/shape": 1.0, "gate/exact": 1.0, "length": 1.0}


def test_a_sum_beyond_the_floats_fails_its_row() -> None:
    spec = [{"reward": table("x", *[1e308] * 6), "weight": 10}, {"reward": table("y", *[-1e308] * 6), "weight": 10}]
    assert scored(spec).values == [None] * 6
    assert scored([{"reward": table("x", *[1e308] * 6)}, {"reward": table("y", *[1e308] * 6)}]).values == [None] * 6


def test_files_within_mixtures_are_known(tmp_path: Path) -> None:
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.touch()
    b.touch()
    inner = {"gate": {"when": f"{a}:f", "then": {f"{b}:g": {"timeout": 3}}, "else": 0}}
    assert reward_files(inner) == [a, b]
    assert reward_files({"route": {"column": "s", "to": {"x": [f"{a}:f"], "y": {"reward": f"{b}:g"}}}}) == [a, b]
    assert reward_files({"product": [inner, "length"]}) == [a, b]
    assert (
        reward_files({"http": {"url": "http://x"}}) == reward_files({"gate": None}) == reward_files({"route": 3}) == []
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"product": "exact"}, r"reward product: 'exact' is no list; write"),
        ({"product": []}, r"a product without parts"),
        ({"product": [{"reward": "exact", "weight": 2}]}, r"unknown key 'weight' in a product"),
        ({"product": ["exact", "exact"]}, r"two parts are both called 'exact'"),
        ({"gate": ["exact", "length"]}, r"reward gate: without 'when'; it needs when, then, else"),
        ({"gate": {"when": "exact", "then": "length"}}, r"reward gate: without 'else'"),
        ({"gate": {"when": "exact", "then": "length", "else": "no"}}, r"else is 'no'.*else: null leaves"),
        ({"gate": {"when": "exact", "then": "length", "esle": 0}}, r"unknown key 'esle'; did you mean 'else'"),
        ({"gate": {"when": "exact", "then": "exact", "else": 0}}, r"both called 'exact'; give one another `name:`"),
        ({"route": {"column": "s"}}, r"reward route: without 'to'"),
        ({"route": {"column": "s", "to": ["exact"]}}, r"to is \['exact'\]; write"),
        ({"route": {"column": "s", "to": {}}}, r"a route without parts"),
        ({"route": {"column": "s", "to": {"m": {"reward": "exact", "name": "x"}}}}, r"m has the name 'x', too"),
        ({"route": {"column": "s", "to": {"m": "exct"}}}, r"unknown reward 'exct'.*did you mean 'exact'"),
        ([{"reward": ["exact", "length"]}], r"a sum within a sum"),
        ({"product": [{"reward": {"reward": "exact"}}]}, r"a sum within a sum"),
        ({"my_reward.py:f": {"independent": "yes"}}, r"independent is 'yes'; write true or false"),
        ({"produkt": ["exact"]}, r"produkt with \['exact'\], which are no options; did you mean 'product'"),
    ],
)
def test_mistakes_are_named_on_one_line(spec: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        parse_reward(spec)
    assert "\n" not in str(caught.value)


def test_what_was_opened_is_closed_when_a_later_part_is_wrong() -> None:
    first = FakeReward()
    with pytest.raises(RewardError, match="unknown reward 'exct'"):
        parse_reward({"gate": {"when": first, "then": "exct", "else": 0}})
    assert first.closed


@pytest.mark.parametrize("source", ["gate", "product"])
def test_the_documented_mixtures_pay_a_right_answer_in_its_form_and_nothing_else(source: str) -> None:
    """The specs are read out of the pages that `klimb reward --list` and docs/REWARDS.md show."""
    [page] = [page for page in pages() if page.name == source]
    [spec] = re.findall(rf"``(\{{{source}: .*\}})``", page.text)
    texts = [
        "<think>3 + 4</think> <answer>7</answer>", "<think>3 + 4</think>\n<answer> 7 </answer>",
        "<think>3 + 4</think> <answer>8</answer>", "<answer>7</answer>", "7",
    ]  # fmt: skip
    assert scored(parse_value(spec), texts, answer=["7"] * 5).values == [1, 1, 0, 0, 0]
    assert spec in (Path(__file__).parents[2] / "docs" / "GUIDE.md").read_text() or source == "product"
