"""Rewards of benchmarks."""

from typing import Any


def long_words(completions: list[str], **columns: Any) -> list[float]:
    """The mean length of a word."""
    return [sum(map(len, text.split())) / max(len(text.split()), 1) for text in completions]
