"""GSM8K's calculations as a small verifiable task: learn to calculate, then improve without seeing answers.

The worked solutions of GSM8K mark every calculation, ``<<48/2=24>>``. Those with one operation on whole
numbers (up to 999, the result up to 9999) are asked in fixed width, every number with its least significant
digit first, which is what a model of a third of a million parameters can learn within a minute::

    48/2=24   ->   prompt "840/200="   completion "4200"

They are split by the hash of the canonical expression (3+5 is 5+3): a part gives the operands from which
supervised examples are made, one is asked without answers, one chooses settings, one is held out for
judging. Correct is what equals the answer digit by digit.

GSM8K: Cobbe et al. (2021), "Training Verifiers to Solve Math Word Problems".
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import Literal, NamedTuple

from klimb.data.formats import BadRows, Problem, read_rows
from klimb.errors import ConfigError, DataError

OPERATIONS = "+-*/"
CHARACTERS = "0123456789" + OPERATIONS + "="
LARGEST_OPERAND, LARGEST_RESULT = 999, 9999
DEMONSTRATIONS, FURTHER = 60_000, 40_000

Part = Literal["test", "validation", "operands", "prompts"]
_SHARES: dict[Part, float] = {"test": 0.2, "validation": 0.1, "operands": 0.2, "prompts": 0.5}

# Multiplication and division take this model far longer than a minute, so they are not taught as often.
_FREQUENCY = {"+": 2, "-": 2, "*": 1, "/": 1}

_MARKED = re.compile(r"<<([^<>]*)>>")
_ONE_OPERATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


class Calculation(NamedTuple):
    """One operation on whole numbers and its result."""

    left: int
    operation: str
    right: int
    result: int

    @property
    def canonical(self) -> str:
        """The expression with the operands of + and * sorted: the same for what is the same calculation."""
        left, right = self.left, self.right
        if self.operation in "+*":
            left, right = sorted((left, right))
        return f"{left}{self.operation}{right}"

    @property
    def part(self) -> Part:
        """The part of the split that this calculation falls into, wherever and however often it is met."""
        digest = hashlib.sha256(self.canonical.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for part, share in _SHARES.items():
            if place < share:
                return part
            place -= share
        return "prompts"

    @property
    def prompt(self) -> str:
        return f"{self.left:03d}"[::-1] + self.operation + f"{self.right:03d}"[::-1] + "="

    @property
    def answer(self) -> str:
        return f"{self.result:04d}"[::-1]


def marked(solutions: Iterable[str]) -> list[str]:
    """What stands between << and >> in GSM8K's solutions, in order and with its duplicates."""
    return [expression for solution in solutions for expression in _MARKED.findall(solution)]


def calculations(expressions: Iterable[str]) -> list[Calculation]:
    """The distinct calculations that the task is about, in the order of their first mention.

    Left out: further operations, decimals, negative or large numbers, and whatever is not exactly true.
    """
    found: dict[Calculation, None] = {}
    for expression in expressions:
        if match := _ONE_OPERATION.fullmatch(expression):
            left, operation, right, result = match.groups()
            true = calculate(int(left), operation, int(right))
            if true is not None and true.result == int(result):
                found[true] = None
    return list(found)


def calculate(left: int, operation: str, right: int) -> Calculation | None:
    """The calculation, or None where operands or result are no whole numbers within the task's bounds."""
    if max(left, right) > LARGEST_OPERAND or (operation == "/" and (right == 0 or left % right)):
        return None
    result = _RESULT[operation](left, right)
    return Calculation(left, operation, right, result) if 0 <= result <= LARGEST_RESULT else None


_RESULT: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right,
}


def synthetic(n: int, known: Sequence[Calculation], seed: int, operations: str = OPERATIONS) -> list[Calculation]:
    """`n` calculations with operands drawn, with replacement, from the part "operands" of `known`.

    What `known` has in its other parts (test, validation, prompts) is never among them, in either order.
    Addition and subtraction are drawn twice as often. Raises DataError where nothing can be drawn.
    """
    operands = [operand for item in known if item.part == "operands" for operand in (item.left, item.right)]
    kept_back = {item.canonical for item in known if item.part != "operands"}
    stream = random.Random(f"digits synthetic {seed}")
    frequency = [_FREQUENCY[operation] for operation in operations]
    return [_draw(stream.choices(operations, frequency)[0], operands, kept_back, stream) for _ in range(n)]


def _draw(operation: str, operands: Sequence[int], kept_back: Set[str], stream: random.Random) -> Calculation:
    for _ in range(100_000 if operands else 0):
        drawn = calculate(stream.choice(operands), operation, stream.choice(operands))
        if drawn is not None and drawn.canonical not in kept_back:
            return drawn
    raise DataError(
        f"no calculation with {operation!r} can be made up",
        why=f"the data give {len(operands)} operands and nearly all they allow is kept back for the test",
        fix="give more of GSM8K's rows",
    )


def prepare(out: Path, *, data: str = "openai/gsm8k/main", seed: int, operations: str = OPERATIONS) -> dict[str, str]:
    """Writes the task into `out`: data of every part and an untrained model of 0.34 M parameters.

    `data` is a file of GSM8K's rows or a hub name; the split does not depend on `seed`. Returns the paths:
    "model" · "demonstrations" (60,000 synthetic examples) · "prompts" (to be asked, not answered) ·
    "validation" and "test" (prompts likewise; column "answer" is the verifier's, "operation" for accuracy
    by operation) · the two controls, "control" (the asked prompts with their answers) and
    "control_synthetic" (40,000 further synthetic examples); and "reward", the name of the verifier, with a
    "summary" of what was found and left out.
    """
    if not operations or not {*operations} <= {*OPERATIONS}:
        raise ConfigError(f"operations={operations!r}", why="unknown or none", fix=f"use some of {OPERATIONS}")
    from klimb.lab.scratch import character_tokenizer, make_model

    expressions = marked(_solutions(data))
    known = [item for item in calculations(expressions) if item.operation in operations]
    parts = {part: [item for item in known if item.part == part] for part in _SHARES}
    if empty := [part for part, items in parts.items() if not items]:
        raise DataError(
            f"no calculation for the part {empty[0]!r}",
            where=data,
            why=f"{len(expressions)} are marked as <<48/2=24>>, {len(known)} of them usable",
            fix="give more of GSM8K's rows",
        )
    out.mkdir(parents=True, exist_ok=True)
    model = make_model(
        out / "model",
        tokenizer=character_tokenizer(CHARACTERS),
        architecture="llama",
        hidden=96,
        layers=3,
        heads=4,
        mlp=256,  # gated: three matrices of this width are the two of 4 · 96
        context=16,
        seed=seed,
    )
    made_up = synthetic(DEMONSTRATIONS + FURTHER, known, seed, operations)
    return {
        "model": str(model),
        "demonstrations": _write(out, "demonstrations", map(_answered, made_up[:DEMONSTRATIONS])),
        "prompts": _write(out, "prompts", map(_asked, parts["prompts"])),
        "validation": _write(out, "validation", map(_asked, parts["validation"])),
        "test": _write(out, "test", map(_asked, parts["test"])),
        "control": _write(out, "control", map(_answered, parts["prompts"])),
        "control_synthetic": _write(out, "control_synthetic", map(_answered, made_up[DEMONSTRATIONS:])),
        "reward": "exact",
        "summary": f"{len(expressions):,} calculations marked, {len(known):,} distinct ones used: "
        + ", ".join(f"{len(items):,} {part}" for part, items in parts.items()),
    }


def _asked(item: Calculation) -> dict[str, str]:
    return {
        "prompt": item.prompt,
        "answer": item.answer,
        "operation": item.operation,
        "operations": "+ and −" if item.operation in "+-" else "× and /",
    }


def _answered(item: Calculation) -> dict[str, str]:
    return {"prompt": item.prompt, "completion": item.answer}


def _solutions(data: str) -> list[str]:
    """The column "answer" of GSM8K's rows."""
    rows, problems = read_rows(data)
    for row in rows:
        if not isinstance(row.values.get("answer"), str):
            problems.append(Problem(row.where, 'has no text in column "answer", as GSM8K\'s rows have'))
    if problems:
        raise BadRows(data, problems, total=len(rows) + len(problems))
    return [row.values["answer"] for row in rows]


def _write(out: Path, name: str, rows: Iterable[dict[str, str]]) -> str:
    path = out / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
