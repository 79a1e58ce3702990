"""A stage tried out before it runs: two of its steps, a part of its sampling, and its end; and what all would take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        """Whole prompts, those that fill an engine once. requests: each with its number of `samples`."""
        some = requests[: math.ceil(ROWS / requests[0].samples)]
        self.share = len(some) / len(requests)
        began = time.perf_counter()
        yield some
        self.sampling += (time.perf_counter() - began) / self.share
