"""The exact judge of steps against a search through everything that could follow."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from klimb.lab.countdown import Question, calculated, part_of, question_of
from klimb.lab.countdown_steps import (
    LARGEST_TARGET,
    SEPARATOR,
    Step,
    demonstrations,
    labels,
    on_track,
    prepare,
    read_step,
    solutions,
    solved,
    steps_from,
)

KNOWN = solutions()


def test_every_solution_is_right_step_by_step() -> None:
    for question, found in random.Random(0).sample(sorted(KNOWN.items()), 200):
        for steps in found:
            texts = [str(step) for step in steps]
            assert labels(question.prompt, texts) == [True, True]
            assert solved([question.prompt], [SEPARATOR.join(texts)]) == [1.0]


def by_search(numbers: list[int], target: int) -> bool:
    """Can the target be made of all the numbers?"""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for place, n in enumerate(numbers) if place not in (i, j)]
        for operation in "+-*":
            result = calculated(numbers[i], operation, numbers[j])
            if 0 <= result <= LARGEST_TARGET and by_search([*rest, result], target):
                return True
    return False


def test_a_first_step_is_right_where_a_search_still_finds_the_target() -> None:
    stream, seen = random.Random(1), set()
    for question in stream.sample(sorted(KNOWN), 150):
        for step in steps_from(question.numbers):
            left = list(question.numbers)
            left.remove(step.left)
            left.remove(step.right)
            expected = by_search([*left, step.result], question.target)
            assert labels(question.prompt, [str(step)]) == [expected]
            seen.add(expected)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["7 * 4 = 28", "28 - 3 = 25"], [True, True]),
        (["7 * 4 = 27", "28 - 3 = 25"], [False, False]),
        (["7 * 4 = 28", "28 - 4 = 24"], [True, False]),
        (["7 * 4 = 28", "28 - 3 = 26"], [True, False]),
        (["7 + 4 = 11", "11 - 3 = 8"], [False, False]),
        (["7 * 4 = 28", "28 - 3 = 25", "25 + 0 = 25"], [True, True, False]),
        (["7 * 5 = 35", ""], [False, False]),
        (["7 x 4 = 28"], [False]),
        (["٧ * 4 = 28"], [False]),
    ],
)
def test_steps_by_hand(steps: list[str], expected: list[bool]) -> None:
    assert labels("3 4 7 > 25 >", steps) == expected
    assert solved(["3 4 7 > 25 >"], [SEPARATOR.join(steps)]) == [float(expected == [True, True])]


def test_what_is_no_step() -> None:
    assert read_step("7 * 4 = 28") == Step(7, "*", 4, 28)
    assert [read_step(text) for text in ("7 * 4", "7 * 4 = 2 8", "7 / 4 = 1", "-7 * 4 = 28", "a + b = c")] == [None] * 5


@pytest.mark.parametrize(
    ("text", "right", "answered"),
    [
        ("7 * 4 = 28 ; 28 - 3 = 25", True, True),
        ("7 * 4 = 28 ; ", True, False),  # it goes on
        ("7 * 4 = 28", False, False),  # a whole that ends too early
        ("7 * 4 = 28 ; 28 - 3 = 25 ;", True, True),  # nothing behind a separator is no step
        ("; 7 * 4 = 28 ; ; 28 - 3 = 25", True, True),
        ("7 * 4 = 28 ; 28 - 3 = 26", False, False),
        ("7 + 4 = 11 ; ", False, False),  # calculated rightly, and 25 is out of reach
        ("7 * 4 = 28 ; 28 - 3 = 25 ; 25 + 0 = 25", False, False),
        ("7 * 4 = 28 ; 28 - 3 = 25 ; 25 + 0 = 25 ; ", False, False),
        (" ; ", False, False),
        ("", False, False),
    ],
)
def test_the_judge_of_steps_tells_a_beginning_from_a_whole(text: str, right: bool, answered: bool) -> None:
    assert on_track(["3 4 7 > 25 >"], [text]) == [float(right)]
    assert solved(["3 4 7 > 25 >"], [text]) == [float(answered)]


def test_the_parts_share_no_triple(tmp_path: Path) -> None:
    made = prepare(tmp_path, seed=0)
    rows = {name: [json.loads(line) for line in Path(made[name]).read_text().splitlines()]
            for name in ("demonstrations", "prompts", "validation", "test")}  # fmt: skip
    for name, part in (("demonstrations", "train"), ("prompts", "train"), ("validation", "validation"),
                       ("test", "test")):  # fmt: skip
        assert {part_of(question_of(row["prompt"])[0]) for row in rows[name]} == {part}


def test_demonstrations_calculate_rightly_and_three_of_four_reach_the_target() -> None:
    shown = demonstrations(400, 3, KNOWN)
    right = 0
    for row in shown:
        steps = [step for step in map(read_step, row["completion"].split(SEPARATOR)) if step is not None]
        reached = Question(question_of(row["prompt"])[0], steps[-1].result)  # type: ignore[arg-type]
        assert tuple(steps) in KNOWN[reached]
        right += solved([row["prompt"]], [row["completion"]]) == [1.0]
    assert 275 <= right <= 350  # three of four, and some of the others by chance; four standard deviations are 35
    assert shown == demonstrations(400, 3, KNOWN) != demonstrations(400, 4, KNOWN)
