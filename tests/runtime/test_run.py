from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from klimb.config import StageConfig, load_config, load_yaml
from klimb.errors import KlimbError, RunError
from klimb.runtime.checkpoint import load_latest, save
from klimb.runtime.run import Run

RunAndKill = Callable[[Callable[[], object], int], bool]


class Config(StageConfig):
    lr: float = 1e-6
    seed: int = 0
    out: str | None = None


def silent(line: str) -> None:
    raise AssertionError(f"unexpected: {line}")


def ignore(line: str) -> None:
    pass


def start(out: str | Path | None, config: Config | None = None, **options: Any) -> Run:
    options = {"name": "grpo", "say": silent, "inputs": {}} | options
    return Run.open(out, config or Config(), **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- where a run lives


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    inputs = {"data": tmp_path / "data.jsonl", "model": tmp_path / "base", "gold": "hub/name@12ab"}
    with start(tmp_path / "run", Config(seed=3), inputs=inputs) as run:
        manifest = json.loads((run.path / "manifest.json").read_text())
    assert load_config(Config, load_yaml(tmp_path / "run" / "config.yaml")) == Config(seed=3)
    assert manifest["seed"] == 3
    assert {"klimb", "python", "torch", "transformers"} <= manifest["versions"].keys()
    # sha256 of "{}", by another program
    assert manifest["inputs"]["data"]["hash"].startswith(
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )
    assert manifest["inputs"]["gold"] == {"source": "hub/name@12ab", "hash": "hub/name@12ab"}


def test_the_same_command_continues_and_a_changed_one_starts_anew_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = Path("data.jsonl")
    data.write_text("1")
    told: list[str] = []
    paths = []
    for config, content in [(Config(), "1"), (Config(), "1"), (Config(lr=2e-6), "1"), (Config(lr=2e-6), "2")]:
        data.write_text(content)
        with start(None, config, inputs={"data": data}, say=told.append) as run:
            paths.append(str(run.path))
    assert paths[0] == paths[1]
    assert len(set(paths)) == 3
    assert all(path.startswith("runs/grpo-") for path in paths)
    assert told == [
        f"{paths[0]}: continued",
        f"{paths[2]}: a new run, it differs from {paths[0].removeprefix('runs/')}: lr: 1e-06 → 2e-06",
        f"{paths[3]}: a new run, it differs from {paths[2].removeprefix('runs/')}: data: its content changed",
    ]


def test_a_model_folder_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub" / "a").write_text("1")
    paths = []
    for change in (
        lambda: None,
        lambda: (model / ".cache").write_text("ignored"),
        lambda: (model / "sub" / "a").write_text("2"),
        lambda: (model / "sub" / "a").rename(model / "a"),
    ):
        change()
        with start(None, inputs={"model": model}, say=ignore) as run:
            paths.append(run.path)
    assert paths[0] == paths[1]
    assert len(set(paths)) == 3


def test_an_explicit_out_of_another_config_is_refused_with_what_differs(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        run.log(1, {"loss": 1.0})
    with pytest.raises(RunError) as error:
        start(tmp_path / "run", Config(lr=2e-6), inputs={"data": "x"})
    assert str(error.value) == (
        f"{tmp_path / 'run'}: holds a run of another config or input: "
        "lr: 1e-06 → 2e-06; data: its content changed; "
        "start it again here with --fresh, or choose another out"
    )
    start(tmp_path / "run", say=ignore).close()  # and the lock is free


def test_a_run_that_failed_before_its_first_step_makes_way(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        run.event("row_dropped", "data.jsonl:3: completion is empty")
    with start(tmp_path / "run", Config(lr=2e-6)) as run:
        assert not (run.path / "events.jsonl").exists()
        assert load_yaml(run.path / "config.yaml")["lr"] == 2e-6


def test_a_run_that_failed_after_it_sampled_is_not_overwritten_unasked(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        (run.path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="holds a run of another config"):
        start(tmp_path / "run", Config(lr=2e-6))


def test_fresh_deletes_what_the_run_left_and_nothing_else(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        run.log(1, {"loss": 1.0})
        run.write_samples(1, [])
        run.model.mkdir()
        save(run.checkpoints, 1, {}, {})
        run.write_result({"stage": "rl"})
        for name in ("samples", "steps", "preferences", "undecided", "demonstrations"):
            (run.path / f"{name}.jsonl").write_text("{}\n")
        (run.path / "my-notes.txt").write_text("keep")
    with start(tmp_path / "run", Config(lr=1.0), fresh=True) as run:
        assert run.result is None
        assert sorted(path.name for path in run.path.iterdir()) == [
            "config.yaml",
            "lock",
            "manifest.json",
            "my-notes.txt",
        ]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("file", ["model/config.json", "manifest.json", "thesis.tex"])
def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path, file: str, fresh: bool) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"name": "extension"}')
    (tmp_path / "model").mkdir(exist_ok=True)
    with pytest.raises(RunError, match=r"is not a run directory|is not the manifest of a run"):
        start(tmp_path, fresh=fresh)
    assert path.exists()
    assert (tmp_path / "model").exists()


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300])
def test_an_unwritable_place_is_one_line_before_anything_starts(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the run directory: .*; choose another out$") as error:
        start(tmp_path / out)
    assert "\n" not in str(error.value)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(KlimbError, match=r"none\.jsonl: data cannot be read: No such file or directory"):
        start(tmp_path / "run", inputs={"data": tmp_path / "none.jsonl"})


# ---------------------------------------------------------------- one process at a time


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    with start(tmp_path), pytest.raises(RunError, match=f"is being written: process {os.getpid()} holds it"):
        start(tmp_path)
    start(tmp_path, say=ignore).close()


def test_the_lock_of_a_dead_process_is_taken_over_and_told(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        start(tmp_path)
        os._exit(0)
    os.waitpid(child, 0)
    told: list[str] = []
    start(tmp_path, say=told.append).close()
    assert told == [f"{tmp_path}: continued; process {child} was cut off"]
    told.clear()
    start(tmp_path, say=told.append).close()
    assert told == [f"{tmp_path}: continued"]


# ---------------------------------------------------------------- what it writes


def test_decisions_are_taken_once(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        assert run.decide("threads", lambda: 4) == 4
        assert run.decide("threads", lambda: 8) == 4
        assert run.decide("budget", lambda: (1, 2)) == [1, 2]
    with start(tmp_path, say=ignore) as run:
        assert run.decide("threads", lambda: 8) == 4
        assert run.decide("budget", lambda: (3,)) == [1, 2]


def test_other_versions_are_told_on_resume(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.manifest["versions"]["torch"] = "0.0"
        run.decide("x", lambda: 1)
    told: list[str] = []
    start(tmp_path, say=told.append).close()
    assert f"torch 0.0 → {torch.__version__.split('+')[0]}" in told[1]


def test_metrics_are_one_object_a_line_and_nan_is_null_and_told(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log(1, {"tokens": 7, "loss": torch.tensor(0.5), "kl": float("nan"), "time/step": 0.1})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "tokens": 7, "loss": 0.5, "kl": null, "time/step": 0.1}\n'
    )
    assert lines(tmp_path / "events.jsonl") == [
        {"step": 1, "kind": "non_finite", "message": "step 1: kl is nan; written as null"}
    ]


def test_samples_have_the_stated_columns(tmp_path: Path) -> None:
    row = {
        "prompt_id": "a",
        "prompt": [{"role": "user", "content": "tea ✓"}],
        "sample": 0,
        "completion": "yes\ud800",
        "tokens": [1, 2],
        "logps": [-0.5, -1.25],
        "finish": "stop",
        "version": 3,
        "trained": True,
        "score": 0.1,
        "reward.length": 2.0,
    }
    with start(tmp_path) as run:
        run.write_samples(2, [row, row | {"score": None, "gold": 1.0}])
        with pytest.raises(ValueError, match="samples have no column colour; known: prompt_id"):
            run.write_samples(2, [row | {"colour": "red"}])
    table = pq.read_table(tmp_path / "samples" / "step-000002.parquet")
    assert table.column_names == ["step", *row, "gold"]
    first, second = table.to_pylist()
    assert first == row | {
        "step": 2,
        "gold": None,
        "completion": "yes?",
        "prompt": '[{"role": "user", "content": "tea ✓"}]',
    }
    assert (second["score"], second["gold"]) == (None, 1.0)


def test_a_finished_run_is_reused(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        assert run.result is None
        run.write_result({"stage": "rl", "gold": float("nan")})
    with start(tmp_path) as run:  # not a word about continuing
        assert run.result == {"stage": "rl", "gold": None}


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with start(tmp_path) as run:
        run.write_result({"stage": "old"})
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(RunError, match="cannot be written: No space left on device; make room"):
            run.write_result({"stage": "new"})
        monkeypatch.undo()
        assert run.result == {"stage": "old"}
        assert not list(tmp_path.glob(".tmp-*"))


# ---------------------------------------------------------------- resume


def train(out: Path, steps: int, name: str = "grpo") -> None:
    """A training run in small: every step depends on the one before, and writes all that a stage writes."""
    with Run.open(out, Config(), {}, name=name, say=ignore) as run:
        if run.result is not None:
            return
        run.event("data", "2 rows were left out")
        checkpoint = load_latest(run.checkpoints, run.report)
        weight = checkpoint.tensors["policy"]["w"] if checkpoint else torch.ones(3)
        done = checkpoint.step if checkpoint else -1
        run.truncate(done)
        if not checkpoint:
            run.log(0, {"eval/loss": 1.0})
        for step in range(max(done, 0) + 1, steps + 1):
            run.step = step
            if step % 2:
                run.event("alarm", "odd")
            weight = weight * 1.1 + step
            run.write_samples(step, [{"prompt_id": "a", "score": float(weight[0])}])
            run.log(step, {"loss": float(weight.sum())})
            run.event("after", "logged")
            if step % 2 == 0 or step == steps:
                run.sync()
                save(run.checkpoints, step, {"policy": {"w": weight}}, {"step": step}, keep=1)
        run.write_result({"loss": float(weight.sum())})


def contents(out: Path) -> dict[str, bytes]:
    """All but what may differ after a kill: the manifest (its date), the lock, the events of the process."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name in ("manifest.json", "lock"):
        del files[name]
    events = files["events.jsonl"].splitlines(keepends=True)
    files["events.jsonl"] = b"".join(line for line in events if b'"kind": "run/' not in line)
    return files


def test_killed_at_any_operation_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, run_and_kill: RunAndKill
) -> None:
    train(tmp_path / "whole", 5)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 13  # config, metrics, events, result, 5 samples, 4 of a checkpoint
    for at in itertools.count(1, step=9):
        out = tmp_path / str(at)
        finished = run_and_kill(lambda out=out: train(out, 5), at)
        run_and_kill(lambda out=out: train(out, 5), 23)  # and once more while it resumes
        train(out, 5)
        assert contents(out) == whole, f"after a death at operation {at}"
        if finished:
            break
    assert at > 100


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_that_was_cut_off_is_dropped_and_never_continued(tmp_path: Path, cut: int) -> None:
    with start(tmp_path) as run:
        run.log(1, {"loss": 1.0, "entropy": 2.0})
        run.log(2, {"loss": 3.0, "entropy": 4.0})
    metrics = tmp_path / "metrics.jsonl"
    first = metrics.read_bytes().splitlines(keepends=True)[0]
    metrics.write_bytes(metrics.read_bytes()[:-cut])
    with start(tmp_path, say=ignore) as run:
        assert metrics.read_bytes() == first
        run.log(2, {"loss": 3.0, "entropy": 4.0})
    assert [row["step"] for row in lines(metrics)] == [1, 2]


def test_truncate_keeps_exactly_what_came_before_the_checkpoint(tmp_path: Path) -> None:
    with start(tmp_path, say=ignore) as run:
        run.event("data", "start")
        for step in range(4):
            run.step = step
            run.event("alarm", "now")
            run.log(step, {"loss": 1.0})
            run.write_samples(step, [])
        run.report("told")
        run.truncate(2)
        assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
        events = lines(tmp_path / "events.jsonl")
        assert [(row["step"], row["kind"]) for row in events] == [
            (0, "data"), (0, "alarm"), (1, "alarm"), (2, "alarm"), (3, "run/report"),
        ]  # fmt: skip
        assert [path.name[-9:] for path in sorted((tmp_path / "samples").iterdir())] == [
            f"{step}.parquet" for step in range(3)
        ]
        run.truncate(-1)
        assert (tmp_path / "metrics.jsonl").read_text() == ""
        assert [row["kind"] for row in lines(tmp_path / "events.jsonl")] == ["data", "alarm", "run/report"]
        assert list((tmp_path / "samples").iterdir()) == []


def test_the_run_directory_needs_no_torch() -> None:
    code = "import sys, klimb.runtime.run, klimb.runtime.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
