"""Instructions whose keeping a program can see, by the names and arguments of IFEval (arXiv 2311.07911).

Written anew from the paper's list. Words are runs of word characters, sentences end in . ! or ? before a space or the
end; IFEval takes a trained splitter for the latter, so that counts of sentences may differ by abbreviations. The
language of a reply, which IFEval guesses with a package that is not exact, is not checked: such a row is an error.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from klimb.errors import did_you_mean, one_line
from klimb.rewards.code import code_of

MAX_TEXT = 200_000
"""Characters; a longer completion follows no instruction. Bounds the work on a runaway one."""


@dataclass(frozen=True, slots=True)
class instructions:
    """1 where the completion keeps all instructions of its row.

    Counts of words, sentences and paragraphs, keywords, forbidden words, casing, start and end, commas, bullets, JSON.
    An entry of the column is a list of {"check": "length_constraints:number_words", "num_words": 100, "relation": "at
    least"}, with IFEval's names and arguments. Where a data set has names and arguments in two columns, as IFEval's own
    `instruction_id_list` and `kwargs`, name both.
    """

    column: Annotated[str, "column of the lists of checks"] = "instructions"
    arguments: Annotated[str, "column of their arguments, where the first has names alone"] = ""
    partial: Annotated[bool, "the share of the instructions that are kept counts"] = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, self.arguments) if self.arguments else (self.column,)

    def score(self, text: str, *columns: Any) -> float | None:
        if any(entry is None for entry in columns):
            return None
        checks = [checked(*each) for each in self._entries(*columns)]
        if not checks:
            return None
        kept = [len(text) <= MAX_TEXT and check(text) for check in checks]
        return sum(kept) / len(kept) if self.partial else float(all(kept))

    def _entries(self, listed: Any, arguments: Any = None) -> list[tuple[str, Mapping[str, Any]]]:
        listed = json.loads(listed) if isinstance(listed, str) else listed
        if arguments is not None:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if len(listed) != len(arguments):
                raise ValueError(f"{len(listed)} instructions and {len(arguments)} arguments")
            return [(str(name), each or {}) for name, each in zip(listed, arguments)]
        try:
            return [(each["check"], {k: v for k, v in each.items() if k != "check"}) for each in listed]
        except (TypeError, KeyError):
            raise ValueError(f"column {self.column!r}: a list of {{check: NAME, …}} is wanted") from None


Check = Callable[[str], bool]


def checked(name: str, arguments: Mapping[str, Any]) -> Check:
    """The check with its arguments; those that are None are left out. Raises ValueError where it cannot be made."""
    if name not in CHECKS:
        raise ValueError(f"unknown instruction {name!r}; {did_you_mean(name, CHECKS)}")
    check, given = CHECKS[name], {key: value for key, value in arguments.items() if value is not None}
    try:
        inspect.signature(check).bind("", **given)
    except TypeError as error:
        raise ValueError(f"{name}: {one_line(error)}") from None
    for key, value in given.items():
        if key.endswith("relation") and value not in RELATIONS:
            raise ValueError(f"{name}: {key} is {value!r}; {did_you_mean(str(value), RELATIONS)}")
    return lambda text: bool(check(text, **given))


RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, bound: count >= bound,
    "less than": lambda count, bound: count < bound,
    "at most": lambda count, bound: count <= bound,
    "exactly": lambda count, bound: count == bound,
}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def sentences_of(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if part]


def times(text: str, phrase: str) -> int:
    """How often `phrase` occurs as whole words, without case."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _paragraphs(text: str, mark: str) -> list[str]:
    return [part.strip() for part in re.split(mark, text) if part.strip()]


def _nth_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    found = _paragraphs(text, r"\n\s*?\n")
    if len(found) != num_paragraphs or not 0 < nth_paragraph <= len(found):
        return False
    return [word.lower() for word in words_of(found[nth_paragraph - 1])[:1]] == [first_word.lower()]


def _is_json(text: str) -> bool:
    bare = text.strip()
    try:
        json.loads(bare if bare[:1] in ("{", "[") else code_of(bare))
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _highlights(text: str) -> int:
    return sum(bool(one.strip("* \t")) for one in re.findall(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*", text))


def _postscript(text: str, postscript_marker: str) -> bool:
    bare = re.sub(r"\s", "", postscript_marker.lower())
    return any(re.sub(r"\s", "", line.lower()).startswith(bare) for line in text.splitlines())


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(times(text, word) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation="at least": RELATIONS[relation](
        times(text, keyword), frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(times(text, word) for word in forbidden_words),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation="at least": RELATIONS[let_relation](
        text.lower().count(letter.lower()), let_frequency
    ),
    "length_constraints:number_words": lambda text, num_words, relation="at least": RELATIONS[relation](
        len(words_of(text)), num_words
    ),
    "length_constraints:number_sentences": lambda text, num_sentences, relation="at least": RELATIONS[relation](
        len(sentences_of(text)), num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        len(_paragraphs(text, r"\s?\*\*\*\s?")) == num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": _nth_first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]]*\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"(?m)^[ \t]*(?:\*(?!\*)|-|•)[ \t]*[^\s*-]", text)) == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: any(
        f"my answer is {word}." in text.lower() for word in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: _highlights(text) >= num_highlights,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"(?m)^\s?{re.escape(section_spliter)}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: any(map(str.strip, re.findall(r"<<([^\n<>]+)>>", text))),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:start_checker": lambda text, start_phrase: text.lstrip().lower().startswith(start_phrase.strip().lower()),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation="at least": RELATIONS[
        capital_relation
    ](sum(word.isupper() for word in words_of(text)), capital_frequency),
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}  # fmt: skip
"""IFEval's, and start_checker, which it lacks. Each is fn(text, **arguments) -> bool."""
