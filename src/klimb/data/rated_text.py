"""Ratings as text behind a completion, "helpfulness: 4, correctness: 3" (SteerLM, arXiv 2310.05344): rows → tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from klimb.data.judged import RATED, question, rated_content, ratings_of, reply_to, up_to_verdict
from klimb.data.kinds import Kind, Record
from klimb.data.load import Task, check_length, tools_of
from klimb.data.render import Renderer, Tokens
from klimb.types import Judged, Text


class Spelling:
    """The tokens of ratings in words, each name and each rating tokenised apart.

    So they are the same whatever stands around them, and where a rating begins and ends is known and never looked for.
    """

    def __init__(self, renderer: Renderer, names: Sequence[str], instruction: str) -> None:
        self._renderer, self._instruction = renderer, instruction
        self._piece = cache(self._tokenised)
        self.names = names

    def name(self, place: int) -> list[int]:
        """All that stands before the rating: of the second name ", correctness:"."""
        return self._piece(f", {self.names[place]}:" if place else f"{self.names[place]}:")

    def rating(self, value: float) -> list[int]:
        return self._piece(f" {int(value) if value.is_integer() else value!r}")

    def end(self, conversational: bool) -> int:
        """The token that ends a reply."""
        asked: Text = [{"role": "user", "content": self._instruction}] if conversational else self._instruction
        return self._renderer.completion(asked, reply_to(asked, f"{self.names[0]}:")).completion[-1]

    def answer(self, values: Sequence[float], conversational: bool) -> list[int]:
        said = [[*self.name(place), *self.rating(value)] for place, value in enumerate(values)]
        return [*(token for part in said for token in part), self.end(conversational)]

    def _tokenised(self, text: str) -> list[int]:
        return self._renderer.completion(self._instruction, text).completion[:-1]


def rated_text(names: Sequence[str], instruction: str) -> Callable[[Renderer], Task[Judged]]:
    """Two pieces: the completion with the instruction behind it, and the ratings of the names in words."""

    def render(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
        asked = [question(r.values["prompt"], r.values["completion"], instruction) for r in records]
        return list(renderer.completions(asked, tools_of(records)))

    def task(renderer: Renderer) -> Task[Judged]:
        spelling = Spelling(renderer, names, instruction)

        def build(record: Record, tokens: Tokens, id: str, limit: int | None) -> Judged:
            conversational, values = not isinstance(record.values["prompt"], str), ratings_of(record, names)
            asked, answer = up_to_verdict(tokens, conversational), spelling.answer(values, conversational)
            check_length("the row", len(tokens.prompt) + len(asked) + len(answer), limit)
            return Judged(id, tokens.prompt, [*asked, *answer], [len(asked), len(answer)], values)

        return Task(
            Judged, RATED, render, rated_content(names), build, details=("rated text", instruction, *names)
        )  # fmt: skip

    return task
