"""Answers to questions: overlap with a reference, a phrase in the completion, and the letter of a choice."""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

from klimb.rewards.rules import MAX_ANSWER, Column, normalised, references


@dataclass(frozen=True, slots=True)
class f1:
    """How many words the completion and the reference share: the harmonic mean of precision and recall.

    SQuAD's definition (arXiv 1606.05250): words without case, punctuation and articles, each as often as it
    occurs in both. Of several references the best counts. A completion far longer than the reference scores little, so
    that it pays to say the answer alone.
    """

    column: Column = "answer"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, text: str, *columns: Any) -> float | None:
        if columns[0] is None:
            return None
        given = normalised(text).split()
        return max((_overlap(given, normalised(str(wanted)).split()) for wanted in references(columns[0])), default=0.0)


def _overlap(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:  # SQuAD 2: no answer is right where none is wanted
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))


@dataclass(frozen=True, slots=True)
class contains:
    """1 where the reference occurs in the completion as whole words, without case, punctuation and articles.

    A completion that lists every likely answer passes: put `length` or `f1` beside it.
    """

    column: Column = "answer"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, text: str, *columns: Any) -> float | None:
        if columns[0] is None:
            return None
        said = f" {normalised(text)} "
        return float(any(f" {_worded(wanted, self.column)} " in said for wanted in references(columns[0])))


def _worded(reference: Any, column: str) -> str:
    wanted = normalised(str(reference))
    if not wanted:
        raise ValueError(f"the reference {str(reference)[:80]!r} in column {column!r} holds no word")
    return wanted


@dataclass(frozen=True, slots=True)
class choice:
    r"""1 where the completion chooses the reference's letter.

    A letter is chosen by a last "answer is B" or "Answer: (B)", by \boxed{B} or #### B, by a completion that begins
    with "B)" or "B.", or by a last line that is B alone; of the first two kinds the last one counts. Who names several
    at that place ("A, B or C") has chosen none. The reference is a letter or the number of the choice from 0.
    """

    column: Column = "answer"
    letters: Annotated[str, "that stand for the choices, in their order"] = "ABCDE"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def score(self, text: str, *columns: Any) -> float | None:
        if columns[0] is None:
            return None
        chosen = chosen_letter(text, self.letters)
        return float(any([chosen == self._letter(wanted) for wanted in references(columns[0])]))

    def _letter(self, reference: Any) -> str:
        if isinstance(reference, int) and not isinstance(reference, bool) and 0 <= reference < len(self.letters):
            return self.letters[reference]
        letter = str(reference).strip().strip("().").upper()
        if len(letter) != 1 or letter not in self.letters:
            raise ValueError(
                f"the reference {str(reference)[:80]!r} in column {self.column!r} is none of {self.letters}"
            )
        return letter


_MARK = re.compile(r"(?i:\b(?:answer|choice|option)\b(?:\s+is\b|\s*[:=])(?:\s*:)?|\\boxed\s*\{|####)\s*")
_OPENED = r"[\s*_($\[{\"'`]{0,8}(?:\\text\s*\{)?(?:(?i:option|choice)\s+)?[*_($\[{\"'`]{0,4}"
_CLOSED = r"[)*_\]}$\"'`]{0,8}"
_NEXT = re.compile(r"[ \t]*(?:,|/|;|&|\bor\b|\band\b)?[ \t]*(?:\bor\b|\band\b)?[ \t]*")
_ARTICLE = re.compile(r"[ \t]+(?!(?:and|or|as|because|since|is|for)\b)\w{2}")
"""What makes an article of an A: a word behind it."""


def chosen_letter(text: str, letters: str = string.ascii_uppercase) -> str | None:
    """The one of `letters` that `text` decides for, None where it decides for none or for several."""
    text = text[-MAX_ANSWER:]
    named = f"[{re.escape(letters)}]"
    marks = [*_MARK.finditer(text)]
    for mark in reversed(marks):
        if found := _list_of(text[mark.end() : mark.end() + 200], named):
            return found[0] if len(set(found)) == 1 else None
    begun = re.match(rf"\s*[*(]{{0,3}}({named})[*]{{0,2}}[).:]", text)
    others = re.findall(rf"(?m)^\s{{0,8}}[*(]{{0,3}}({named})[*]{{0,2}}[).:]", text)
    if begun and set(others) == {begun[1]}:
        found = _list_of(text[:200], named)
        return found[0] if len(set(found)) == 1 else None
    alone = re.fullmatch(rf"{_OPENED}({named}){_CLOSED}[.,]?{_CLOSED}", text.strip().rpartition("\n")[2].strip())
    return alone[1] if alone else None


def _list_of(text: str, named: str) -> list[str]:
    """The letters that `text` begins with, one beside the other."""
    found: list[str] = []
    item, place = re.compile(rf"{_OPENED}({named})(?![\w'’])"), 0
    closed = re.compile(_CLOSED)
    while match := item.match(text, place):
        if match[1] == "A" and _ARTICLE.match(text, match.end()):
            break
        found.append(match[1])
        end = closed.match(text, match.end())
        between = _NEXT.match(text, end.end() if end else match.end())
        place = between.end() if between else match.end()
    return found
