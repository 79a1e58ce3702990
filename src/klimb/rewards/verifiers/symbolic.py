r"""Mathematical answers: as numbers, else as expressions that math-verify holds for equal.

math-verify reads LaTeX with a grammar, and plain expressions with SymPy's parser, which evaluates text. It is imported
in the worker process alone that `isolated.py` starts, confines and kills at its deadline.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Annotated, Any

from klimb.errors import RewardError
from klimb.rewards.rules import MAX_ANSWER, NUMBER, Column, last_number, references
from klimb.rewards.verifiers.isolated import confine

MAX_EXPRESSION = 1_000
"""Characters; a longer answer is wrong without being read, a longer reference is an error."""
_BOX = re.compile(r"\\f?boxed\s*\{")


@dataclass(frozen=True, slots=True)
class math:
    r"""1 where the completion's answer equals the reference: ``\boxed{\frac12}`` is 0.5, ``\boxed{1+x}`` is x+1.

    The answer is what the last \boxed{…} holds, else what follows the last ``####``, else the last number; so it is for
    the reference, which without mark or box counts as a whole. Two numbers are compared as `numeric` does, all else by
    math-verify (sets, intervals, equations, matrices too), in a process without files and network. A pair that takes
    longer than `timeout` scores 0 and is counted as a timeout.
    """

    column: Column = "answer"
    tolerance: Annotated[float, "between numbers, of the reference's size; below 1 absolute"] = 1e-6
    timeout: Annotated[float, "seconds for one pair"] = 2.0

    def __post_init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError("math-verify is not installed", where="reward math", fix="pip install 'klimb[math]'")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def begin(self) -> None:
        _same_expression("1", "x", self.column)  # SymPy loads much of itself when it is first used
        confine()

    def score(self, text: str, *columns: Any) -> float | None:
        if columns[0] is None:
            return None
        given = final_answer(text)
        wanted = {str(reference): self._wanted(str(reference)) for reference in references(columns[0])}
        if any(text.strip() == reference.strip() for reference in wanted):
            return 1.0
        return float(given is not None and any(self._equal(given, each) for each in wanted.values()))

    def _wanted(self, reference: str) -> str:
        answer = marked_answer(reference)
        answer = reference.strip() if answer is None else answer
        if not answer or len(answer) > MAX_EXPRESSION:
            raise ValueError(f"the reference {reference[:80]!r} in column {self.column!r} is no expression")
        return answer

    def _equal(self, given: str, wanted: str) -> bool:
        if given == wanted:
            return True
        numbers = _number(given), _number(wanted)
        if numbers[0] is not None and numbers[1] is not None:
            return abs(numbers[0] - numbers[1]) <= self.tolerance * max(1.0, abs(numbers[1]))
        return _same_expression(given, wanted, self.column)


def final_answer(text: str) -> str | None:
    """What a completion answers; None where it says nothing that could be an answer, or too much."""
    answer = marked_answer(text)
    if answer is None:
        matches = [*NUMBER.finditer(text[-MAX_ANSWER:].replace("−", "-"))]
        answer = matches[-1].group() if matches else None
    return answer if answer and len(answer) <= MAX_EXPRESSION else None


def marked_answer(text: str) -> str | None:
    r"""What is in the last \boxed{…}, else behind the last ``####`` up to the end of its line; None without either."""
    text = text[-MAX_ANSWER:]
    for box in reversed([*_BOX.finditer(text)]):
        if (inside := _braced(text, box.end())) is not None:
            return inside.strip()
        break
    _, mark, behind = text.rpartition("####")
    return behind.strip().partition("\n")[0].strip() if mark else None


def _braced(text: str, start: int) -> str | None:
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def _number(text: str) -> float | None:
    bare = text.strip().strip("$ ").replace("−", "-").rstrip(".")
    return last_number(bare) if NUMBER.fullmatch(bare) else None


def _same_expression(given: str, wanted: str, column: str) -> bool:
    """By math-verify. Raises ValueError where the reference cannot be read."""
    from math_verify import parse, verify

    references = parse(f"${wanted}$", parsing_timeout=None)
    if not references:
        raise ValueError(f"the reference {wanted[:80]!r} in column {column!r} cannot be read as mathematics")
    try:
        return bool(verify(references, parse(f"${given}$", parsing_timeout=None), timeout_seconds=None))
    except Exception:  # whatever a strange expression does to SymPy: it is the completion's doing
        return False
