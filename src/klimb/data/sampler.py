"""In which order rows are trained on: known from (seed, epoch, position), so a run can resume anywhere."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from klimb.errors import RunError


class SamplerState(TypedDict):
    seed: int
    epoch: int
    position: int


class Sampler:
    """Batches of indices below `n`: each exactly once an epoch; a batch may cross the border between two."""

    def __init__(self, n: int, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"n={n} and batch_size={batch_size} have to be at least 1")
        self.n = n
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._order = self._permutation()

    def next_batch(self, size: int | None = None) -> list[int]:
        """The next `size` rows, by default a whole batch."""
        size = size or self.batch_size
        batch: list[int] = []
        while len(batch) < size:
            if self.position == self.n:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation()
            taken = self._order[self.position : self.position + size - len(batch)]
            batch += taken.tolist()
            self.position += len(taken)
        return batch

    def state(self) -> SamplerState:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def restore(self, state: SamplerState) -> None:
        """Raises RunError where the state cannot be one of these rows'."""
        if not 0 <= state["position"] <= self.n or state["epoch"] < 0:
            raise RunError(f"the sampler's state {dict(state)} does not fit {self.n} rows", why="the data changed")
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.n)
        key = _mix(_mix(np.array([self.seed % 2**64], np.uint64)) + np.uint64(self.epoch))
        return np.argsort(_mix(key + np.arange(self.n, dtype=np.uint64)), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014), uint64 → uint64: an order no release of numpy can change."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
