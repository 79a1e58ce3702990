"""An engine without a model: completions come late, in any order, from mixed versions, and some are aborted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from klimb.rollout.engine import Request
from klimb.types import Finish, Sample, Segment


class FakeEngine:
    """A `RolloutEngine` for tests: random tokens below `vocabulary` with log-prob −1, shuffled before delivery."""

    def __init__(self, *, seed: int = 0, vocabulary: int = 8, abort_share: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.vocabulary = vocabulary
        self.abort_share = abort_share
        self.version = 0
        self.paused = False
        self.waiting: list[tuple[Request, int]] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self.waiting += [(request, request.first + i) for request in requests for i in range(request.samples)]

    def stream(self) -> Iterator[tuple[Request, Sample]]:
        while self.waiting and not self.paused:
            request, index = self.waiting.pop(self.random.randrange(len(self.waiting)))
            yield request, self._sample(request, index)

    def _sample(self, request: Request, index: int) -> Sample:
        if self.random.random() < self.abort_share:
            return Sample(request.prompt.id, index, [], "abort")
        n = self.random.randint(1, request.params.max_tokens)
        tokens = [self.random.randrange(self.vocabulary) for _ in range(n)]
        versions = sorted(self.random.choice([max(self.version - 1, 0), self.version]) for _ in range(n))
        finish: Finish = "length" if n == request.params.max_tokens else "stop"
        segment = Segment(tokens, True, [-1.0] * n, versions)
        return Sample(request.prompt.id, index, [segment], finish, " ".join(map(str, tokens)))

    def update_weights(self, version: int) -> None:
        self.version = version

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.abort_share = 1.0
