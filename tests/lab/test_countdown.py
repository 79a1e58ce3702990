"""The game's rules against Python's own arithmetic, its split against leaks."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klimb.lab.countdown import (
    OPERATIONS,
    WORDS,
    Question,
    attempts,
    part_of,
    prepare,
    questions,
    readable,
    solved,
    value,
)

KNOWN = questions()


@given(st.lists(st.sampled_from(WORDS), min_size=5, max_size=5))
def test_an_expression_is_worth_what_python_says(words: list[str]) -> None:
    expression = " ".join(words)
    fits = all(word.isdigit() for word in words[::2]) and all(word in OPERATIONS for word in words[1::2])
    expected = (tuple(sorted(map(int, words[::2]))), eval(expression)) if fits else None
    assert value(expression) == expected


def test_every_answer_solves_its_question_and_there_are_8119() -> None:
    assert len(KNOWN) == 8119
    for question, answers in random.Random(0).sample(sorted(KNOWN.items()), 300):
        assert solved([question.prompt] * len(answers), answers) == [1.0] * len(answers)
        assert len(set(answers)) == len(answers)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "4 * 7 - 4",
        "3 + 7 * 3",
        "4 * 7 + 3",
        "4 * 7",
        "4 * 7 - 3 + 0",
        "4 * 7 - -3",
        "٤ * 7 - 3",
        "25",
        "( 4 * 7 ) - 3",
    ],
)
def test_what_does_not_count(answer: str) -> None:
    assert solved(["3 4 7 > 25 >"], [answer]) == [0.0]


def test_what_counts() -> None:
    assert solved(["3 4 7 > 25 >"] * 3, ["4 * 7 - 3", "7 * 4 - 3", "3 * 7 + 4"]) == [1.0] * 3
    assert sorted(KNOWN[Question((3, 4, 7), 25)]) == [
        "3 * 7 + 4",
        "4 * 7 - 3",
        "4 + 3 * 7",
        "4 + 7 * 3",
        "7 * 3 + 4",
        "7 * 4 - 3",
    ]


def test_a_prompt_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match="'tea \\?' is no question of countdown"):
        solved(["tea ?"], ["4 * 7 - 3"])


def test_no_triple_is_in_two_parts(tmp_path: Path) -> None:
    made = prepare(tmp_path, seed=3)
    triples = {}
    for name in ("prompts", "validation", "test"):
        rows = [json.loads(line)["prompt"] for line in Path(made[name]).read_text().splitlines()]
        triples[name] = {tuple(prompt.split()[:3]) for prompt in rows}
        assert len(rows) == len(set(rows)) > 400
    assert (len(triples["test"]), len(triples["validation"]), len(triples["prompts"])) == (150, 100, 1290)
    assert not triples["test"] & triples["prompts"]
    assert not triples["validation"] & (triples["prompts"] | triples["test"])
    assert Counter(part_of(question.numbers) for question in KNOWN).total() == 8119
    shown = [json.loads(line) for line in Path(made["demonstrations"]).read_text().splitlines()]
    assert len(shown) == 6500
    assert solved([row["prompt"] for row in shown], [row["completion"] for row in shown]) == [1.0] * 6500
    assert {tuple(row["prompt"].split()[:3]) for row in shown} <= triples["prompts"]
    again = prepare(tmp_path / "again", seed=3)
    assert Path(again["demonstrations"]).read_bytes() == Path(made["demonstrations"]).read_bytes()


@pytest.mark.parametrize(
    ("expression", "score"),
    [("7 * 4 - 3", 1.0), ("4 * 7 - 3", 0.0), ("7 - 3 * 4", 1.0), ("7 - 20 + 4", 0.0), ("9 + 3 - 4", 1.0),
     ("3 - 3 * 3", 1.0), ("2 - 1 - 2", 1.0), ("20 - 19 - 5", 1.0), ("tea", 0.0)],
)  # fmt: skip
def test_what_people_would_rather_read(expression: str, score: float) -> None:
    assert readable(["3 4 7 > 25 >"], [expression]) == [score]


def test_attempts_have_the_form_and_no_skill() -> None:
    rows = attempts(2000, seed=0)
    assert all(value(row["completion"]) is not None for row in rows)
    asked = [tuple(map(int, row["prompt"].split()[:3])) for row in rows]
    assert [value(row["completion"])[0] for row in rows] == asked
    right = sum(solved([row["prompt"] for row in rows], [row["completion"] for row in rows])) / len(rows)
    assert 0.01 < right < 0.2
    assert {part_of(numbers) for numbers in asked} == {"train"}
