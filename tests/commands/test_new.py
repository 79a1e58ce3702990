"""The folder that `klimb new` makes runs as its README says, and the model in it learns what its reward pays for."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from world import klimb, lines

from klimb.config import load_yaml
from klimb.plugin import load_attribute


@pytest.mark.slow
def test_from_nothing_to_an_export(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert klimb("new", "demo").code == 0
    monkeypatch.chdir("demo")
    done = klimb("grpo", "recipe.yaml", "threads=1", "--json")
    assert done.code == 0, done.err
    run = json.loads(done.out)["run"]
    rewards = [row["reward/mean"] for row in lines(Path(run) / "metrics.jsonl")]
    assert rewards[0] < 0.2  # 10 digits among 98 tokens
    assert rewards[-1] > 0.8
    monkeypatch.setattr(sys, "stdin", io.StringIO("3 + 4\n"))
    said = klimb("chat", run, "threads=1", "max_tokens=4")
    assert said.code == 0
    assert sum(character.isdigit() for character in said.out.strip()) / len(said.out.strip()) > 0.5
    assert klimb("export", run, "out=mine").code == 0
    again = klimb("grpo", "recipe.yaml", "threads=1")  # finished: what it found is shown
    assert re.search(r"^proxy      \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]$", again.out, re.MULTILINE)
    assert again.out.endswith(f"run        {run}\nreport     {run}/report.html\n")
    assert AutoModelForCausalLM.from_pretrained("mine")


def test_what_the_readme_names_is_there(here: Path) -> None:
    said = klimb("new", "some where/demo")
    assert said.out.splitlines()[0] == "some where/demo: README.md, data.jsonl, model, recipe.yaml, reward.py"
    folder = here / "some where" / "demo"
    readme, recipe = (folder / "README.md").read_text(), load_yaml(folder / "recipe.yaml")
    assert readme.startswith("# demo\n")
    for name in re.findall(r"^\| `([^`]+)`", readme, re.MULTILINE):
        assert (folder / name).exists(), name
    for key in re.findall(r"`(\w+):", readme):
        assert key in recipe, key
    source = (folder / "reward.py").read_text()
    for name in re.findall(r"reward\.py:(\w+)", readme + (folder / "recipe.yaml").read_text()):
        assert f"def {name}(" in source
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["prompt"][0]["content"] for row in rows}) == 20


def test_the_reward_for_a_model_of_ones_own(here: Path) -> None:
    """`correct` is what the README says to change to; nothing else in the folder runs it."""
    klimb("new", "demo")
    correct = load_attribute("demo/reward.py:correct")
    said = [[{"role": "assistant", "content": text}] for text in ("3 + 4 = 7", "It is 8.", "", "77")]
    assert correct(completions=said, answer=["7"] * 4, prompts=[]) == [1.0, 0.0, 0.0, 0.0]
    assert correct(completions=["7."], answer=["7"], prompts=[]) == [1.0]


def test_nothing_is_written_over(here: Path) -> None:
    (here / "demo").mkdir()
    (here / "demo" / "mine.txt").write_text("mine")
    said = klimb("new", "demo")
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "demo: is there already" in said.err
    assert [path.name for path in (here / "demo").iterdir()] == ["mine.txt"]
