"""What a command leaves behind, and what it does when it is given again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from world import FAST, SMALL_RL, World, klimb, lines, play

import klimb as library
from klimb.config import load_config, load_yaml, parse_yaml
from klimb.errors import KlimbError, RunError
from klimb.objective.advantage import group_mean
from klimb.objective.algorithms import GRPO
from klimb.objective.kl import NO_KL
from klimb.stages.given import described
from klimb.stages.registry import run_stage, stage_config
from klimb.stages.sft import SftConfig


def sft(world: World, *more: str) -> tuple[str, ...]:
    return (
        "sft",
        f"model={world.model}",
        f"data={world.demonstrations}",
        "steps=4",
        "batch_size=4",
        "threads=1",
        "device=cpu",
        *more,
    )


def grpo(world: World, *more: str) -> tuple[str, ...]:
    return (
        "grpo",
        f"model={world.model}",
        f"data={world.prompts}",
        f"reward={world.reward('count')}",
        "steps=2",
        "prompts_per_step=3",
        "samples_per_prompt=4",
        "max_tokens=4",
        "threads=1",
        "device=cpu",
        *more,
    )


def test_a_run_leaves_what_its_directory_promises(world: World, here: Path) -> None:
    said = klimb(*grpo(world, f"gold={world.reward('count')}", "--json"))
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result["stage"] == "rl"
    assert result["name"] == "grpo"
    assert result["algorithm"] == "grpo"
    assert result["steps"] == 2
    assert result["seed"] == 0
    run = Path(result["run"])
    assert run.parent == Path("runs")
    assert run.name.startswith("grpo-")
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "lock",
        "manifest.json",
        "metrics.jsonl",
        "model",
        "report.html",
        "result.json",
        "samples",
    }
    assert {**json.loads((run / "result.json").read_text()), "run": str(run)} == result
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"model", "data", f"file:{world.rewards}"}
    assert manifest["decisions"]["threads"] == 1
    rows = lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert {
        "reward/mean",
        "reward/count",
        "gold/mean",
        "kl",
        "entropy",
        "length/mean",
        "tokens",
        "time/rollout",
    } <= rows[0].keys()
    table = pyarrow.parquet.read_table(run / "samples" / "step-000001.parquet")
    assert table.column_names == [
        "step",
        "prompt_id",
        "prompt",
        "sample",
        "completion",
        "tokens",
        "logps",
        "finish",
        "version",
        "trained",
        "score",
        "reward.count",
        "gold",
    ]


def test_the_written_config_is_the_config(world: World, here: Path) -> None:
    assert klimb(*sft(world, "out=run", "optimizer.lr=1e-3", "lora.rank=4")).code == 0
    written = load_yaml(here / "run" / "config.yaml")
    config = load_config(SftConfig, written)
    assert config.optimizer.lr == 1e-3
    assert config.model_dump(mode="json") == written
    again = klimb("sft", "run/config.yaml")  # as a recipe it is the same run
    assert again.code == 0
    assert "finished before, nothing has changed" in again.err


def test_the_same_command_is_not_run_again(world: World, here: Path) -> None:
    first = klimb(*sft(world))
    weights = next(here.glob("runs/*/model/model.safetensors"))
    before = weights.stat()
    second = klimb(*sft(world))
    assert first.code == second.code == 0
    assert "finished before, nothing has changed" in second.err
    assert second.out == first.out
    assert weights.stat() == before


def test_a_changed_command_starts_anew_and_says_what_differs(world: World, here: Path) -> None:
    klimb(*sft(world))
    changed = klimb(*sft(world, "optimizer.lr=1e-3", "seed=5"))
    assert changed.code == 0
    [line] = [line for line in changed.err.splitlines() if "it differs from" in line]
    assert "optimizer.lr: None → 0.001" in line
    assert "seed: 0 → 5" in line
    assert len(list((here / "runs").iterdir())) == 2


def test_changed_inputs_start_anew(world: World, here: Path) -> None:
    """Whatever a result depends on: data, evaluation data, the code of a reward."""
    reward = here / "mine.py"
    reward.write_text("def score(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    measured = here / "measured.jsonl"
    measured.write_text(Path(world.prompts).read_text())
    measure = (f"measure.data={measured}", "measure.max_tokens=4", "measure.samples_per_prompt=1")
    command = grpo(world, f"reward={reward}:score", *measure)
    assert klimb(*command).code == 0
    reward.write_text("def score(completions, **_):\n    return [-float(len(c)) for c in completions]\n")
    said = klimb(*command)
    assert f"file:{reward}: its content changed" in said.err
    measured.write_text('{"prompt": "a ?"}\n')
    said = klimb(*command)
    assert "measure.data: its content changed" in said.err
    assert len(list((here / "runs").iterdir())) == 3


def test_an_explicit_out_is_never_overwritten_unasked(world: World, here: Path) -> None:
    assert klimb(*sft(world, "out=run")).code == 0
    refused = klimb(*sft(world, "out=run", "steps=5"))
    assert refused.code == 1
    assert refused.err.splitlines()[-1] == (
        "klimb: run: holds a run of another config or input: steps: 4 → 5; start it again here with --fresh, or choose "
        "another out"
    )
    assert len(lines(here / "run" / "metrics.jsonl")) == 4
    assert klimb(*sft(world, "out=run", "steps=5", "--fresh")).code == 0
    assert len(lines(here / "run" / "metrics.jsonl")) == 5


def test_a_foreign_directory_is_left_alone(world: World, here: Path) -> None:
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").write_text("years of work")
    said = klimb(*sft(world, "out=thesis", "--fresh"))
    assert said.code == 1
    assert "thesis: is not a run directory: it holds chapter.txt; choose another out" in said.err
    assert [path.name for path in (here / "thesis").iterdir()] == ["chapter.txt"]


def test_a_dry_run_prints_and_trains_nothing(world: World, here: Path) -> None:
    said = klimb(*grpo(world, "--dry-run"))
    assert said.code == 0
    assert "# 3 prompts × 4 samples = 12 samples a step → 1 update(s) of about 12, 2 steps" in said.out
    config = stage_config("rl", parse_yaml(said.out))  # what it prints is a config
    assert (config.prompts_per_step, config.algorithm) == (3, "grpo")
    as_json = klimb(*grpo(world, "--dry-run", "--json"))
    assert json.loads(as_json.out)["config"] == config.model_dump(mode="json")
    assert not (here / "runs").exists()
    assert klimb(*grpo(world, "--dry-run", "samples_per_prompt=1")).code == 1


def test_commands_are_named_by_their_methods(world: World, here: Path) -> None:
    dry = klimb("ipo", f"model={world.model}", f"data={world.preferences}", "loss.beta=0.2", "--dry-run")
    assert "ipo(beta=0.2), 64 pairs in an update" in dry.out
    (here / "mine.yaml").write_text("algorithm: {kl: none}\n")
    dry = klimb("grpo", "mine.yaml", *grpo(world)[1:], "--dry-run")
    assert "# grpo(kl=none)" in dry.out


@pytest.mark.slow
def test_the_installed_command(world: World, here: Path) -> None:
    """In a process of its own: results on standard output alone, progress beside it, exit codes for programs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from klimb.cli import main; main()"]
    done = subprocess.run([*command, *sft(world)], capture_output=True, text=True, env=environment, check=True)
    assert "step 4/4" in done.stderr
    assert done.stdout.splitlines()[0].split() == ["method", "sft"]
    failed = subprocess.run([*command, "report"], capture_output=True, text=True, env=environment)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "klimb: Missing argument 'directory'.\n"


# From Python ---------------------------------------------------------------------------------------------------------


def letters(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_values_from_python_are_known_by_what_they_are() -> None:
    """The identity of a run may not hold an address: the next process would take it for another run."""
    for value in (
        letters,
        replace(GRPO, kl=NO_KL),
        {"name": "grpo", "advantage": group_mean},
        [{"reward": letters}],
        letters.__call__,
    ):
        text = json.dumps(described(value))
        assert " at 0x" not in text
        assert text == json.dumps(described(value))
    assert described(letters) != described(lambda completions, **_: [0.0])
    assert described(replace(GRPO, kl=NO_KL)) != described(GRPO)
    assert described({"kl": {"beta": 0.1}}) == {"kl": {"beta": 0.1}}
    rows = [{"prompt": "a ?"}, {"prompt": "b ?"}]
    assert described({"data": rows}) == described({"data": [*rows]}) != described({"data": rows[:1]})
    assert described({"data": rows})["data"].startswith("<2 rows, sha256 ")
    reward = [{"numeric": {"column": "x"}}, {"gate": {"when": "format", "then": [{"exact": None}], "else": 0}}]
    assert described({"reward": reward}) == {"reward": reward}  # a recipe, not rows: a config file can hold it


def pipeline(world: World, **stages: Any) -> dict[str, Any]:
    base = {
        "sft": {
            "stage": "sft",
            "method": "SFT",
            "model": world.model,
            "data": world.demonstrations,
            "steps": 3,
            "batch_size": 4,
        }
    }
    return {"name": "small", "threads": 1, "device": "cpu", "stages": {**base, **stages}}


def test_a_pipeline_of_python_values_runs_and_is_reused(world: World, here: Path) -> None:
    measure = {"data": [{"prompt": "a ?"}], "gold": letters, "max_tokens": 4, "samples_per_prompt": 4}
    rl = {
        "stage": "rl",
        "method": "GRPO",
        "model": "${sft.model}",
        "data": world.prompts,
        "reward": letters,
        "steps": 2,
        "algorithm": replace(GRPO, kl=NO_KL),
        "measure": measure,
        **SMALL_RL,
    }
    said: list[str] = []
    found = library.run(pipeline(world, rl=rl), say=said.append, **{"stages.sft.steps": 2})
    assert [row["method"] for row in found.table] == ["GRPO"]
    assert found["sft"].result["steps"] == 2
    assert json.loads((found.out / "summary.json").read_text()) == found.summary
    assert found.report.is_file()
    said.clear()
    again = library.run(pipeline(world, rl=rl), say=said.append, **{"stages.sft.steps": 2})
    assert again == found
    assert sum("finished before, nothing has changed" in line for line in said) == 2
    said.clear()
    library.run(pipeline(world, rl=rl), say=said.append, **{"stages.sft.steps": 1})
    assert any("it differs from" in line and "stages.sft.steps: 2 → 1" in line for line in said)


def test_seeds_give_one_table_with_paired_differences(world: World, here: Path) -> None:
    measure = {"data": world.prompts, "gold": world.reward("count"), "max_tokens": 4, "samples_per_prompt": 8}
    recipe = pipeline(world)
    recipe["stages"]["sft"]["measure"] = measure
    recipe["stages"]["dpo"] = {
        "stage": "preference",
        "method": "DPO",
        "model": "${sft.model}",
        "data": world.preferences,
        "steps": 10,
        "batch_size": 18,
        "optimizer": FAST,
        "measure": measure,
    }
    summary = library.run(recipe, say=lambda line: None, seed="0..2").summary
    assert summary["seeds"] == [0, 1, 2]
    sft_row, dpo_row = summary["rows"]
    assert dpo_row["gold"] > sft_row["gold"] + 0.2
    [pair] = summary["paired"]
    assert pair["low"] < pair["difference"] < pair["high"]
    assert pair["difference"] == pytest.approx(dpo_row["gold"] - sft_row["gold"])
    golds = [row["gold"] for rows in summary["by_seed"].values() for row in rows if row["method"] == "DPO"]
    assert len(set(golds)) > 1
    assert dpo_row["gold"] == pytest.approx(sum(golds) / 3)


def test_a_stage_ends_its_reward_processes(world: World, tmp_path: Path) -> None:
    def workers() -> list[str]:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        if not children.exists():
            pytest.skip("no /proc to count processes in")
        return children.read_text().split()

    before = workers()
    options = {"model": world.model, "data": world.prompts, "steps": 1, "gold": world.reward("count"), **SMALL_RL}
    play("rl", tmp_path / "run", reward=world.reward("count"), **options)
    assert workers() == before
    with pytest.raises(KlimbError):
        play("rl", tmp_path / "failed", reward="exact", columns={"prompt": "nothing"}, **options)
    assert workers() == before


def test_two_processes_cannot_write_one_run(world: World, tmp_path: Path) -> None:
    config = stage_config("sft", {"model": world.model, "data": world.demonstrations, "steps": 1})

    def nested(line: str) -> None:
        with pytest.raises(RunError, match="is being written"):
            run_stage("sft", config, name="sft", out=tmp_path / "run", say=lambda line: None)

    run_stage("sft", config, name="sft", out=tmp_path / "run", say=nested)
