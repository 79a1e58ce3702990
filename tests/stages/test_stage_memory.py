"""Options that save memory, in whole stages: what they may not change, and what a run says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kills import remains
from world import SMALL_RL, World, play


def job(world: World, name: str) -> tuple[str, dict[str, Any]]:
    rl = {"data": world.prompts, "reward": world.reward("count"), "steps": 2, **SMALL_RL}
    return {
        "grpo": ("rl", rl),
        "ppo": ("rl", {**rl, "algorithm": "ppo", "lora": {"rank": 2}}),  # both faces on one backbone
        "ppo-full": ("rl", {**rl, "algorithm": "ppo"}),
        "dpo": ("preference", {"data": world.preferences, "steps": 2, "batch_size": 5}),
        "reward": ("reward", {"data": world.preferences, "steps": 2, "batch_size": 5, "lora": {"rank": 2}}),
    }[name]


@pytest.mark.parametrize("name", ["grpo", "ppo", "ppo-full", "dpo", "reward"])
def test_checkpointing_changes_no_bit_of_a_run(world: World, tmp_path: Path, name: str) -> None:
    stage, values = job(world, name)
    calls = []
    for setting in ("off", "on"):
        play(stage, tmp_path / setting, model=world.model, checkpointing=setting, token_budget=40, **values)
        calls.append(remains(tmp_path / setting))
    off, on = calls
    assert [key for key in off if off[key] != on[key] and key.startswith("model/") and "config" not in key] == []
    assert off["metrics.jsonl"] == on["metrics.jsonl"]
