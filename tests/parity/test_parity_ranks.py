"""Whole stages on two ranks: the samples, metrics, weights and files of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from processes import run_ranks
from safetensors.torch import load_file
from world import FAST, SMALL_RL, World, make_world

from klimb.runtime import checkpoint
from klimb.runtime.run import Run
from klimb.stages import models
from klimb.stages.pipeline import run_pipeline

pytestmark = pytest.mark.slow

# Log-probs are stored at sampling in fp32 and compared with in the ratio: their last bit is what may differ.
TOLERANCE = 1e-5
CLI = ["-c", "from klimb.cli import main; main()"]
COUNTED = """
from pathlib import Path

def counted(completions, **_):
    with Path(__file__).with_suffix(".calls").open("a") as file:
        print(len(completions), file=file)
    return [float(len(c)) for c in completions]
"""


def recipe(world: World, out: Path) -> dict[str, Any]:
    """Every kind of stage, in float64, so that a difference is a mistake and not the growth of rounding."""
    trained = {"optimizer": FAST, "dtype": "float64", "checkpoint_every": 2}
    measured = {"data": world.prompts, "reward": world.reward("count"), "gold": world.reward("some"),
                "samples_per_prompt": 2, "max_tokens": 4}  # fmt: skip
    out.with_suffix(".py").write_text(COUNTED)
    return {
        "out": str(out), "device": "cpu", "threads": 1,
        "stages": {
            "sft": {"stage": "sft", "model": world.model, "data": world.demonstrations, "steps": 4, "batch_size": 8,
                    "eval_fraction": 0.2, **trained},
            "pool": {"stage": "sample", "model": "${sft.model}", "data": world.prompts, "samples_per_prompt": 4,
                     "max_tokens": 4, "reward": world.reward("count"), "pairs": True, "dtype": "float64"},
            "judge": {"stage": "reward", "model": "${sft.model}", "data": "${pool.preferences}", "steps": 4,
                      "batch_size": 6, **trained},
            "dpo": {"stage": "preference", "model": "${sft.model}", "data": world.preferences, "steps": 3,
                    "batch_size": 8, **trained},
            "ppo": {"stage": "rl", "model": "${sft.model}", "data": world.prompts,
                    "reward": {"reward": "${judge.model}", "normalise": "running", "clip": 2.0},
                    "gold": world.reward("shuffled"), "algorithm": "ppo", "steps": 3, "updates_per_step": 2,
                    "critic": {"warmup_steps": 1, "optimizer": FAST}, "measure": measured, **SMALL_RL, **trained},
            "dapo": {"stage": "rl", "model": "${sft.model}", "data": world.prompts, "reward": world.reward("rare"),
                     "gold": f"{out}.py:counted", "algorithm": "dapo", "steps": 3, **SMALL_RL, **trained},
            "look": {"stage": "evaluate", "model": "${ppo.model}", "reference": "${sft.model}", "measure": measured,
                     "dtype": "float64"},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """The folder of one rank, that of two, and what the two wrote to their terminals."""
    folder = tmp_path_factory.mktemp("ranks")
    world = make_world(folder)
    run_pipeline("one", recipe(world, folder / "one"), say=lambda line: None)
    (folder / "two.yaml").write_text(yaml.safe_dump(recipe(world, folder / "two"), sort_keys=False))
    said = run_ranks([*CLI, "run", folder / "two.yaml"], ranks=2)
    return folder / "one", folder / "two", said


STAGES = ("sft", "judge", "dpo", "ppo", "dapo")


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_are_those_of_one_rank(stage: str, runs: tuple[Path, Path, list[str]]) -> None:
    one, two = (
        [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()] for run in runs[:2]
    )
    assert len(one) == len(two) > 2
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        if stage == "dpo" and a["step"] == 1:  # the policy is its reference: the sign of each margin is rounding's
            assert abs(a["margin"]) < 1e-6
            del a["accuracy"], a["displaced"]
        for name in a:
            if not name.startswith(("time/", "tokens_per_second", "mismatch/")):  # mismatch is nothing but rounding
                assert b[name] == pytest.approx(a[name], rel=TOLERANCE, abs=TOLERANCE), name
            assert not name.startswith("mismatch/") or b[name] < 1e-6


@pytest.mark.parametrize("stage", ["ppo", "dapo"])
def test_samples_are_those_of_one_rank(stage: str, runs: tuple[Path, Path, list[str]]) -> None:
    for step in (1, 2, 3):
        one, two = (
            pyarrow.parquet.read_table(run / stage / "samples" / f"step-{step:06d}.parquet").to_pylist()
            for run in runs[:2]
        )
        assert len(one) == len(two) >= 8
        for a, b in zip(one, two):
            assert b.pop("logps") == pytest.approx(a.pop("logps"), abs=1e-5)
            assert b.pop("score") == pytest.approx(a.pop("score"), abs=1e-5)
            for name in [name for name in a if name.startswith("reward.")]:
                assert b.pop(name) == pytest.approx(a.pop(name), abs=1e-5)
            assert a == b  # tokens, texts, prompts, finish, gold (drawn by lot, and by one rank only)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_those_of_one_rank(stage: str, runs: tuple[Path, Path, list[str]]) -> None:
    one, two = (load_file(run / stage / "model" / "model.safetensors") for run in runs[:2])
    assert one.keys() == two.keys()
    for name in one:
        # AdamW moves a weight without a gradient (a key's bias) by the sign of its rounding: nothing depends on it.
        if not name.endswith("attn.c_attn.bias"):
            assert torch.allclose(one[name], two[name], atol=TOLERANCE), name


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_are_those_of_one_rank(stage: str, runs: tuple[Path, Path, list[str]]) -> None:
    one, two = (checkpoint.load_latest(run / stage / "checkpoints", print) for run in runs[:2])
    assert one is not None
    assert two is not None
    assert one.step == two.step
    moments = [found.state["stage"].pop("reward_moments", []) for found in (one, two)]
    assert len(moments[0]) == len(moments[1]) == (stage == "ppo")
    for mine, theirs in zip(*moments):  # of scores that the one judge's and the other's rounding set apart
        assert theirs == pytest.approx(mine, rel=TOLERANCE)
    means = [found.state["stage"].get("displacement", {}).pop("mean", 0.0) for found in (one, two)]
    assert means[1] == pytest.approx(means[0], rel=TOLERANCE)  # of log-probs that were added up in another order
    assert one.state == two.state
    assert {part: set(named) for part, named in one.tensors.items()} == {p: set(n) for p, n in two.tensors.items()}


def test_files_are_written_once_by_rank_0(runs: tuple[Path, Path, list[str]]) -> None:
    one, two, said = runs
    names = [sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()) for run in (one, two)]
    assert names[0] == names[1]
    for stage in STAGES:
        events = (two / stage / "events.jsonl").read_text() if (two / stage / "events.jsonl").exists() else ""
        assert (two / stage / "manifest.json").is_file()
        assert "continued" not in events
    assert "summary:" in said[0]
    assert "klimb" not in said[1]
    rows = [json.loads((run / "summary.json").read_text())["rows"] for run in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert b["proxy"] == pytest.approx(a["proxy"], abs=TOLERANCE)
        assert b["kl"] == pytest.approx(a["kl"], abs=TOLERANCE)


def test_rewards_are_asked_once(runs: tuple[Path, Path, list[str]]) -> None:
    """A judge that costs, or one that draws lots, may not be asked by every rank."""
    one, two = (run.with_suffix(".calls").read_text() for run in runs[:2])
    assert one == two != ""


def test_a_run_that_is_followed_is_not_written(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {"steps": 2}, {}, name="sft") as held:
        held.log(1, {"loss": 1.0})
        before = {path: path.read_bytes() for path in held.path.rglob("*") if path.is_file()}
        followed = Run.follow(held.path, dict(held.manifest), say=lambda line: None)
        followed.log(1, {"loss": 2.0})
        followed.event("alarm", "too late")
        followed.report("continued")
        followed.write_samples(1, [{"prompt": "a"}])
        followed.write_result({"steps": 1})
        followed.sync()
        followed.truncate(-1)
        followed.close()
        assert {path: path.read_bytes() for path in held.path.rglob("*") if path.is_file()} == before


def test_a_further_rank_saves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "rank", lambda: 1)
    models.Loaded(None, None, "base").save(tmp_path / "model")  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


def test_the_same_command_on_one_rank_finds_everything_finished(runs: tuple[Path, Path, list[str]]) -> None:
    folder = runs[1]
    said: list[str] = []
    values = yaml.safe_load((folder.parent / "two.yaml").read_text())
    run_pipeline("two", values, say=said.append)
    assert sum("finished before" in line for line in said) == len(values["stages"])
