"""Mini-countdown: reach a number with three others. A verifiable task with several right answers to most questions.

"3 4 7 > 25 >" asks for an expression of 3, 4 and 7, each used once, with two of + − ×, that makes 25: "4 * 7 - 3" or
"7 * 4 - 3" or "3 * 7 + 4". Numbers go up to 20, targets from 0 to 50; products are taken before sums, as everywhere. Of
the 1,540 triples (with repetition) 150 are kept for the test and 100 for validation, whole triples, so that the same
numbers in another order give no answer away.

After the "countdown" game as it is used to study what reinforcement learning adds (TinyZero, 2025), cut down to what a
model of 0.3 M parameters can learn in a minute.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement, permutations, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

LARGEST_NUMBER, LARGEST_TARGET = 20, 50
OPERATIONS = "+-*"
WORDS = (*(str(number) for number in range(LARGEST_TARGET + 1)), *OPERATIONS, ">")
MAX_REPLY = 6
"""Three numbers, two operations and the end token."""

Part = Literal["test", "validation", "train"]
_TEST, _VALIDATION = 150, 100


class Question(NamedTuple):
    """Three numbers in ascending order, and what to make of them."""

    numbers: tuple[int, int, int]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} > {self.target} >"


def value(expression: str) -> tuple[tuple[int, ...], int] | None:
    """The numbers of "a op b op c" in ascending order, and its value; None where the text is no such expression.

    Read word by word, never evaluated as code.
    """
    words = expression.split()
    if len(words) != 5 or not all(word.isascii() and word.isdigit() for word in words[::2]):
        return None
    (a, b, c), (first, second) = map(int, words[::2]), words[1::2]
    if first not in OPERATIONS or second not in OPERATIONS:
        return None
    product_first = second == "*" and first != "*"
    result = calculated(a, first, b * c) if product_first else calculated(calculated(a, first, b), second, c)
    return tuple(sorted((a, b, c))), result


def solved(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for an expression of exactly the asked numbers with the asked value, else 0. A reward function.

    Raises ValueError for a prompt that is no question of this world.
    """
    return [
        float(value(completion) == question_of(prompt)) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def readable(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 where the first number is the largest and the first step not below zero, else 0: a stand-in for what people
    would rather read, right or wrong. A reward function.
    """
    return [float(_is_readable(completion)) for completion in completions]


def attempts(n: int, seed: int) -> list[dict[str, str]]:
    """`n` expressions of the right numbers for a random target, seldom right: the form of the game and no skill."""
    stream = random.Random(f"countdown attempts {seed}")
    asked = [question for question in questions() if part_of(question.numbers) == "train"]
    rows = []
    for question in stream.choices(asked, k=n):
        a, b, c = stream.sample(question.numbers, 3)
        first, second = stream.choices(OPERATIONS, k=2)
        rows.append({"prompt": question.prompt, "completion": f"{a} {first} {b} {second} {c}"})
    return rows


def questions() -> dict[Question, list[str]]:
    """Every question with all its answers: 8,119 questions of 1,540 triples."""
    found: dict[Question, list[str]] = {}
    for numbers in combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 3):
        for (a, b, c), (first, second) in product(sorted({*permutations(numbers)}), product(OPERATIONS, repeat=2)):
            expression = f"{a} {first} {b} {second} {c}"
            read = value(expression)
            if read is not None and 0 <= read[1] <= LARGEST_TARGET:
                found.setdefault(Question(numbers, read[1]), []).append(expression)
    return found


def part_of(numbers: tuple[int, int, int]) -> Part:
    """The part of the split that a triple belongs to, by its hash."""
    place = _RANKS[numbers]
    if place < _TEST:
        return "test"
    return "validation" if place < _TEST + _VALIDATION else "train"


def prepare(out: Path, *, seed: int) -> dict[str, str]:
    """Writes the task into `out`: data of every part and an untrained model of 0.34 M parameters.

    Returns the paths "model", "demonstrations" (a random answer to each of 6,500 training questions), "cold_start" (200
    of them), "attempts" (20,000 expressions that are seldom right), "prompts" (all training questions, to be asked),
    "validation" and "test", and "reward" and "readable", the verifier and a rule of taste as FILE.py:NAME. The split
    does not depend on `seed`.
    """
    from klimb.lab.scratch import make_model, word_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    model = make_model(
        out / "model", tokenizer=word_tokenizer(WORDS), architecture="llama", hidden=96, layers=3, heads=4, mlp=256,
        context=16, seed=seed,
    )  # fmt: skip
    known = questions()
    parts: dict[Part, list[Question]] = {"test": [], "validation": [], "train": []}
    for question in known:
        parts[part_of(question.numbers)].append(question)
    stream = random.Random(f"countdown {seed}")
    shown = stream.sample(parts["train"], 6500)
    answered = [{"prompt": question.prompt, "completion": stream.choice(known[question])} for question in shown]
    asked = {part: [{"prompt": question.prompt} for question in parts[part]] for part in parts}
    return {
        "model": str(model),
        "demonstrations": write(out, "demonstrations", answered),
        "cold_start": write(out, "cold_start", answered[:200]),
        "attempts": write(out, "attempts", attempts(20_000, seed)),
        "prompts": write(out, "prompts", asked["train"]),
        "validation": write(out, "validation", asked["validation"]),
        "test": write(out, "test", asked["test"]),
        "reward": f"{__file__}:solved",
        "readable": f"{__file__}:readable",
        "summary": ", ".join(f"{len(items):,} {part} questions" for part, items in parts.items()),
    }


def calculated(left: int, operation: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operation]


def _is_readable(expression: str) -> bool:
    if value(expression) is None:
        return False
    words = expression.split()
    (a, b, c), (first, second) = map(int, words[::2]), words[1::2]
    product_first = second == "*" and first != "*"
    step = b * c if product_first else calculated(a, first, b)
    return a == max(a, b, c) and step >= 0


def question_of(prompt: str) -> tuple[tuple[int, ...], int]:
    words = prompt.split()
    if len(words) != 6 or words[3] != ">" or words[5] != ">" or not all(words[i].isdigit() for i in (0, 1, 2, 4)):
        raise ValueError(f"prompt {prompt!r} is no question of countdown: write three numbers, >, the target, >")
    return tuple(sorted(map(int, words[:3]))), int(words[4])


def _digest(numbers: tuple[int, ...]) -> bytes:
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()


_RANKS = {
    numbers: rank
    for rank, numbers in enumerate(sorted(combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 3), key=_digest))
}


def write(out: Path, name: str, rows: Iterable[Mapping[str, str]]) -> str:
    path = out / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
