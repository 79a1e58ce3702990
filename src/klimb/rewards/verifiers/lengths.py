"""Terms for how long and how repetitive a completion is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from klimb.errors import RewardError
from klimb.rewards.protocol import Columns, Reward, Scores
from klimb.types import Text

MAX_WORDS = 100_000
RIGHT = 0.5
"""What a score has to exceed for the completion to be right."""


@dataclass(frozen=True, slots=True)
class repetition:
    """The share of the completion's n-grams of words that were there before: 1 − distinct / all, 0 without any.

    Give it a negative weight in a sum. Of a runaway completion the last 100,000 words count.
    """

    n: Annotated[int, "words in an n-gram"] = 3

    def __post_init__(self) -> None:
        if self.n < 1:
            raise RewardError(f"n is {self.n}", where="reward repetition", fix="give 1 or more")

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def score(self, text: str, *columns: Any) -> float | None:
        words = text.lower().split()[-MAX_WORDS:]
        grams = [*zip(*(words[start:] for start in range(self.n)))]
        return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class cosine:
    """Right answers sooner, wrong ones after more thought: the score of another reward, scaled by the length.

    CosFn(t) = end + ½ (start − end)(1 + cos(π t / max_length)) over the completion's tokens t, from `right[0]` to
    `right[1]` where `of` scores above 0.5 and from `wrong[0]` to `wrong[1]` where it does not; `too_long` from
    max_length on (Demystifying Long CoT, arXiv 2502.03373). The numbers are ours: the paper tunes them so that
    right beats wrong, short beats long among the right and long beats short among the wrong. Long completions are paid
    for by repetition sooner or later: put `repetition` beside it.
    """

    max_length: Annotated[int, "tokens, at which a completion is too long"]
    of: Annotated[Any, "a reward that says what is right, as after `reward:`"]
    right: Annotated[Sequence[float], "scores of a right answer of no and of full length"] = (1.0, 0.5)
    wrong: Annotated[Sequence[float], "scores of a wrong answer of no and of full length"] = (-1.0, -0.5)
    too_long: Annotated[float, "score at max_length and beyond"] = -1.0

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise RewardError(
                f"max_length is {self.max_length}", where="reward cosine", fix="give the tokens of a reply"
            )
        for name in ("right", "wrong"):
            if len(getattr(self, name)) != 2:
                raise RewardError(f"{name} is {getattr(self, name)!r}", where="reward cosine", fix="give two numbers")

    def scaled(self, score: float | None, tokens: int) -> float | None:
        if score is None:
            return None
        if tokens >= self.max_length:
            return self.too_long
        start, end = self.right if score > RIGHT else self.wrong
        return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * tokens / self.max_length))


class CosineReward:
    """A Reward around another one, whose own score is kept as a component."""

    name = "cosine"

    def __init__(self, options: cosine, reward: Reward) -> None:
        self._options = options
        self.reward = reward
        self.independent = getattr(reward, "independent", False)
        self.waits = getattr(reward, "waits", False)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        scores = self.reward(prompts, completions, columns)
        lengths = columns["completion_tokens"]
        values = [self._options.scaled(score, tokens) for score, tokens in zip(scores.values, lengths, strict=True)]
        parts = scores.parts or {self.reward.name: scores.values}
        return replace(scores, values=values, parts={self.name: values, **parts}, weights={}, raw=None)

    def close(self) -> None:
        self.reward.close()
