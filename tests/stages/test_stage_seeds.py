"""One stage for several seeds: each in its folder, and above them what they found on average."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from test_stage_runs import grpo, sft
from world import World, klimb, lines

from klimb.config import load_yaml


def test_a_command_runs_its_seeds_and_says_the_final_metrics(world: World, here: Path) -> None:
    said = klimb(*sft(world, "out=all", "seed=0..2"))
    assert said.code == 0, said.err
    losses = []
    for seed in range(3):
        folder = here / "all" / f"seed-{seed}"
        assert f"── sft, seed {seed} → all/seed-{seed}" in said.err
        assert load_yaml(folder / "config.yaml")["seed"] == seed
        losses.append(lines(folder / "metrics.jsonl")[-1]["loss"])
    assert len(set(losses)) == 3
    assert klimb(*sft(world, "out=alone", "seed=1")).code == 0
    alone = lines(here / "alone" / "metrics.jsonl")
    assert [row["loss"] for row in alone] == [row["loss"] for row in lines(here / "all/seed-1/metrics.jsonl")]
    heading, names, *table = said.out.splitlines()
    assert heading == "sft, seeds 0, 1, 2"
    assert names.split() == ["figure", "mean", "low", "high"]
    mean = statistics.fmean(losses)
    half = 4.303 * statistics.stdev(losses) / 3**0.5  # Student's t for 2 degrees of freedom
    [loss] = [line.split() for line in table if line.startswith("loss ")]
    assert loss == ["loss", *(f"{value:.4g}" for value in (mean, mean - half, mean + half))]
    assert said.out.endswith("summary: all/summary.json\nreport:  all/report.html\n")
    assert "seeds 0, 1, 2" in (here / "all" / "report.html").read_text()


def test_seeds_are_measured_where_one_is(world: World, here: Path) -> None:
    measure = (f"measure.data={world.prompts}", f"measure.gold={world.reward('count')}", "measure.max_tokens=4")
    said = klimb(*grpo(world, *measure, "seed=0,3", "--json"))
    assert said.code == 0
    assert said.err == ""
    summary = json.loads(said.out)
    root = Path(summary["out"])
    assert root.parent == Path("runs")
    assert {**json.loads((root / "summary.json").read_text()), "out": str(root)} == summary
    golds = [json.loads((root / f"seed-{s}/result.json").read_text())["evaluation"]["gold"] for s in (0, 3)]
    assert summary["seeds"] == [0, 3]
    gold = summary["figures"]["gold"]
    assert gold["values"] == {"0": golds[0], "3": golds[1]}
    assert gold["mean"] == pytest.approx(sum(golds) / 2)
    assert gold["high"] - gold["mean"] == pytest.approx(12.706 * abs(golds[0] - golds[1]) / 2)
    assert {"kl", "length", "seconds"} <= summary["figures"].keys()
    assert not {"loss", "gold_low", "n", "seed"} & summary["figures"].keys()
    [row] = summary["rows"]  # the table of a recipe
    assert (row["method"], row["gold"]) == ("grpo", pytest.approx(gold["mean"]))


def test_the_same_seeds_are_not_run_again_and_more_join_them(world: World, here: Path) -> None:
    first = klimb(*sft(world, "seed=0..1"))
    again = klimb(*sft(world, "seed=0..1"))
    assert again.out == first.out
    assert again.err.count("finished before, nothing has changed") == 2
    more = klimb(*sft(world, "seed=0..2"))
    assert more.err.count("finished before, nothing has changed") == 2
    [root] = (here / "runs").iterdir()
    assert {path.name for path in root.glob("seed-*")} == {"seed-0", "seed-1", "seed-2"}
    written = klimb("sft", str(root / "config.yaml"))  # as a recipe it is the same seeds
    assert written.out == more.out
    changed = klimb(*sft(world, "seed=0..1", "steps=3"))
    assert "it differs from" in changed.err
    assert "steps: 4 → 3" in changed.err
    assert len(list((here / "runs").iterdir())) == 2


def test_one_seed_and_several_do_not_share_a_directory(world: World, here: Path) -> None:
    assert klimb(*sft(world, "out=one")).code == 0
    refused = klimb(*sft(world, "out=one", "seed=0..1"))
    assert refused.code == 1
    assert refused.err.splitlines()[-1] == "klimb: one: holds a run of one seed; choose another out for several"
    assert klimb(*sft(world, "out=two", "seed=0..1")).code == 0
    refused = klimb(*sft(world, "out=two"))
    assert refused.code == 1
    assert "two: is not a run directory" in refused.err
    refused = klimb(*sft(world, "out=two", "seed=0..1", "steps=5"))
    assert "two/seed-0: holds a run of another config or input: steps: 4 → 5" in refused.err
    anew = klimb(*sft(world, "out=two", "seed=0..1", "steps=5", "--fresh"))
    assert anew.code == 0
    assert len(lines(here / "two" / "seed-1" / "metrics.jsonl")) == 5


def test_a_dry_run_names_the_seeds(world: World, here: Path) -> None:
    assert klimb(*sft(world, "seed=0..2", "--dry-run")).out.endswith("# seeds 0, 1, 2\n")
    assert json.loads(klimb(*sft(world, "seed=0..2", "--dry-run", "--json")).out)["seeds"] == [0, 1, 2]
    wrong = klimb(*sft(world, "seed=2..0"))
    assert wrong.err == "klimb: seed: expected 0, 0..4 or 0,2,5, got '2..0'\n"
    assert not (here / "runs").exists()
