"""Likelihood displacement: the margin grows while the chosen completions themselves become less likely.

A margin loss is content with that, and the probability that is lost goes to neither of the two (arXiv 2410.08847).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_DECAY = 0.9
_FIRST = 10
"""Updates whose mean stands for the start, where no reference says what it was."""
_SHARE = 0.1
"""Without a reference the pairs of two updates differ: a fall below this share of the start is none."""


@dataclass
class Displacement:
    """Follows the chosen completions' log-prob over the updates, and says when it falls, and when it fell twice as far.

    The running mean is one over about ten updates. `fall` is in nats a completion.
    """

    updates: int = 0
    start: float = 0.0
    mean: float = 0.0
    told: float = 0.0
    """The fall that was said last."""

    def look(self, chosen_logps: float, chosen_log_ratio: float | None) -> str | None:
        """What to say after an update, if anything. chosen_log_ratio: to the reference, where there is one."""
        self.updates += 1
        value = chosen_log_ratio if chosen_log_ratio is not None else chosen_logps
        if not math.isfinite(value):
            return None
        decay = min(_DECAY, 1 - 1 / self.updates)
        self.mean = decay * self.mean + (1 - decay) * value
        if chosen_log_ratio is None and self.updates <= _FIRST:
            self.start = self.mean
            return None
        fall = (0.0 if chosen_log_ratio is not None else self.start) - self.mean
        least = 1.0 if chosen_log_ratio is not None else max(1.0, _SHARE * abs(self.start))
        if self.updates < _FIRST or fall < max(least, 2 * self.told):
            return None
        self.told = fall
        below = "below the reference" if chosen_log_ratio is not None else f"below the first {_FIRST} updates"
        return (
            f"the chosen completions become less likely: their log-prob is {fall:.1f} nats {below} on average, while "
            "their probability goes elsewhere; add likelihood (loss=rpo), hold it (dpop, dpo_shift), lower lr, or stop "
            "earlier"
        )

    def state(self) -> dict[str, Any]:
        return asdict(self)
