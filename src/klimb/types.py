"""What crosses borders and files: plain values, free of torch.

A prompt is asked, a sample answers it, the samples of one prompt are a group::

    Group(prompt=Prompt(id="3f2a…", tokens=[1, 7, 9], text="tea ?"),
          samples=[Sample(prompt_id="3f2a…", index=0, finish="stop",
                          segments=[Segment(tokens=[12, 5, 2], logps=[-.4, -1.1, -.2], versions=[3, 3, 3])])])

A sample is a list of segments because a completion may hold turns that the policy did not choose (a tool's answer,
a user's next message); only the policy's tokens carry log-probs and are trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

Message = dict[str, Any]
"""{"role": ..., "content": ...} and whatever else the chat template understands."""

Text = str | list[Message]
"""A prompt or completion as a person reads it: a string (standard) or messages (conversational)."""

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt. `id` is stable over runs: a hash of its content, never its place in a file."""

    id: str
    tokens: list[int]
    text: Text
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's further columns; reward functions get them by name."""


@dataclass(slots=True)
class Segment:
    """A run of tokens from one source. `logps` (after temperature) and `versions` are per token, policy only."""

    tokens: list[int]
    policy: bool = True
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Sample:
    """One completion of a prompt."""

    prompt_id: str
    index: int
    segments: list[Segment]
    finish: Finish
    text: Text = ""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """Components by name, as logged."""
    score: float | None = None
    """What the reward source gave in the end; None: not scored, and so in no statistic and no loss."""
    step_rewards: list[tuple[int, float]] = field(default_factory=list)
    """What of the score is given earlier: the place of a token in `tokens`, and how much."""

    @property
    def id(self) -> str:
        return f"{self.prompt_id}/{self.index}"

    @property
    def tokens(self) -> list[int]:
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def mask(self) -> list[bool]:
        """True where the policy chose the token."""
        return [segment.policy for segment in self.segments for _ in segment.tokens]

    @property
    def logps(self) -> list[float]:
        """Behaviour log-probs of the policy's tokens, environment tokens left out."""
        return [logp for segment in self.segments if segment.policy for logp in segment.logps]


@dataclass(slots=True)
class Group:
    """A prompt and its completions: the unit that advantages compare within."""

    prompt: Prompt
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised demonstration: the context, then the tokens of which `mask` says which are trained on."""

    id: str
    prompt: list[int]
    completion: list[int]
    mask: list[bool]


@dataclass(frozen=True, slots=True)
class Preference:
    """A tokenised comparison of two completions of one prompt."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_mask: list[bool]
    rejected_mask: list[bool]
    margin: float = 0.0
    strength: float = 1.0
    """The share of judges who would prefer the chosen one."""
    gold: list[int] = field(default_factory=list)
    """Of a triple: a completion better than both."""
    gold_mask: list[bool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A tokenised completion that somebody found desirable, or not."""

    id: str
    prompt: list[int]
    completion: list[int]
    mask: list[bool]
    label: bool


@dataclass(frozen=True, slots=True)
class Judged:
    """A tokenised prompt with pieces of text and the numbers that somebody gave them.

    Several completions with a score each; or one completion as its steps, each right (1) or wrong (0); or one
    completion with a rating for each of several attributes. `lengths` are the pieces' tokens.
    """

    id: str
    prompt: list[int]
    tokens: list[int]
    lengths: list[int]
    values: list[float]

    @property
    def pieces(self) -> list[list[int]]:
        ends = list(accumulate(self.lengths))
        return [self.tokens[end - length : end] for end, length in zip(ends, self.lengths, strict=True)]
