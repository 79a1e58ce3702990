"""A stage tried out before it runs: two of its steps, a part of its sampling, and its end; and what all would take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

STEPS = 2
"""The first compiles, allocates and warms up; the second is measured."""
ROWS = 128
"""Samples that are drawn outside the steps, of however many: as many as an engine computes side by side."""
FEW = 64
"""Items of a data set that a stage goes through at its end."""


@dataclass
class Rehearsal:
    """Told by a stage how far it is, and tells it when that is enough."""

    least: int = 2
    """Samples of a prompt that are compared with each other."""
    began: float = field(default_factory=time.perf_counter)
    preparing: float = 0.0
    """Seconds until the first step."""
    total: int = 0
    """Steps of the whole run."""
    share: float = 1.0
    """Of the samples that were asked for last, those that were drawn."""
    sampling: float = 0.0
    """Seconds that all samples outside the steps would take, with their scores."""
    _begun: int = 0

    def enough(self, total: int) -> bool:
        """Asked before each step of `total`."""
        if not self._begun:
            self.preparing = time.perf_counter() - self.began
        self.total, self._begun = total, self._begun + 1
        return self._begun > STEPS

    @contextmanager
    def part(self, requests: list[Any]) -> Iterator[list[Any]]:
        """As many prompts as fill an engine once, each with fewer samples where that lets more of them in.

        requests: of engines, all with the same number of `samples`.
        """
        samples = requests[0].samples
        each = min(samples, max(self.least, ROWS // len(requests)))
        some = [replace(request, samples=each) for request in requests[: max(1, ROWS // each)]]
        self.share = len(some) * each / (len(requests) * samples)
        began = time.perf_counter()
        yield some
        self.sampling += (time.perf_counter() - began) / self.share
