"""Mini-countdown in two steps: "3 4 7 > 25 >" is answered by "7 * 4 = 28 ; 28 - 3 = 25", each step to be judged alone.

A step takes two of the numbers that are left and puts their result in their place. Targets and results are from 0 to
30: fewer sums to know by heart than in `klimb.lab.countdown`, whose split by triples this is. A step is right when it
calculates rightly with numbers that are there and the target can still be reached (for the last step: is reached). So
there is an exact judge of every step, to train a model of steps with and to hold it against, and a verifier of the
whole.

Process against outcome supervision: Uesato et al. (2022), arXiv 2211.14275; Lightman et al. (2023), arXiv 2305.20050.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, permutations
from pathlib import Path
from typing import Any, NamedTuple

from klimb.lab.countdown import LARGEST_NUMBER, OPERATIONS, Question, calculated, part_of, question_of, write

LARGEST_TARGET = 30
WORDS = (*(str(number) for number in range(LARGEST_TARGET + 1)), *OPERATIONS, ">", "=", ";")
SEPARATOR = " ; "
MAX_REPLY = 12
"""Two steps of five words, what stands between them, and the end token."""
SHOWN = 24_000


class Step(NamedTuple):
    """left operation right = result, as it is written."""

    left: int
    operation: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.operation} {self.right} = {self.result}"


def read_step(text: str) -> Step | None:
    """None where the text is no step. Read word by word, never evaluated as code."""
    words = text.split()
    if len(words) != 5 or words[1] not in OPERATIONS or words[3] != "=":
        return None
    if not all(word.isascii() and word.isdigit() for word in words[::2]):
        return None
    return Step(int(words[0]), words[1], int(words[2]), int(words[4]))


def labels(prompt: str, steps: Sequence[str]) -> list[bool]:
    """Of each step, whether it is right; after a wrong one none is."""
    numbers, target = question_of(prompt)
    left, right, found = list(numbers), True, []
    for text in steps:
        step = read_step(text)
        right = right and step is not None and _follows(step, left)
        if right and step is not None:
            left.remove(step.left)
            left.remove(step.right)
            left.append(step.result)
            right = target in left if len(left) == 1 else any(nxt.result == target for nxt in steps_from(left))
        found.append(right)
    return found


def solved(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for two right steps, else 0. A reward function. Nothing behind a separator is no step."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        steps = steps_of(completion)
        found.append(float(len(steps) == 2 and labels(prompt, steps)[-1]))
    return found


def on_track(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where all steps so far are right, else 0; where no separator stands behind the last one, it has to be the
    answer. A reward function: the exact judge of steps.
    """
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        steps, goes_on = steps_of(completion), completion.rstrip().endswith(SEPARATOR.strip())
        right = bool(steps) and labels(prompt, steps)[-1]
        found.append(float(right and (goes_on or len(steps) == 2)))
    return found


def steps_of(completion: str) -> list[str]:
    return [step for step in completion.split(SEPARATOR.strip()) if step.strip()]


def steps_from(numbers: Sequence[int]) -> Iterator[Step]:
    """Every step that is possible with these numbers."""
    for left, right in sorted({*permutations(numbers, 2)}):
        for operation in OPERATIONS:
            result = calculated(left, operation, right)
            if 0 <= result <= LARGEST_TARGET:
                yield Step(left, operation, right, result)


def solutions() -> dict[Question, list[tuple[Step, Step]]]:
    """Every question that two steps answer, with all its answers."""
    found: dict[Question, list[tuple[Step, Step]]] = {}
    for numbers in combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 3):
        for first in steps_from(numbers):
            for second in steps_from(_after(numbers, first)):
                found.setdefault(Question(numbers, second.result), []).append((first, second))
    return found


def demonstrations(n: int, seed: int, known: dict[Question, list[tuple[Step, Step]]]) -> list[dict[str, str]]:
    """`n` times two steps that calculate rightly with the numbers of a training question: three of four to its target,
    the others to some target of these numbers. So calculating is learnt better than choosing, which is left to be
    trained.
    """
    stream = random.Random(f"countdown steps {seed}")
    questions = [question for question in known if part_of(question.numbers) == "train"]
    alike: dict[tuple[int, ...], list[Question]] = {}
    for question in questions:
        alike.setdefault(question.numbers, []).append(question)
    rows = []
    for question in stream.choices(questions, k=n):
        reached = question if stream.random() < 0.75 else stream.choice(alike[question.numbers])
        steps = stream.choice(known[reached])
        rows.append({"prompt": question.prompt, "completion": SEPARATOR.join(map(str, steps))})
    return rows


def prepare(out: Path, *, seed: int) -> dict[str, str]:
    """Writes the task into `out`: data of every part and an untrained model of 0.4 M parameters.

    Returns the paths "model", "demonstrations" (24,000, three quarters of them right), "prompts" (all training
    questions, to be asked), "validation" and "test", and as FILE.py:NAME "reward", the verifier, and "judge", that of
    steps. The split does not depend on `seed`.
    """
    from klimb.lab.scratch import make_model, word_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    model = make_model(
        out / "model", tokenizer=word_tokenizer(WORDS), architecture="llama", hidden=96, layers=3, heads=4, mlp=256,
        context=24, seed=seed,
    )  # fmt: skip
    known = solutions()
    parts: dict[str, list[Question]] = {"test": [], "validation": [], "train": []}
    for question in known:
        parts[part_of(question.numbers)].append(question)
    return {
        "model": str(model),
        "demonstrations": write(out, "demonstrations", demonstrations(SHOWN, seed, known)),
        **{name: write(out, name, [{"prompt": question.prompt} for question in parts[part]])
           for name, part in (("prompts", "train"), ("validation", "validation"), ("test", "test"))},
        "reward": f"{__file__}:solved",
        "judge": f"{__file__}:on_track",
        "summary": ", ".join(f"{len(items):,} {part} questions" for part, items in parts.items()),
    }  # fmt: skip


def _after(numbers: Sequence[int], step: Step) -> list[int]:
    left = list(numbers)
    left.remove(step.left)
    left.remove(step.right)
    return [*left, step.result]


def _follows(step: Step, numbers: Sequence[int]) -> bool:
    """Does it calculate rightly, with numbers that are there?"""
    there = list(numbers)
    if len(there) < 2 or step.left not in there:
        return False
    there.remove(step.left)
    in_reach = 0 <= step.result <= LARGEST_TARGET
    return step.right in there and in_reach and calculated(step.left, step.operation, step.right) == step.result
