"""Code rewards in a run: the sandbox's tier is in the manifest, and every verdict in the metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from world import SMALL_RL, World, play, write

from klimb.errors import RewardError
from klimb.rewards.sandbox import open_sandbox
from klimb.rewards.sandbox.tiers import TIERS


def test_a_run_says_where_code_ran_and_how_it_ended(world: World, tmp_path: Path) -> None:
    try:
        open_sandbox(30.0).close()
    except RewardError as error:
        pytest.skip(str(error))
    quiet = [{"input": "", "output": ""}]
    data = write(tmp_path / "tests.jsonl", [{"prompt": "a ?", "tests": quiet}, {"prompt": "b ?", "tests": None}])
    reward = {"code": {"tests": "tests", "timeout": 30}}
    small = {**SMALL_RL, "prompts_per_step": 2, "samples_per_prompt": 4}
    done = play("rl", tmp_path / "run", model=world.model, data=data, reward=reward, steps=2, algorithm="grpo", **small)
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["decisions"]["sandbox"] in TIERS
    for row in done.rows:
        verdicts = {name: row[f"verdict/{name}"] for name in ("ok", "wrong", "abstain", "timeout", "error")}
        samples = 2 * 4
        assert sum(verdicts.values()) == samples
        assert verdicts["abstain"] == samples / 2  # the rows without tests
        assert verdicts["ok"] == samples / 2
