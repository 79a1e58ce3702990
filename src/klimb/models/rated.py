"""Reward models that learn from ratings on a scale: ordered levels, and ratings that a language model writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from klimb.batch import Row, TokenBatch
from klimb.models.backbone import Backbone
from klimb.models.encoder import EncoderReward
from klimb.models.faces import Policy, RewardModel, Verdicts
from klimb.models.logprobs import precision
from klimb.objective.judging import ordered


class Ordinal(nn.Module):
    """A reward model beside thresholds θ_1 < … < θ_{K−1} on its raw score: P(above levels[k]) = σ(score − θ_k).

    The reward is the score; the thresholds are trained with it and say afterwards what it means.
    """

    levels: Tensor

    def __init__(
        self, scored: RewardModel | EncoderReward, levels: Sequence[float], thresholds: Sequence[float]
    ) -> None:
        super().__init__()
        self.scored = scored
        first, *steps = thresholds[0], *(math.log(b - a) for a, b in pairwise(thresholds))
        like = next(scored.backbone.parameters())
        self.register_buffer("levels", torch.tensor(levels, device=like.device, dtype=torch.float32))
        self.raw = nn.Parameter(torch.tensor([first, *steps], device=like.device, dtype=precision(like)))

    @property
    def backbone(self) -> Backbone:
        return self.scored.backbone

    @property
    def thresholds(self) -> Tensor:
        """[K − 1], rising."""
        return ordered(self.raw)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Raw scores [B]."""
        found: Tensor = self.scored(batch)
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        return {**self.scored.trainable(), "thresholds": self.raw}


@dataclass(frozen=True)
class Place:
    """Where an attribute is rated: its weight in the reward, the tokens of its name, and its ratings with theirs."""

    attribute: str
    weight: float
    name: list[int]
    ratings: list[float]
    tokens: list[list[int]]


class WrittenRatings(nn.Module):
    """r = Σ weight · expected rating, of ratings that a language model writes one after the other.

    The expectation is over the ratings seen in training, each as likely as its text up to the token behind it ("1" is
    not "10"), against the others. So it is finer than the rating that is written, and there is none that cannot be
    read. Before the next attribute the most likely rating is written. A batch takes one pass for each attribute, in
    which a sample's ratings share all that stands before them.
    """

    def __init__(self, policy: Policy, places: Sequence[Place], end: int) -> None:
        super().__init__()
        self.policy, self.places, self.end = policy, places, end

    @staticmethod
    def of(policy: Policy, facts: Mapping[str, Any]) -> WrittenRatings:
        """facts: as those of `facts`, kept beside the weights."""
        return WrittenRatings(policy, [Place(**place) for place in facts["places"]], facts["end"])

    @staticmethod
    def facts(places: Sequence[Place], end: int) -> dict[str, Any]:
        return {"places": [asdict(place) for place in places], "end": end}

    @property
    def backbone(self) -> Backbone:
        return self.policy.backbone

    def forward(self, batch: TokenBatch) -> Tensor:
        """Raw scores [B]. Of each sample's only row that is read which stands before what is marked."""
        expected, _ = self.read(batch)
        return expected @ expected.new_tensor([place.weight for place in self.places])

    def read(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The expected rating and the most likely one, by attribute: [B, K] both."""
        said = [[*row.prompt, *row.completion[: [*row.mask, True].index(True)]] for [row] in batch.rows]
        expected, likeliest = [], []
        for place, behind in zip(self.places, [*(p.name[0] for p in self.places[1:]), self.end], strict=True):
            said = [[*tokens, *place.name] for tokens in said]
            logps = self._logps(said, [[*tokens, behind] for tokens in place.tokens])
            best, ratings = logps.argmax(dim=1), logps.new_tensor(place.ratings)
            expected.append(logps.softmax(dim=1) @ ratings)
            likeliest.append(ratings[best])
            said = [[*tokens, *place.tokens[b]] for tokens, b in zip(said, best.tolist(), strict=True)]
        return torch.stack(expected, dim=1), torch.stack(likeliest, dim=1)

    def _logps(self, said: Sequence[list[int]], texts: Sequence[list[int]]) -> Tensor:
        """Of each text behind all that is said: [B, number of texts]."""
        rows = [[Row(before, text, [True] * len(text))] for before in said for text in texts]
        batch = TokenBatch.from_rows(rows, range(len(rows)), [str(i) for i in range(len(rows))])
        logps: Tensor = self.policy(batch).logps
        return logps.sum(dim=1).view(len(said), len(texts))

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable()


Judge = RewardModel | EncoderReward | Verdicts | Ordinal | WrittenRatings
"""What a reward model may be: a batch of completions → raw scores [B]."""
