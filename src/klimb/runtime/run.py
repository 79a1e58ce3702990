"""The run directory: what ran, on what, and all that it produced; it continues where it was cut off.

    with Run.open(config.out, config, {"data": Path("my.jsonl"), "model": Path("base")}, name="grpo") as run:
        if run.result is None:
            threads = run.decide("threads", torch.get_num_threads)
            checkpoint = load_latest(run.checkpoints, run.report)
            done = checkpoint.step if checkpoint else -1
            run.truncate(done)
            for step in range(max(done, 0) + 1, steps + 1):
                run.step = step
                …; run.write_samples(step, rows); run.log(step, metrics)
                run.sync(); save(run.checkpoints, step, …)
            run.write_result({…})

Steps count from 1: row 12 of metrics.jsonl is what the 12th update gave, and the checkpoint of step 12 holds
the weights after it. Step 0 is what comes before training. A step writes all it has before its checkpoint.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import pyarrow.parquet
from pydantic import BaseModel

from klimb.config import config_hash
from klimb.errors import RunError
from klimb.runtime import durable, manifest
from klimb.runtime.samples import sample_table

Inputs = Mapping[str, Path | str]
"""What the config points at: files and folders (hashed), or a fingerprint as text (hub name, revision)."""

Fresh = bool | Literal["changed"]
"""What becomes of an earlier run in the same directory: True deletes it, "changed" only where it is another one."""

_PROCESS = "run/"
"""Events of this kind tell of the process, not of the training: after a kill there are more of them."""
_AT_START = '{"step": 0, '


class OtherRun(RunError):
    """The directory holds a run of another config or input; `changes` says what differs."""

    def __init__(self, path: Path, changes: str, fix: str) -> None:
        super().__init__("holds a run of another config or input", where=path, why=changes, fix=fix)
        self.path, self.changes = path, changes


def _print_aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Run:
    """One run directory, held by this process from `Run.open` to `close` or to the end of the process."""

    def __init__(self, path: Path, facts: dict[str, Any], lock: TextIO | None, say: Callable[[str], None]) -> None:
        self.path = path
        self.manifest = facts
        self.step = 0
        """The step in progress; the loop sets it, events carry it."""
        self._lock = lock
        self._say = say
        self._told_at_start: set[str] = set()
        self.closing = ExitStack()
        """What ends with the run, however it ends: processes of reward functions."""

    @classmethod
    def open(
        cls,
        out: str | Path | None,
        config: BaseModel | Mapping[str, Any],
        inputs: Inputs,
        *,
        name: str,
        fresh: Fresh = False,
        say: Callable[[str], None] = _print_aside,
    ) -> Self:
        """Creates the directory of this config and these inputs, or continues the one that is there.

        `out` None stands for `runs/NAME-HASH`. `say` gets lines for a person: continued, what differs.
        Raises RunError when the directory belongs to another process or somebody else, or cannot be written,
        and OtherRun when it belongs to another config; with `fresh` what a run left there is deleted first. A
        run that failed before its first step (a missing file, a mistake in a reward) stands in nobody's way.
        """
        path, identity, hashes = _place(out, config, inputs, name)
        previous = None if out or path.exists() else manifest.most_recent(path.parent, name)
        with durable.explained("cannot write the run directory", path, fix="choose another out"):
            lock, cut_off = manifest.take(path)
            try:
                facts = manifest.read(path)
                other = _is_other(path, facts, identity, config, hashes, fresh)
                if other and fresh == "changed":
                    changes = "; ".join(manifest.differences(path, config, hashes))
                    say(f"{path}: started anew, what it held is deleted: {changes}")
                continued = facts is not None and not other and fresh is not True
                if facts is None or not continued:
                    facts = manifest.describe(name, identity, config, inputs, hashes)
                    manifest.begin(path, facts, config)
            except BaseException:
                lock.close()
                raise
        run = cls(path, facts, lock, say)
        if continued:
            run._continue(cut_off)
        elif previous:
            changes = "; ".join(manifest.differences(previous, config, hashes))
            say(f"{path}: a new run, it differs from {previous.name}: {changes}")
        return run

    @staticmethod
    def look(
        out: str | Path | None, config: BaseModel | Mapping[str, Any], inputs: Inputs, *, name: str,
        fresh: Fresh = False,
    ) -> tuple[Path, str]:  # fmt: skip
        """Where `open` would make the run, and what it would find there; nothing is written. Raises as it does."""
        path, identity, hashes = _place(out, config, inputs, name)
        if not path.exists():
            return path, "new"
        with durable.explained("cannot write the run directory", path, fix="choose another out"):
            manifest.refuse_foreign(path)
        facts = manifest.read(path)
        if facts is None:
            return path, "new"
        if _is_other(path, facts, identity, config, hashes, fresh) or fresh is True:
            return path, "anew, what it holds is deleted"
        return path, "finished before" if (path / "result.json").exists() else "continued"

    @classmethod
    def follow(cls, path: Path, facts: dict[str, Any], say: Callable[[str], None] = _print_aside) -> Self:
        """The run as further ranks see it: rank 0 holds and writes the directory, they only read."""
        return cls(path, facts, None, say)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run found; None while there is something left to do."""
        try:
            result: dict[str, Any] = json.loads((self.path / "result.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError("not JSON", where=self.path / "result.json", why=error, fix="delete it") from None
        return result

    def decide(self, key: str, compute: Callable[[], Any]) -> Any:
        """What was decided when the run began, else `compute()`, recorded at once.

        For whatever can change rounding: threads, attention path, token budget. Tuples come back as lists.
        """
        decisions = self.manifest["decisions"]
        if key not in decisions:
            decisions[key] = json.loads(json.dumps(compute()))
            self._replace("manifest.json", manifest.to_json(self.manifest))
        return decisions[key]

    def found(self, key: str, facts: Mapping[str, Any]) -> None:
        """What the data of `key` held, in the manifest; a resumed run leaves there what it was when it began."""
        data = self.manifest.setdefault("data", {})
        if key not in data:
            data[key] = dict(facts)
            self._replace("manifest.json", manifest.to_json(self.manifest))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl. JSON knows no NaN: it becomes null, and an event says so."""
        row = {key: _plain_number(value) for key, value in metrics.items()}
        lost = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        self._append("metrics.jsonl", {"step": step, **row})
        self.step = step
        if lost:
            values = ", ".join(f"{key} is {row[key]}" for key in lost)
            self.event("non_finite", f"step {step}: {values}; written as null")

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Appends one line to events.jsonl: alarms, drops, retries, with their reasons.

        Kinds that begin with `run/` tell of the process. At step 0 the same event is not written twice, so
        that a start-up told again on resume leaves the file as it was.
        """
        row = {"step": self.step, "kind": kind, "message": message, **fields}
        if self.step == 0 and not kind.startswith(_PROCESS):
            line = json.dumps(manifest.finite(row))
            if line in self._told_at_start:
                return
            self._told_at_start.add(line)
        self._append("events.jsonl", row)

    def report(self, message: str) -> None:
        """A line about the process, for a person and for events.jsonl."""
        self._say(f"{self.path}: {message}")
        self.event(f"{_PROCESS}report", message)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """samples/step-NNNNNN.parquet: every completion of a step; `sample_table` has the keys of a row."""
        file = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(sample_table(step, rows), file)
        self._replace(f"samples/step-{step:06d}.parquet", file.getvalue().to_pybytes())

    def write_result(self, result: Mapping[str, Any]) -> None:
        """The last file of a run: with it the run is finished, and reused by the same command."""
        self._replace("result.json", manifest.to_json(result))

    def sync(self) -> None:
        """Brings metrics and events to the disk: before a checkpoint, so that none outlives its metrics."""
        if self._lock is None:
            return
        for name in ("metrics.jsonl", "events.jsonl"):
            if (self.path / name).exists():
                durable.sync(self.path / name)
        durable.sync(self.path)

    def truncate(self, step: int) -> None:
        """Forgets what came after the checkpoint of `step` (-1: there is none), a line that was cut off too.

        What remains equals byte for byte what an uninterrupted run had written by then. Of the events those
        of the process stay, and those of step 0.
        """
        self.step = max(step, 0)
        if self._lock is None:
            return
        self._keep_lines("metrics.jsonl", lambda row: row["step"] <= step)
        self._keep_lines("events.jsonl", lambda row: row["step"] <= max(step, 0) or row["kind"].startswith(_PROCESS))
        for path in (self.path / "samples").glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        for folder in (self.path, self.path / "samples", self.checkpoints):
            durable.remove_leftovers(folder)

    def close(self) -> None:
        """Lets go of the directory, and of what ends with the run."""
        self.closing.close()
        if self._lock is not None and not self._lock.closed:
            self._lock.truncate(0)
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.closing.__exit__(kind, error, trace)  # what ends with the run hears why
        finally:
            self.close()

    def _continue(self, cut_off: str | None) -> None:
        """`cut_off` is the process that held the run and never let go of it, if so it was."""
        if self.result is not None:
            return
        self._keep_lines("metrics.jsonl", lambda row: True)
        self._keep_lines("events.jsonl", lambda row: True)
        events = self.path / "events.jsonl"
        lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
        self._told_at_start = {line for line in lines if line.startswith(_AT_START)}
        self.report(f"continued; process {cut_off} was cut off" if cut_off else "continued")
        was, now = self.manifest["versions"], manifest.versions()
        if was != now:
            news = ", ".join(f"{key} {was.get(key)} → {now.get(key)}" for key in now if was.get(key) != now[key])
            self.report(f"other versions than at its start ({news}): the bits may differ from an uninterrupted run")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self._lock is None:
            return
        line = json.dumps(manifest.finite(row)) + "\n"
        with _writing(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(line)

    def _replace(self, name: str, data: bytes) -> None:
        if self._lock is None:
            return
        path = self.path / name
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            durable.replace_file(path, data)

    def _keep_lines(self, name: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        path = self.path / name
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off in the middle by a kill
            if line.endswith(b"\n") and wanted(row):
                kept.append(line)
        self._replace(name, b"".join(kept))


def _place(
    out: str | Path | None, config: BaseModel | Mapping[str, Any], inputs: Inputs, name: str
) -> tuple[Path, str, dict[str, str]]:
    """The directory of a run, what it is known by, and the hashes of its inputs."""
    hashes = {key: manifest.fingerprint(key, value) for key, value in inputs.items()}
    identity = config_hash(config, hashes)
    return Path(out) if out else Path("runs") / f"{name}-{identity[:8]}", identity, hashes


def _is_other(
    path: Path, facts: Mapping[str, Any] | None, identity: str, config: BaseModel | Mapping[str, Any],
    hashes: Mapping[str, str], fresh: Fresh,
) -> bool:  # fmt: skip
    """Does `path` hold a run of another config or input? Raises OtherRun where it must stay as it is."""
    if facts is None or facts["identity"] == identity:
        return False
    if not (fresh or manifest.is_untouched(path)):
        changes = "; ".join(manifest.differences(path, config, hashes))
        raise OtherRun(path, changes, fix="start it again here with --fresh, or choose another out")
    return True


def _writing(path: Path) -> AbstractContextManager[None]:
    fix = "make room and run the same command again: it continues from its last checkpoint"
    return durable.explained("cannot be written", path, fix)


def _plain_number(value: Any) -> Any:
    """Scalars of numpy and tensors as floats."""
    return value if value is None or isinstance(value, bool | int | float | str) else float(value)
