"""`--dry-run`: a stage, or a whole recipe, tried out in a temporary folder, and what the real run would take.

Two real steps are trained and the stage is brought to its end, so that what fails late (a measurement, the saving)
fails now. Nothing stays but the tokenised data, which the run itself will find again.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from klimb.config import parse_seeds
from klimb.errors import Interrupted
from klimb.report.text import duration
from klimb.runtime.plan import gigabytes
from klimb.runtime.ranks import rank, share
from klimb.runtime.rehearsal import Rehearsal
from klimb.runtime.run import Fresh, Run
from klimb.runtime.signals import interruptible
from klimb.stages.common import TrainConfig, inputs_of
from klimb.stages.given import described
from klimb.stages.pipeline import stages_of
from klimb.stages.registry import STAGES, code_files, open_run
from klimb.stages.seeds import place_of, place_of_seeds

Say = Callable[[str], None]
_KEPT = 2
"""Checkpoints that lie beside each other; see `checkpoint.save`."""


def _brief(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 9.5 else duration(seconds)


class Estimate(NamedTuple):
    """What a stage would take. Times in seconds, files in bytes; `parts`: of one step."""

    name: str
    steps: int
    step: float
    parts: Mapping[str, float]
    preparing: float
    evaluating: float
    sampling: float
    files: Mapping[str, int]
    may_stop: bool
    """Before its last step, when what it waits for is reached."""

    @property
    def seconds(self) -> float:
        return self.preparing + self.steps * self.step + self.evaluating + self.sampling

    def lines(self) -> list[str]:
        """About a step, about the whole, and about what is written."""
        of = ", ".join(f"{part} {_brief(seconds)}" for part, seconds in self.parts.items())
        return [*([f"a step takes {_brief(self.step)} ({of})"] if self.steps else []), *self.lines_of_whole()]

    def lines_of_whole(self) -> list[str]:
        whole = {f"{self.steps:,} steps": self.steps * self.step, "to begin": self.preparing,
                 "evaluation": self.evaluating, "samples outside the steps": self.sampling}  # fmt: skip
        sum_of = ", ".join(f"{name} {_brief(seconds)}" for name, seconds in whole.items() if seconds)
        files = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.files.items() if size)
        bound = "at most" if self.may_stop else "about"
        return [f"the whole takes {bound} {_brief(self.seconds)} ({sum_of})", *([f"writes {files}"] if files else [])]


def rehearse(stage: str, configs: Mapping[int, Any], *, name: str, fresh: Fresh, say: Say) -> tuple[Estimate, str]:
    """A stage, by its first seed: the estimate of one seed, and where the real run would be and what lies there.

    configs: by seed. Raises what the run would raise.
    """
    config = next(iter(configs.values()))
    if len(configs) > 1:
        place, found = place_of_seeds(name, configs), f"{len(configs)} seeds"
    else:
        place, found = Run.look(config.out, config, inputs_of(config, *code_files(config)), name=name, fresh=fresh)
    with _temporary() as folder:
        estimate, _ = _tried(stage, config, name, folder / "run", say)
    return estimate, _told(place, found)


def rehearse_recipe(
    name: str, values: Mapping[str, Any], *, say: Say, look: Callable[[str, str, Any], None] = lambda *_: None
) -> tuple[list[Estimate], str]:
    """All stages of one seed, each on what the tried ones before it left. `look` sees each before it is tried."""
    seeds = parse_seeds(values.get("seed", 0))
    place = place_of(name, described(values))
    estimates: list[Estimate] = []
    results: dict[str, dict[str, Any]] = {}
    with _temporary() as folder:
        for stage, kind, config in stages_of(name, values, seeds[0], folder, results, say):
            look(stage, kind, config)
            estimate, results[stage] = _tried(kind, config, stage, folder / stage, say)
            estimates.append(estimate)
    return estimates, _told(place, "new" if not place.exists() else "there already")


def _told(place: Path, found: str) -> str:
    return f"{place} ({found}; {gigabytes(_room(place))} are free there)"


@contextmanager
def _temporary() -> Iterator[Path]:
    """The same on all ranks; deleted by the first."""
    made = tempfile.TemporaryDirectory(prefix="klimb-dry-run-") if rank() == 0 else None
    try:
        yield Path(share(made and made.name))
    except Interrupted:
        raise Interrupted("the dry run was interrupted; nothing of it is left") from None
    finally:
        if made is not None:
            made.cleanup()


def _tried(stage: str, config: Any, name: str, folder: Path, say: Say) -> tuple[Estimate, dict[str, Any]]:
    light = _lightened(config, stood_in=str(folder.parent) in str(getattr(config, "data", "")))
    compared = [*getattr(config, "best_of", []), getattr(config, "report_n", None) or 2]
    rehearsal = Rehearsal(least=max(compared))
    with open_run(folder, light, name, False, say) as run, interruptible() as interrupt:
        interrupt.rehearsal = rehearsal
        result = importlib.import_module(STAGES[stage][0]).train(light, run, interrupt, say)
        facts = run.manifest
    estimate = _estimate(name, config, folder, facts, rehearsal) if rank() == 0 else None
    if rank() == 0:
        _as_many(result, rehearsal.share)
    base = {"stage": stage, "name": name, "method": config.method or name, "seed": config.seed, "seconds": 0.0}
    return Estimate(*share(estimate)), {**base, **share(result), "run": str(folder)}


def _lightened(config: Any, stood_in: bool) -> Any:
    """Without what would only cost time in two steps, or judge them as if they were all.

    stood_in: its data is what an earlier stage left, a few prompts of many: perhaps none of them is held out.
    """
    changes: dict[str, Any] = {"eval_fraction": 0.0} if stood_in and hasattr(config, "eval_fraction") else {}
    if isinstance(config, TrainConfig):
        changes["checkpoint_every"] = 0
    if hasattr(config, "min_accuracy"):
        changes["min_accuracy"] = 0.0
    if hasattr(config, "critic"):  # steps in which the policy learns, too
        changes["critic"] = config.critic.model_copy(update={"warmup_steps": 0})
    return config.model_copy(update=changes)


def _as_many(result: Mapping[str, Any], drawn: float) -> None:
    """The stages behind get as many rows as they will: those that were drawn, again and again."""
    for key in ("samples", "preferences"):
        if drawn < 1 and isinstance(result.get(key), str):
            path = Path(result[key])
            path.write_bytes(path.read_bytes() * round(1 / drawn))


def _estimate(name: str, config: Any, folder: Path, facts: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    parts = {key.removeprefix("time/"): value for key, value in last.items() if key.startswith("time/")}
    files = {"model/": _size(folder / "model")}
    if config_saves := getattr(config, "checkpoint_every", 0):
        held = facts["decisions"].get("memory", {}).get("lines", {})
        state = held.get("masters") or held.get("adapters") or held.get("weights", 0)
        each = state + held.get("moments", 0) + held.get("critic", 0)
        saved = max(1, min(_KEPT, rehearsal.total // config_saves))
        files[f"{saved} checkpoint{'s' if saved > 1 else ''}"] = saved * each
    tried = max(len(lines), 1)
    files["samples/"] = _size(folder / "samples") // tried * rehearsal.total
    files["samples.jsonl"] = int(_size(folder / "samples.jsonl") / rehearsal.share)
    files["preferences.jsonl"] = int(_size(folder / "preferences.jsonl") / rehearsal.share)
    return Estimate(
        name, rehearsal.total, sum(parts.values()), parts, rehearsal.preparing,
        _evaluating(config, facts.get("data", {}), parts.get("train", 0.0), rehearsal.total), rehearsal.sampling, files,
        may_stop=any(getattr(config, key, None) is not None for key in ("until", "until_accuracy")),
    )  # fmt: skip


def _evaluating(config: Any, data: Mapping[str, Any], training: float, steps: int) -> float:
    """Passes without gradient over what is held out: a row takes a third of what it takes to train on it."""
    if not hasattr(config, "batch_size") or "data" not in data:
        return 0.0
    row = training / config.batch_size / 3
    rows = data["data"]["used"]
    held_out = data["eval_data"]["used"] if "eval_data" in data else config.eval_fraction * rows
    passes = -(-steps // config.eval_every) * held_out
    if hasattr(config, "min_accuracy"):  # a reward model is measured at the end, and its scale is taken
        passes += held_out + data.get("reference", data["data"])["used"]
    return float(row * passes)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files if file.is_file())


def _room(place: Path) -> int:
    """Free on the disk that a path which may not be there yet will lie on."""
    there = next(folder for folder in [place.absolute(), *place.absolute().parents] if folder.is_dir())
    return shutil.disk_usage(there).free
