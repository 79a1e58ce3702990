"""`--dry-run`: two real steps, what the whole would take, and nothing left."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from world import World, klimb, lines

from klimb.runtime.durable import content_hash
from klimb.runtime.rehearsal import ROWS, Rehearsal


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


COMMON = ("threads=1", "device=cpu")


def sft(world: World, *more: str) -> tuple[str, ...]:
    return ("sft", f"model={world.model}", f"data={world.demonstrations}", "batch_size=2", *COMMON, *more)


def tried(*words: str) -> dict[str, Any]:
    said = klimb(*words, "--dry-run", "--json")
    assert said.code == 0, said.err
    return dict(json.loads(said.out))


def test_it_knows_the_steps_that_a_run_takes(world: World, here: Path, temporary: Path) -> None:
    found = tried(*sft(world, "epochs=3", "checkpoint_every=5"))
    assert list(here.iterdir()) == []
    assert list(temporary.iterdir()) == []
    done = klimb(*sft(world, "epochs=3", "checkpoint_every=5"), "--json")
    result = json.loads(done.out)
    assert result["steps"] == found["steps"] == 12
    assert found["out"].startswith(f"{result['run']} (new; ")
    run = Path(result["run"])
    model = sum(file.stat().st_size for file in (run / "model").iterdir())
    assert found["files"]["model/"] == pytest.approx(model, rel=0.01)
    saved = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.suffix == ".safetensors")
    assert found["files"]["2 checkpoints"] == pytest.approx(saved, rel=0.2)  # names and shapes stand in the files, too
    assert tried(*sft(world, "epochs=3", "checkpoint_every=5"))["out"].startswith(f"{result['run']} (finished before; ")


def test_a_run_is_the_same_after_it(world: World, here: Path) -> None:
    klimb(*sft(world, "steps=4"), "out=plain")
    tried(*sft(world, "steps=4"), "out=tried")
    klimb(*sft(world, "steps=4"), "out=tried")
    assert content_hash(Path("plain/model")) == content_hash(Path("tried/model"))


def test_it_trains_two_steps_and_asks_a_part(world: World, here: Path) -> None:
    """Of 6 × 64 samples 6 × 21: what fills an engine."""
    words = ("grpo", f"model={world.model}", f"data={world.prompts}", f"reward={world.reward('count')}", "steps=9",
             "prompts_per_step=2", "samples_per_prompt=4", "max_tokens=3", *COMMON, f"measure.data={world.prompts}",
             "measure.samples_per_prompt=64", "measure.max_tokens=3", "measure.gold=calls.py:score")  # fmt: skip
    (here / "calls.py").write_text(
        "def score(completions):\n    with open('calls.txt', 'a') as f:\n        print(len(completions), file=f)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    found = tried(*words)
    assert (here / "calls.txt").read_text().split() == [str(6 * (ROWS // 6))]
    assert (found["steps"], found["sampling"] > 0, found["parts"].keys() >= {"rollout", "train"}) == (9, True, True)
    assert found["seconds"] == pytest.approx(9 * found["step"] + found["preparing"] + found["sampling"])


def test_what_fails_at_the_end_fails_now(world: World, here: Path) -> None:
    (here / "bad.py").write_text("def score(completions):\n    return [1 / 0 for c in completions]\n")
    measured = (f"measure.data={world.prompts}", "measure.gold=bad.py:score", "measure.max_tokens=3")
    said = klimb(*sft(world, "steps=500", *measured), "--dry-run")
    assert (said.code, said.out) == (1, "")
    assert "ZeroDivisionError" in said.err.splitlines()[-1]


def test_what_a_run_would_refuse_it_refuses(world: World, here: Path) -> None:
    klimb(*sft(world, "steps=1"), "out=run")
    said = klimb(*sft(world, "steps=2"), "out=run", "--dry-run")
    assert said.code == 1
    assert "run: holds a run of another config or input: steps: 1 → 2" in said.err
    anew = tried(*sft(world, "steps=2"), "out=run", "--fresh")
    assert anew["out"].startswith("run (anew, what it holds is deleted; ")
    assert len(lines(here / "run" / "metrics.jsonl")) == 1  # still there
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").touch()
    assert "thesis: is not a run directory" in klimb(*sft(world, "out=thesis"), "--dry-run").err
    refused = klimb(*sft(world, "out=run", "seed=0..1"), "--dry-run")
    assert "run: holds a run of one seed" in refused.err


def test_warm_up_of_a_critic_is_not_measured(world: World, here: Path) -> None:
    """Steps in which only the critic learns say nothing of those that follow."""
    found = tried("ppo", f"model={world.model}", f"data={world.prompts}", f"reward={world.reward('count')}", "steps=9",
                  "prompts_per_step=2", "samples_per_prompt=2", "max_tokens=3", "critic.warmup_steps=5",
                  *COMMON)  # fmt: skip
    assert {"train", "critic"} <= found["parts"].keys()


def test_evaluation_is_counted_in(world: World, here: Path) -> None:
    words = ("reward", f"model={world.model}", f"data={world.preferences}", "batch_size=2", "steps=40", *COMMON)
    short = tried(*words, f"eval_data={world.preferences}", "eval_every=40")
    long = tried(*words, f"eval_data={world.preferences}", "eval_every=1")
    each = long["parts"]["train"] / 2 / 3 * 18  # a third of what a row takes in training
    assert long["evaluating"] == pytest.approx(42 * each)
    assert short["evaluating"] == pytest.approx(3 * short["parts"]["train"] / 2 / 3 * 18)


def test_enough() -> None:
    rehearsal = Rehearsal()
    assert [rehearsal.enough(9) for _ in range(3)] == [False, False, True]
    assert rehearsal.total == 9
