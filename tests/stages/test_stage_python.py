"""`klimb.run` from Python: what is handed in, what comes back, and where progress goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from world import FAST, SMALL_RL, World, lines

import klimb
from klimb.errors import ConfigError
from klimb.stages.results import Result

QUIET: dict[str, Any] = {"say": lambda line: None, "threads": 1, "device": "cpu"}


def recipe(world: World) -> dict[str, Any]:
    measure = {"data": world.prompts, "gold": "length", "max_tokens": 4, "samples_per_prompt": 2}
    return {
        "name": "story",
        "stages": {
            "sft": {"stage": "sft", "model": world.model, "data": world.demonstrations, "steps": 3, "batch_size": 4,
                    "eval_data": world.demonstrations, "eval_every": 2, "measure": measure},
            "grpo": {"stage": "rl", "method": "GRPO <b>", "model": "${sft.model}", "data": world.prompts,
                     "reward": lambda completions, **_: [float(len(c)) for c in completions], "steps": 2,
                     "measure": measure, **SMALL_RL},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(world: World, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return klimb.run(recipe(world), out=str(tmp_path_factory.mktemp("python") / "out"), **QUIET)


def test_a_result_says_what_the_files_say(found: Result) -> None:
    assert [*found] == ["sft", "grpo"]
    stage = found["grpo"]
    assert stage.path == found.out / "grpo"
    assert stage.model == str(stage.path / "model")
    assert stage.result == {**json.loads((stage.path / "result.json").read_text()), "run": str(stage.path)}
    assert (stage.method, stage.seed, stage.events) == ("GRPO <b>", 0, lines(stage.path / "events.jsonl"))
    assert stage.evaluation["gold"] == stage.result["evaluation"]["gold"]
    rows = lines(stage.path / "metrics.jsonl")
    assert stage.last == rows[-1]
    assert stage.metrics["reward/mean"] == [row["reward/mean"] for row in rows]
    assert found.summary == json.loads((found.out / "summary.json").read_text())
    assert "<html" in found.report.read_text()


def test_columns_of_metrics_are_of_one_length(found: Result) -> None:
    metrics = found["sft"].metrics
    assert metrics["step"] == [1, 2, 3]
    assert {len(column) for column in metrics.values()} == {3}
    assert [value is None for value in metrics["eval/loss"]] == [True, False, False]


def test_samples_are_those_of_a_step(found: Result) -> None:
    last, first = found["grpo"].samples(), found["grpo"].samples(1)
    assert {row["step"] for row in last} == {2}
    assert {row["step"] for row in first} == {1}
    assert len(first) == 48
    assert all(row["score"] == len(row["completion"]) for row in first)
    assert isinstance(last[0]["prompt"], str)
    assert found["sft"].samples() == []
    with pytest.raises(FileNotFoundError):
        found["grpo"].samples(9)


def test_a_result_can_be_read(found: Result) -> None:
    table = repr(found).splitlines()
    assert table[0].split() == ["method", "proxy", "gold", "gold_low", "gold_high", "kl", "seconds"]
    assert [line.split()[0] for line in table[1:]] == ["sft", "GRPO", "report:"]
    assert found.table[0]["gold"] == found["sft"].evaluation["gold"]
    assert "GRPO &lt;b&gt;" in found._repr_html_()
    assert f"gold {found['sft'].evaluation['gold']:.4g}" in repr(found["sft"])


def test_one_stage_is_a_recipe_too_and_seeds_stay_apart(world: World, tmp_path: Path) -> None:
    stage = {"stage": "sft", "model": world.model, "data": world.demonstrations, "steps": 2, "batch_size": 4,
             "optimizer": FAST}  # fmt: skip
    found = klimb.run(stage, seed="0,3", out=str(tmp_path / "out"), **{**QUIET, "sft.steps": 1})
    assert {seed: [*stages] for seed, stages in found.by_seed.items()} == {0: ["sft"], 3: ["sft"]}
    assert [found.by_seed[seed]["sft"].seed for seed in (0, 3)] == [0, 3]
    assert found["sft"].metrics["step"] == [1]
    assert found["sft"].last["loss"] != found.by_seed[3]["sft"].last["loss"]
    assert repr(found).startswith("<sft, seed 0: ")
    assert stage["steps"] == 2  # what was handed in is as it was


def test_a_mistake_is_one_line(world: World) -> None:
    with pytest.raises(ConfigError, match=r"^sft: stages\.sft: unknown key 'stepps'; did you mean 'steps'\?$"):
        klimb.run({"stage": "sft", "model": world.model, "data": world.demonstrations, "stepps": 2}, **QUIET)
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        klimb.run("quikstart", **QUIET)


def test_a_notebook_sees_one_line_that_changes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[list[str]] = []

    class Handle:
        def __init__(self, content: dict[str, str]) -> None:
            shown.append([content["text/plain"]])
            self._line = shown[-1]

        def update(self, content: dict[str, str], raw: bool) -> None:
            assert raw
            self._line.append(content["text/plain"])

    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: type("Shell", (), {"kernel": None})()  # type: ignore[attr-defined]
    display.display = lambda content, raw, display_id: Handle(content)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    klimb.run(recipe(world), out=str(tmp_path / "out"), threads=1, device="cpu")
    [line] = shown
    assert any(text.startswith("sft: step 3/3  loss ") for text in line)
    assert line[-1] == f"grpo: report: {tmp_path / 'out' / 'report.html'}"
    assert all("\n" not in text for text in line)
    said = capsys.readouterr()
    assert said.out + said.err == ""
