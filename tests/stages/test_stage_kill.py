"""A run that is killed, at whatever instant, ends with the bits of one that never was."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kills import (
    KILLED,
    at_call,
    at_moment,
    count_moments,
    differences,
    ended,
    fork,
    in_half_a_line,
    in_half_a_write,
    remains,
    start,
)
from tiny import chat_model
from world import FAST, LETTERS, World, klimb, lines, play, write

from klimb.errors import Interrupted

Trap = Callable[[], AbstractContextManager[None]]
MOMENTS = 10


class Job:
    """One stage with its settings, to be run into any directory."""

    def __init__(self, stage: str, **values: Any) -> None:
        self.stage = stage
        self.values = {"checkpoint_every": 3, **values}

    def __call__(self, out: Path, trap: Trap = contextlib.nullcontext) -> None:
        with trap():
            play(self.stage, out, **self.values)


@pytest.fixture(scope="module")
def jobs(world: World) -> dict[str, Job]:
    rl: dict[str, Any] = {
        "model": world.model,
        "data": world.prompts,
        "reward": world.reward("count"),
        "steps": 7,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_tokens": 4,
    }
    warm = {"optimizer": FAST, "warmup_steps": 2}
    return {
        "sft": Job(
            "sft", model=world.model, data=world.demonstrations, steps=10, batch_size=5, eval_fraction=0.3, eval_every=4
        ),
        "reward": Job("reward", model=world.model, data=world.preferences, steps=7, batch_size=5),
        "ordinal": Job(
            "reward",
            kind="ordinal",
            model=world.model,
            steps=7,
            batch_size=5,
            data=write(
                world.folder / "levels.jsonl",
                [
                    {"prompt": f"{letter} ?", "completion": word, "rating": rating}
                    for letter in LETTERS
                    for word, rating in (("no", 1), ("it", 2), ("yes", 4))
                ],
            ),
        ),
        "ratings": Job(
            "reward",
            kind="attributes_text",
            attributes={"first": 1.0, "second": 0.5},
            steps=7,
            batch_size=5,
            lora={"rank": 2},
            model=chat_model(world.folder / "chat", "llama", 128),
            data=write(
                world.folder / "ratings.jsonl",
                [
                    {"prompt": f"{letter}?", "completion": word, "first": rating, "second": -rating}
                    for letter in LETTERS
                    for word, rating in (("no", 1), ("it", 2), ("yes", 4))
                ],
            ),
        ),
        "dpo": Job("preference", model=world.model, data=world.preferences, steps=7, batch_size=5, lora={"rank": 2}),
        # Failures are events and count against a limit: the count has to survive, too.
        "ppo": Job(
            "rl",
            algorithm="ppo",
            critic=warm,
            updates_per_step=2,
            **{**rl, "reward": world.reward("shaky")},
            failure_limit=1.0,
        ),
        "dapo": Job("rl", algorithm="dapo", max_refills=30, **{**rl, "reward": world.reward("rare"), "steps": 4}),
        "running": Job(
            "rl",
            algorithm={"name": "grpo", "advantage": "group_mean"},
            **{**rl, "reward": {"reward": world.reward("count"), "normalise": "running", "clip": 1.0}},
        ),
        "reinforce": Job("rl", algorithm={"name": "reinforce", "kl": {"target": 1.0}}, **rl),
        "moving": Job(
            "rl",
            algorithm={
                "name": "grpo",
                "reference": {"moving": [2, 0.5]},
                "entropy_bonus": {"adaptive_entropy": {"target": 1.5}},
                "curriculum": {"skip_solved": [0.1, 2]},
            },
            updates_per_step=2,
            **rl,
        ),
        "a_star_po": Job("rl", algorithm="a_star_po", lora={"rank": 2}, **rl),
        "nash_md": Job("rl", algorithm="nash_md", lora={"rank": 2}, **rl),
    }


@pytest.fixture(scope="module")
def finished(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same job without interruption, run once."""
    folder = tmp_path_factory.mktemp("finished")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            jobs[name](folder / name)
        return folder / name

    return run


def killed_and_continued(job: Job, out: Path, trap: Trap) -> int:
    """How many steps were logged when it died."""
    assert fork(lambda: job(out, trap)) == KILLED
    logged = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
    assert not (out / "result.json").exists()
    assert fork(lambda: job(out)) == 0
    return logged


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_ten_random_moments(jobs: dict[str, Job], finished: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    job, reference = jobs[name], finished(name)  # the reference first: it fills caches that the others inherit
    moments = count_moments(lambda: job(tmp_path / "counted"), tmp_path / "moments")
    assert differences(tmp_path / "counted", reference) == []
    stream = random.Random(f"moments of {name}")
    progress = []
    for number in range(MOMENTS):
        out = tmp_path / f"run-{number}"
        moment = stream.randrange(1, moments * 99 // 100)  # how long a reward takes is not counted twice alike
        progress.append(killed_and_continued(job, out, partial(at_moment, moment)))
        assert differences(out, reference) == [], f"killed at moment {moment} of {moments}"
    assert len(set(progress)) > 3  # they were spread over the run


CHECKPOINT, RENAME = "klimb.runtime.checkpoint.save", "klimb.runtime.durable.os.rename"
STEP, GENERATE = "klimb.runtime.learner.Learner.step", "klimb.stages.experience.generate"
INSTANTS: list[tuple[str, str, Trap]] = [
    ("sft", "before the first step", partial(at_call, STEP, 1)),
    ("sft", "between a step and its line", partial(at_call, "klimb.runtime.run.Run.log", 5)),
    ("sft", "in the middle of a line", partial(in_half_a_line, 5)),
    ("sft", "between a step and its first checkpoint", partial(at_call, CHECKPOINT, 1)),
    ("sft", "between a step and its second checkpoint", partial(at_call, CHECKPOINT, 2)),
    # Six writes make the directory and its manifest; then each checkpoint has four: tensors, index, state, manifest.
    ("sft", "in the tensors of the first checkpoint", partial(in_half_a_write, 7)),
    ("sft", "in the manifest of the first checkpoint", partial(in_half_a_write, 10)),
    ("sft", "in the tensors of the second checkpoint", partial(in_half_a_write, 11)),
    ("sft", "in the state of the second checkpoint", partial(in_half_a_write, 13)),
    ("sft", "before the second checkpoint has its name", partial(at_call, RENAME, 2)),
    ("sft", "when the second checkpoint has its name", partial(at_call, RENAME, 2, after=True)),
    ("sft", "when an old checkpoint goes", partial(at_call, "klimb.runtime.durable.shutil.rmtree", 1)),
    ("sft", "before the model is saved", partial(at_call, "klimb.stages.models.Loaded.save", 1)),
    (
        "sft",
        "when half of the model is saved",
        partial(at_call, "klimb.models.load.PreTrainedModel.save_pretrained", 1, after=True),
    ),
    ("sft", "before the result", partial(at_call, "klimb.runtime.run.Run.write_result", 1)),
    ("reward", "between a step and its checkpoint", partial(at_call, CHECKPOINT, 2)),
    ("reward", "while scores are normalised", partial(at_call, "klimb.stages.reward.save_classifier", 1)),
    ("ordinal", "between a step and its checkpoint", partial(at_call, CHECKPOINT, 2)),
    ("ratings", "between a step and its checkpoint", partial(at_call, CHECKPOINT, 2)),
    ("ratings", "while ratings in words are saved", partial(at_call, "klimb.stages.reward.save_causal", 1)),
    ("dpo", "between a step and its checkpoint", partial(at_call, CHECKPOINT, 2)),
    ("dpo", "while the adapter is saved", partial(at_call, "klimb.models.load._end_generation", 1)),
    ("ppo", "while the critic warms up", partial(at_call, STEP, 3)),  # two updates a step, of the critic alone
    ("ppo", "between the policy's update and the critic's", partial(at_call, STEP, 5, after=True)),
    ("ppo", "while completions are generated", partial(at_call, "klimb.rollout.local.draw", 18)),
    ("ppo", "between the samples and the line of a step", partial(at_call, "klimb.runtime.run.Run.log", 5)),
    ("dapo", "in the middle of a refill", partial(at_call, GENERATE, 2)),
    ("dapo", "in the middle of a later refill", partial(at_call, GENERATE, 9)),
    ("running", "with a reward whose scale follows the training", partial(at_call, GENERATE, 6)),
    ("moving", "with a reference that moves, a steered entropy and prompts that rest", partial(at_call, GENERATE, 6)),
    ("a_star_po", "with values of the reference's samples", partial(at_call, GENERATE, 9)),
    ("nash_md", "while opponents are drawn", partial(at_call, GENERATE, 10)),
    ("reinforce", "with a running mean and an adaptive β", partial(at_call, GENERATE, 6)),
]


@pytest.mark.parametrize(("name", "instant", "trap"), INSTANTS, ids=[f"{name}: {when}" for name, when, _ in INSTANTS])
def test_chosen_instants(
    jobs: dict[str, Job], finished: Callable[[str], Path], tmp_path: Path, name: str, instant: str, trap: Trap
) -> None:
    killed_and_continued(jobs[name], tmp_path / "run", trap)
    assert differences(tmp_path / "run", finished(name)) == []


def test_the_comparison_can_fail(jobs: dict[str, Job], finished: Callable[[str], Path], tmp_path: Path) -> None:
    """Another seed is another run, in weights, optimiser, samples and metrics alike."""
    job = jobs["ppo"]
    Job(job.stage, **{**job.values, "seed": 1})(tmp_path / "run")
    different = differences(tmp_path / "run", finished("ppo"))
    assert {"model/model.safetensors", "samples/step-000007.parquet", "metrics.jsonl"} <= set(different)
    assert any(name.startswith("checkpoints/step-000007/tensors") for name in different)
    assert remains(finished("dapo"))["metrics.jsonl"][0]["groups/drawn"] > 4  # a refill was needed, so it can be cut


def test_killed_again_and_again(jobs: dict[str, Job], finished: Callable[[str], Path], tmp_path: Path) -> None:
    """Every try dies three steps further on; the last one gets through."""
    out, tries = tmp_path / "run", 0
    while fork(lambda: jobs["ppo"](out, partial(at_call, "klimb.runtime.run.Run.log", 4))) == KILLED:
        tries += 1
        assert tries < 8
    assert tries == 2
    assert differences(out, finished("ppo")) == []


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_byte_costs_one_checkpoint(
    jobs: dict[str, Job], finished: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert fork(lambda: jobs["ppo"](out, partial(at_call, "klimb.stages.models.Loaded.save", 1))) == KILLED
    flip(out / "checkpoints" / "step-000007" / "tensors-00001.safetensors")
    jobs["ppo"](out)
    [told] = [e["message"] for e in lines(out / "events.jsonl") if "skipped" in e["message"]]
    assert told == (
        f"skipped a checkpoint: {out}/checkpoints/step-000007: the checkpoint is damaged: "
        "tensors-00001.safetensors: not the bytes that were written"
    )
    assert differences(out, finished("ppo")) == []


# Ctrl-C --------------------------------------------------------------------------------------------------------------


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", ["sft", "ppo", "dpo"])
def test_ctrl_c_saves_and_leaves(
    jobs: dict[str, Job], finished: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=rf"saved after step 4 of \d+ in {out}; the same command continues"):
        jobs[name](out, partial(at_call, "klimb.runtime.run.Run.log", 4, interrupt))
    assert (out / "checkpoints" / "step-000004").is_dir()  # although it was not due
    jobs[name](out)
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == list(
        range(1, len(lines(out / "metrics.jsonl")) + 1)
    )
    same = [file for file in differences(out, finished(name)) if not file.startswith("checkpoints/step-000004")]
    assert same == []


def test_ctrl_c_between_training_and_the_next_stage(world: World, here: Path) -> None:
    """After the last step nothing is left to save, but the command ends all the same."""
    recipe = here / "two.yaml"
    one = f"{{stage: sft, model: '{world.model}', data: '{world.demonstrations}', steps: 2, batch_size: 4}}"
    recipe.write_text(f"name: two\nthreads: 1\ndevice: cpu\nstages:\n  first: {one}\n  second: {one}\n")
    with at_call("klimb.stages.models.Loaded.save", 1, interrupt):
        said = klimb("run", str(recipe), "out=run")
    assert said.code == 130
    assert said.err.splitlines()[-1] == "klimb: run/first is finished; the same command continues after it"
    assert not (here / "run" / "second").exists()
    said = klimb("run", str(recipe), "out=run")
    assert said.code == 0
    assert "run/first: finished before, nothing has changed" in said.err


def test_ctrl_c_twice_leaves_at_once(world: World, here: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    with at_call("klimb.runtime.learner.Learner.step", 4, twice):
        said = klimb(
            "sft", f"model={world.model}", f"data={world.demonstrations}", "steps=9", "checkpoint_every=2", "out=run"
        )
    assert said.code == 130
    assert said.err.splitlines()[-1] == "klimb: interrupted; what was saved at the last checkpoint is kept"
    assert [path.name for path in (here / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_terminals_ctrl_c_reaches_no_reward_process(world: World, tmp_path: Path) -> None:
    """A terminal signals the whole group. The worker goes on answering until the step is saved."""
    run = {
        "model": world.model,
        "data": world.prompts,
        "reward": world.reward("slow"),
        "steps": 40,
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "max_tokens": 2,
    }
    out = tmp_path / "run"

    def job() -> None:
        try:
            play("rl", out, **run)
        except Interrupted:
            sys.exit(130)

    child = start(job, own_session=True)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child, signal.SIGINT)
    assert ended(child) == 130
    done = lines(out / "metrics.jsonl")
    assert 1 <= len(done) < 40
    assert [event for event in lines(out / "events.jsonl") if not event["kind"].startswith("run/")] == []
    assert (out / "checkpoints" / f"step-{len(done):06d}").is_dir()


@pytest.mark.slow
def test_a_process_killed_from_outside(world: World, tmp_path: Path) -> None:
    """The whole command in a process of its own, killed twice at random times; its reward process goes with it."""
    command = [
        sys.executable,
        "-c",
        "from klimb.cli import main; main()",
        "ppo",
        f"model={world.model}",
        f"data={world.prompts}",
        f"reward={world.reward('slow')}",
        "steps=60",
        "checkpoint_every=5",
        "prompts_per_step=2",
        "samples_per_prompt=4",
        "max_tokens=4",
        "threads=1",
        "device=cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stream = random.Random(3)
    out = tmp_path / "killed"
    for _ in range(2):
        before = len(lines(out / "metrics.jsonl"))
        process = subprocess.Popen([*command, f"out={out}"], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(whole_lines(out / "metrics.jsonl")) <= before:
            time.sleep(0.01)
        time.sleep(stream.uniform(0.0, 1.0))
        process.kill()
        assert process.wait() == KILLED
    assert not (out / "result.json").exists()
    assert klimb(*command[3:], f"out={out}").code == 0
    assert klimb(*command[3:], f"out={tmp_path / 'whole'}").code == 0
    assert differences(out, tmp_path / "whole") == []


def whole_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()[:-1] if path.exists() else []
