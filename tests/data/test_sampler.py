from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.data.sampler import Sampler
from klimb.errors import RunError

FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@FUZZ
@given(st.integers(1, 40), st.integers(1, 90), st.integers(-(2**70), 2**70), st.booleans())
def test_every_item_once_an_epoch_across_borders(n: int, batch_size: int, seed: int, shuffle: bool) -> None:
    sampler = Sampler(n, batch_size, seed, shuffle)
    batches = [sampler.next_batch() for _ in range(3 * n)]
    assert {len(batch) for batch in batches} == {batch_size}
    flat = list(itertools.chain.from_iterable(batches))
    for epoch in range(len(flat) // n):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))


@FUZZ
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 9), st.integers(0, 40))
def test_a_restored_state_continues_the_same_sequence(n: int, batch_size: int, seed: int, steps: int) -> None:
    sampler = Sampler(n, batch_size, seed)
    for _ in range(steps):
        sampler.next_batch()
    resumed = Sampler(n, batch_size, seed=99)
    resumed.restore(sampler.state())
    assert [resumed.next_batch() for _ in range(5)] == [sampler.next_batch() for _ in range(5)]


def test_orders_differ_between_epochs_and_seeds_and_are_even() -> None:
    orders = {tuple(Sampler(6, 6, seed).next_batch()) for seed in range(12_000)}
    assert len(orders) == 720  # uniform draws would miss 720 · (1 - 1/720)^12000 = 4e-5 of the permutations of 6
    sampler = Sampler(1000, 1000, 0)
    first, second = sampler.next_batch(), sampler.next_batch()
    agreeing = sum(a == b for a, b in zip(first, second))
    assert agreeing < 10  # Poisson with mean 1: ten or more once in ten million


def test_the_order_is_pinned() -> None:
    """SplitMix64 of seed, epoch and index in Python's integers; a change would break resuming old runs."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    sampler = Sampler(10, 10, seed=7)
    for epoch in range(3):
        key = mix(mix(7) + epoch)
        assert sampler.next_batch() == sorted(range(10), key=lambda index: mix((key + index) % 2**64))


def test_impossible_states_and_sizes_are_refused() -> None:
    with pytest.raises(RunError, match="does not fit 5 rows"):
        Sampler(5, 2).restore({"seed": 0, "epoch": 0, "position": 6})
    with pytest.raises(ValueError, match="at least 1"):
        Sampler(0, 2)
