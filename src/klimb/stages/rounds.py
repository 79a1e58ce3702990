"""Rounds of a recipe: the same stages again and again, each round starting from what the one before made.

::

    stages:
      sft: {stage: sft, …}
      rounds:
        repeat: 3
        first: {model: "${sft.model}"}
        then: {model: "${learn.model}"}
        stages:
          draw: {stage: sample, model: "${rounds.model}", keep: {at_least: 1}, …}
          learn: {stage: sft, model: "${rounds.model}", data: "${draw.demonstrations}", …}

are the stages sft, draw-1, learn-1, draw-2, … `${rounds.model}` is `first` in the first round, `then` of the round
before in the others, and after the block what the last round made.

Without `first` and `then` the rounds are independent, and differ by their random numbers alone: the members of an
ensemble. ``members: {repeat: 4, stages: {rm: {stage: reward, …}}}`` is the stages rm-1, …, rm-4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from klimb.config import REFERENCE, map_text
from klimb.errors import ConfigError, did_you_mean

_KEYS = ("repeat", "first", "then", "stages")


def unroll(stages: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The stages with every block of rounds written out. Raises ConfigError where a block cannot be.

    A written-out stage says in its key `round` which round it is of, so that each draws with its own random numbers.
    """
    flat: dict[str, Any] = {}
    carried: dict[str, Mapping[str, str]] = {}
    for name, block in stages.items():
        if not isinstance(block, Mapping) or "repeat" not in block:
            flat[name] = _written_out(block, {}, carried)
            continue
        _check(block, f"{where}: stages.{name}")
        starts = _written_out(block.get("first", {}), {}, carried)
        for count in range(1, block["repeat"] + 1):
            names = {inner: f"{inner}-{count}" for inner in block["stages"]}
            for inner, settings in block["stages"].items():
                flat[names[inner]] = _written_out({**settings, "round": count}, names, {**carried, name: starts})
            starts = _written_out(block.get("then", {}), names, carried)
        carried[name] = starts
    return flat


def _check(block: Mapping[str, Any], where: str) -> None:
    for key in block:
        if key not in _KEYS:
            raise ConfigError(f"unknown key {key!r}", where=where, fix=did_you_mean(str(key), _KEYS))
    repeat, inner = block["repeat"], block.get("stages")
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise ConfigError(f"repeat={repeat!r}", where=where, why="it is no number of rounds", fix="write repeat: 3")
    if not isinstance(inner, Mapping) or not all(isinstance(own, Mapping) for own in inner.values()) or not inner:
        raise ConfigError("no stages to repeat", where=where, fix="give stages: {draw: {stage: sample, …}, …}")
    first, then = block.get("first", {}), block.get("then", {})
    if not isinstance(first, Mapping) or not isinstance(then, Mapping) or set(first) != set(then):
        raise ConfigError(
            "first and then have to name the same things", where=where,
            why="what a round starts from is `first` in the first and `then` of the one before in the others",
            fix='write first: {model: "${sft.model}"} and then: {model: "${learn.model}"}',
        )  # fmt: skip


def _written_out(value: Any, names: Mapping[str, str], carried: Mapping[str, Mapping[str, str]]) -> Any:
    """`value` with references to the stages of a round, and to what blocks carry, replaced by what they mean."""

    def written(found: re.Match[str]) -> str:
        source, _, key = found[1].strip().partition(".")
        if key in carried.get(source, {}):
            return str(carried[source][key])
        return f"${{{names[source]}.{key}}}" if source in names else found[0]

    return map_text(value, lambda text: REFERENCE.sub(written, text))
