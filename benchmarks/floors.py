"""What a step cannot do without: multiplications and bytes, over what this machine was measured to do of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from work import Size

from klimb.types import Group

_SECONDS = 0.25  # of one measurement; the best repetition counts


@dataclass(frozen=True)
class Work:
    """Tokens of one step: of each prompt, and of the completions of each."""

    prompts: list[int]
    completions: list[list[int]]

    @staticmethod
    def of(groups: Sequence[Group]) -> Work:
        return Work([len(g.prompt.tokens) for g in groups], [[len(s.tokens) for s in g.samples] for g in groups])

    @property
    def sampled(self) -> int:
        return sum(map(sum, self.completions))

    @property
    def flat(self) -> int:
        """A prompt once for all its completions."""
        return sum(self.prompts) + self.sampled

    @property
    def decoded(self) -> int:
        """Tokens that came out of a decode step: all but the first of each completion, which its prompt gives."""
        return self.sampled - sum(map(len, self.completions))

    @property
    def decode_steps(self) -> int:
        return max(map(max, self.completions)) - 1

    @property
    def seen(self) -> int:
        """Pairs of token and earlier token (or itself) in what is trained on."""
        pairs = sum(prompt * (prompt + 1) // 2 for prompt in self.prompts)
        for prompt, lengths in zip(self.prompts, self.completions, strict=True):
            pairs += sum(length * prompt + length * (length + 1) // 2 for length in lengths)
        return pairs

    @property
    def read(self) -> int:
        """Cached tokens that decode steps read: each sample's own, and a prompt once for all its running samples."""
        own = sum(length * (length - 1) // 2 for lengths in self.completions for length in lengths)
        return own + sum(n * (max(lengths) - 1) for n, lengths in zip(self.prompts, self.completions, strict=True))


class Floors:
    """Seconds that the parts of a step would take at the measured peaks. rows: of a micro-batch in training."""

    def __init__(self, size: Size, parameters: int, dtype: torch.dtype, rows: int) -> None:
        self.size, self.parameters, self.dtype, self.rows = size, parameters, dtype, rows
        self.width = dtype.itemsize
        self.rates: dict[int, float] = {}
        self.bandwidths: dict[int, float] = {}

    def of(self, work: Work) -> dict[str, float]:
        """By the names of the lines in breakdown.py; lines without a floor are left out."""
        s = self.size
        running = max(1, round(work.decoded / work.decode_steps))
        prompt_pairs = sum(n * (n + 1) // 2 for n in work.prompts)
        prefill = s.forward_flops(sum(work.prompts), len(work.prompts), prompt_pairs)
        forward = s.forward_flops(work.flat, work.sampled, work.seen) / self.flops(self.rows)
        decode = s.forward_flops(work.decoded, work.decoded, 0) / self.flops(running)
        cached = work.read * 2 * s.hidden * s.layers * self.width
        return {
            "rollout: prefill": prefill / self.flops(sum(work.prompts)),
            "rollout: decode": decode + cached / self.bytes_per_second(cached // work.decode_steps),
            # The logits are read once and a number of each row is written.
            "rollout: sampling": work.sampled * s.vocabulary * 4 / self.bytes_per_second(running * s.vocabulary * 4),
            "forward": forward,
            "backward": 2 * forward,
            # AdamW in fp32 reads weight, gradient and two moments and writes all but the gradient.
            "optimiser": self.parameters * 7 * 4 / self.bytes_per_second(self.parameters * 7 * 4),
        }

    def flops(self, rows: int) -> float:
        """FLOP/s of the model's matrices, each multiplied with about this many rows, weighted as in the model."""
        rows = _rounded(rows)
        if rows not in self.rates:
            s = self.size
            shapes = {(s.hidden, s.hidden): 4 * s.layers, (s.hidden, s.mlp): 2 * s.layers, (s.mlp, s.hidden): s.layers,
                      (s.hidden, s.vocabulary): 1}  # fmt: skip
            seconds = sum(times * self._multiply(rows, *shape) for shape, times in shapes.items())
            self.rates[rows] = sum(2 * rows * a * b * times for (a, b), times in shapes.items()) / seconds
        return self.rates[rows]

    def _multiply(self, rows: int, inputs: int, outputs: int) -> float:
        """The weight by row or by column, whichever is faster for so many rows."""
        x = torch.randn(rows, inputs).to(self.dtype)
        weight = torch.randn(outputs, inputs).to(self.dtype)
        by_column = weight.t().contiguous().t()
        out = torch.empty(rows, outputs, dtype=self.dtype)
        return min(best(partial(torch.mm, x, w.t(), out=out)) for w in (weight, by_column))

    def bytes_per_second(self, size: int) -> float:
        """Bytes read and written by copies of a working set of this size (so that a small one stays in the caches)."""
        elements = _rounded(max(1 << 10, min(size, 1 << 28) // 8))  # of 4 bytes, half of them read, half written
        if elements not in self.bandwidths:
            source, target = torch.zeros(elements), torch.zeros(elements)
            self.bandwidths[elements] = 8 * elements / best(lambda: target.copy_(source))
        return self.bandwidths[elements]


def _rounded(number: int) -> int:
    """To a power of two: steps differ a little, and each measurement takes its time."""
    return 1 << round(math.log2(number))


@torch.no_grad()
def best(call: Callable[[], object]) -> float:
    """The shortest of the calls that fit in a quarter of a second, at least three."""
    call()
    shortest, until, calls = float("inf"), time.perf_counter() + _SECONDS, 0
    while calls < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        shortest, calls = min(shortest, time.perf_counter() - start), calls + 1
    return shortest
