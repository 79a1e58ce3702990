"""The exact judge of steps against a search through everything that could follow."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from klimb.lab.countdown import LARGEST_TARGET, calculated, part_of, question_of
from klimb.lab.countdown_steps import (
    SEPARATOR,
    Step,
    attempts,
    labels,
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


def test_the_parts_share_no_triple_and_labels_are_of_all_kinds(tmp_path: Path) -> None:
    made = prepare(tmp_path, seed=0)
    rows = {name: [json.loads(line) for line in Path(made[name]).read_text().splitlines()]
            for name in ("demonstrations", "steps", "prompts", "validation", "test")}  # fmt: skip
    for name, part in (("demonstrations", "train"), ("steps", "train"), ("prompts", "train"), ("test", "test")):
        assert {part_of(question_of(row["prompt"])[0]) for row in rows[name]} == {part}
    kinds = [tuple(row["labels"]) for row in rows["steps"]]
    assert {(True, True), (True, False), (False, False)} == {*kinds}
    assert all(kinds.count(kind) > len(kinds) / 20 for kind in {*kinds})
    assert attempts(50, 3, KNOWN) == attempts(50, 3, KNOWN) != attempts(50, 4, KNOWN)
