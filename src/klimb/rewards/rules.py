"""Rewards that need no code: comparisons with a reference answer, and terms for length and format.

A rule is a frozen value with `columns`, what it reads beside the completion, and `score(text, *columns)`
for one row::

    exact(column="solution").score("42 ", "42")  ->  1.0

A reference of None makes the row unscored; a list of references is satisfied by any of them.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from klimb.errors import RewardError, did_you_mean
from klimb.rewards.protocol import Values
from klimb.types import Text

NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![)\]])[-+])?\$?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<power>[eE][-+]?\d{1,3}\b)?"
    r"(?:/(?P<below>\d+(?:\.\d+)?))?"
)
MAX_ANSWER = 10_000
"""Characters at the end of a completion in which an answer is looked for; bounds the work on a runaway
completion.
"""


JUDGES = ("exact", "numeric", "regex", "format")
"""Rules whose scores are verdicts: 1 is ok, anything less wrong."""


class Rule(Protocol):
    @property
    def columns(self) -> tuple[str, ...]: ...

    def score(self, text: str, *columns: Any) -> float | None: ...


@dataclass(frozen=True, slots=True)
class exact:
    """1 where the completion is the reference, spaces around both left out of account."""

    column: str = "answer"
    ignore_case: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, text: str, *columns: Any) -> float | None:
        def same(reference: Any) -> bool:
            wanted, given = str(reference).strip(), text.strip()
            return wanted.casefold() == given.casefold() if self.ignore_case else wanted == given

        return _any_reference(columns[0], same)


@dataclass(frozen=True, slots=True)
class numeric:
    """1 where the completion's number is the reference's: |a − b| ≤ tolerance · max(1, |b|).

    The number is the last one after the last ``####`` where there is such a mark, else the last one of all;
    1,234.5, $3, −7, 2e-3 and 3/4 are read. A completion without a number scores 0; a reference without one
    is an error.
    """

    column: str = "answer"
    tolerance: float = 1e-6

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, text: str, *columns: Any) -> float | None:
        given = last_number(text)

        def same(reference: Any) -> bool:
            wanted = last_number(str(reference))
            if wanted is None:
                raise ValueError(f"the reference {str(reference)[:80]!r} in column {self.column!r} holds no number")
            return given is not None and abs(given - wanted) <= self.tolerance * max(1.0, abs(wanted))

        return _any_reference(columns[0], same)


@dataclass(frozen=True, slots=True)
class regex:
    """1 where what the first group of `pattern` caught last is the reference, spaces around both left out
    of account.
    """

    pattern: str
    column: str = "answer"

    def __post_init__(self) -> None:
        if _compiled(self.pattern).groups == 0:
            raise RewardError(
                f"the pattern {self.pattern!r} has no group",
                where="reward regex",
                fix="put what is to equal the reference in parentheses, or use `format` to look for a match",
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, text: str, *columns: Any) -> float | None:
        found = None
        for match in _compiled(self.pattern).finditer(text):
            found = match.group(1)
        return _any_reference(
            columns[0], lambda reference: found is not None and found.strip() == str(reference).strip()
        )


@dataclass(frozen=True, slots=True)
class length:
    """How long the completion is; give it a negative weight in a sum to make it shorter."""

    unit: Literal["tokens", "words", "characters"] = "tokens"

    def __post_init__(self) -> None:
        known = ("tokens", "words", "characters")
        if self.unit not in known:
            raise RewardError(f"unknown unit {self.unit!r}", where="reward length", fix=did_you_mean(self.unit, known))

    @property
    def columns(self) -> tuple[str, ...]:
        return ("completion_tokens",) if self.unit == "tokens" else ()

    def score(self, text: str, *columns: Any) -> float | None:
        if self.unit == "tokens":
            return float(columns[0])
        return float(len(text.split()) if self.unit == "words" else len(text))


@dataclass(frozen=True, slots=True)
class format:
    """1 where the completion has the form asked for: these tags once each, in this order, with nothing
    outside them (``<think>…</think> <answer>…</answer>``), or a match of `pattern` anywhere (``.`` matches
    line breaks too).
    """

    tags: Sequence[str] = ()
    pattern: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", (self.tags,) if isinstance(self.tags, str) else tuple(self.tags))
        if bool(self.tags) == bool(self.pattern):
            raise RewardError("`tags` or `pattern` is wanted, one of them", where="reward format")
        _compiled(self.pattern)

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def score(self, text: str, *columns: Any) -> float | None:
        return float(_tagged(text, self.tags) if self.tags else bool(_compiled(self.pattern).search(text)))


RULES: dict[str, Callable[..., Rule]] = {
    "exact": exact,
    "numeric": numeric,
    "regex": regex,
    "length": length,
    "format": format,
}


def parse_rule(name: str, options: dict[str, Any]) -> Rule:
    """The rule `name`. Raises RewardError for an unknown name or option, naming the nearest."""
    if name not in RULES:
        raise RewardError(f"unknown reward {name!r}", fix=did_you_mean(name, RULES))
    rule = RULES[name]
    known = [field.name for field in fields(rule)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise RewardError(f"unknown option {option!r}", where=f"reward {name}", fix=did_you_mean(option, known))
    try:
        return rule(**options)
    except TypeError as error:
        raise RewardError("an option is missing", where=f"reward {name}", why=error) from error


def rule_function(rule: Rule) -> Callable[..., Values]:
    """`rule` as a reward function whose signature asks for the columns that it needs."""

    def score(completions: list[Text], **columns: list[Any]) -> Values:
        rows = zip(*(columns[name] for name in rule.columns), strict=True) if rule.columns else [()] * len(completions)
        return [rule.score(plain_text(text), *row) for text, row in zip(completions, rows, strict=True)]

    wanted = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("completions", *rule.columns)]
    score.__signature__ = inspect.Signature(wanted)  # type: ignore[attr-defined]
    return score


def plain_text(text: Text) -> str:
    """What was said, without the roles: the contents of all messages one after the other."""
    if isinstance(text, str):
        return text
    return "".join(_content(message.get("content")) for message in text)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def last_number(text: str) -> float | None:
    """The last number of `text`, after its last ``####`` where there is one. None where there is no finite
    one.
    """
    marked = text.rpartition("####")[2][-MAX_ANSWER:]
    matches = list(NUMBER.finditer(marked.replace("−", "-")))
    if not matches:
        return None
    match = matches[-1]
    value = float(match["digits"].replace(",", "") + (match["power"] or ""))
    if match["below"]:
        value = value / float(match["below"]) if float(match["below"]) else math.nan
    value = -value if match["sign"] == "-" else value
    return value if math.isfinite(value) else None


def _any_reference(reference: Any, same: Callable[[Any], bool]) -> float | None:
    if reference is None:
        return None
    return float(any(same(entry) for entry in (reference if isinstance(reference, list) else [reference])))


def _tagged(text: str, tags: Sequence[str]) -> bool:
    rest = text
    for tag in tags:
        before, opened, rest = rest.partition(f"<{tag}>")
        inside, closed, rest = rest.partition(f"</{tag}>")
        if (
            before.strip()
            or not opened
            or not closed
            or any(f"<{mark}{t}>" in inside for t in tags for mark in ("", "/"))
        ):
            return False
    return not rest.strip()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardError(f"{pattern!r} is no regular expression", where="reward", why=error) from error
