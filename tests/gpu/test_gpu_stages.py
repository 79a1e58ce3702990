"""Every stage on one device: it runs, its numbers are the CPU's, and it goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import differences
from world import SMALL_RL, Played, World, play

from klimb.models.load import resolve_dtype

RL = ("grpo", "ppo")
STAGES = ("sft", "reward", "dpo", *RL)
LORA = {"full": None, "lora": {"rank": 4, "alpha": 8.0}, "4bit": {"rank": 4, "alpha": 8.0, "base": "4bit"}}
JOBS = [(name, kind) for name in STAGES for kind in LORA if (name, kind) != ("reward", "4bit")]

PARITY = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""Relative bounds of loss and gradient norm beside fp32 on the CPU: the order of sums, or 8 and 11 bits. In RL other
bits draw other tokens: there `test_gpu_mismatch.py` says how far 16 bits are off."""


def job(world: World, name: str, kind: str) -> tuple[str, dict[str, Any]]:
    """The stage and what it is given."""
    rl = {"data": world.prompts, "reward": world.reward("count"), **SMALL_RL}
    stage, values = {
        "sft": ("sft", {"data": world.demonstrations, "batch_size": 8}),
        "reward": ("reward", {"data": world.preferences, "batch_size": 8}),
        "dpo": ("preference", {"data": world.preferences, "batch_size": 8}),
        "grpo": ("rl", rl),
        "ppo": ("rl", {**rl, "algorithm": "ppo"}),
    }[name]
    if kind == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'klimb[4bit]'")
    lora = {} if LORA[kind] is None else {"lora": LORA[kind]}
    return stage, {"model": world.model, "token_budget": 256, **values, **lora}


def decisions(played: Played) -> dict[str, Any]:
    return dict(json.loads((played.path / "manifest.json").read_text())["decisions"])


@pytest.mark.parametrize(("name", "kind"), JOBS)
def test_one_step_of_each_stage(name: str, kind: str, device: str, world: World, tmp_path: Path) -> None:
    """In the dtype that the device gets by itself."""
    stage, values = job(world, name, kind)
    done = play(stage, tmp_path / "run", steps=1, device=device, **values)
    assert math.isfinite(done.rows[0]["grad_norm"])
    assert done.rows[0]["grad_norm"] > 0
    assert decisions(done)["dtype"] == str(resolve_dtype("auto", torch.device(device))).removeprefix("torch.")
    merged = kind == "full" or name == "reward"
    weights = "model.safetensors" if merged else "adapter_model.safetensors"
    assert (Path(done.model) / weights).is_file()


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in STAGES for dtype in PARITY if dtype == "float32" or name not in RL]
)
def test_loss_and_gradient_are_those_of_the_cpu(
    name: str, dtype: str, device: str, world: World, tmp_path: Path
) -> None:
    stage, values = job(world, name, "full")
    here = play(stage, tmp_path / "here", steps=1, device=device, dtype=dtype, **values)
    cpu = play(stage, tmp_path / "cpu", steps=1, device="cpu", dtype="float32", kernels="torch", **values)
    found, expected = here.rows[0], cpu.rows[0]
    if name in RL:  # the same random numbers draw the same tokens
        assert found["reward/mean"] == expected["reward/mean"]
        assert found["length/mean"] == expected["length/mean"]
    keys = [key for key in ("loss", "grad_norm", "critic/grad_norm") if key in expected]
    assert "grad_norm" in keys
    for key in keys:
        assert found[key] == pytest.approx(expected[key], rel=PARITY[dtype], abs=1e-6), key  # RL starts at 0


@pytest.mark.parametrize(("name", "dtype"), zip(STAGES, ["float16", "float32", "float32", "float16", "float16"]))
@pytest.mark.usefixtures("same_order")
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    name: str, dtype: str, device: str, world: World, tmp_path: Path
) -> None:
    stage, values = job(world, name, "full")
    values |= {"steps": 4, "checkpoint_every": 2, "device": device, "dtype": dtype}
    whole = play(stage, tmp_path / "whole", **values)
    shutil.copytree(whole.path, tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()  # as a kill in step 3 leaves it
    for folder in ("model", "checkpoints/step-000004"):
        shutil.rmtree(tmp_path / "cut" / folder)
    resumed = play(stage, tmp_path / "cut", **values)
    assert any("continuing after step 2" in line for line in resumed.said)
    assert differences(resumed.path, whole.path) == []
