"""What a command is pointed at: a run that left a model, its `model/` folder, any model directory, or a hub name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klimb.config import load_yaml
from klimb.errors import RunError
from klimb.runtime import durable, manifest


@dataclass(frozen=True)
class Trained:
    """A finished run that left a model, as its files tell of it."""

    path: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def is_adapter(self) -> bool:
        return (self.model / "adapter_config.json").is_file()

    @property
    def conversational(self) -> bool | None:
        """Was it trained on messages? None: it does not say."""
        return self.manifest["decisions"].get("conversational")

    def source(self, key: str) -> str | None:
        """A file, folder or hub name that the run was given, as it was typed."""
        found = self.manifest["inputs"].get(key)
        return None if found is None else str(found["source"])

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl or events.jsonl; what a kill cut off in the middle is left out."""
        return list(_rows(self.path / name))

    def history(self) -> list[Trained]:
        """The runs that led here, the first one first, as far as their folders are there and unchanged."""
        model = self.manifest["inputs"].get("model") or {"source": "", "hash": ""}
        before = run_of(Path(model["source"]))
        if before is None or not before.model.is_dir() or durable.content_hash(before.model) != model["hash"]:
            return [self]
        return [*before.history(), self]


def run_of(path: Path) -> Trained | None:
    """The run in `path`, or whose `model/` folder `path` is. Raises RunError when its files are damaged."""
    for folder in (path, *([path.parent] if path.name == "model" else [])):
        facts = manifest.read(folder) if folder.is_dir() else None
        if facts is not None:
            return Trained(folder, facts, load_yaml(folder / "config.yaml"), _result(folder))
    return None


def trained_run(text: str) -> Trained:
    """The finished run in `text`. Raises RunError with the way out where it left no model."""
    path = Path(text)
    run = run_of(path)
    if run is None:
        _refuse_folder_of_runs(path)
        what = "is not a run" if path.exists() else "no such directory"
        raise RunError(what, where=text, fix="give a run directory, such as runs/sft-1234abcd, or its model folder")
    if not run.result:
        raise RunError("has not finished, so it has no model yet", where=run.path, fix="run its command again: it "
                       "continues")  # fmt: skip
    if not run.model.is_dir():
        stage = run.result.get("stage", "its stage")
        why = (
            f"{stage} trains nothing"
            if stage in ("sample", "evaluate", "evaluate_reward")
            else "its model folder is gone"
        )
        raise RunError("holds no model", where=run.path, why=why, fix="give a run that trains one")
    return run


def model_of(text: str) -> tuple[str, Trained | None]:
    """The model that a person means: a run's, that in a directory, or a hub name as it is."""
    path = Path(text)
    if not path.is_dir() or (run_of(path) is None and _is_model(path)):
        return text, None
    run = trained_run(text)
    return str(run.model), run


def _refuse_folder_of_runs(path: Path) -> None:
    runs = sorted(str(model.parent) for pattern in ("*/model", "*/*/model") for model in path.glob(pattern)
                  if (model.parent / "manifest.json").is_file())  # fmt: skip
    if runs:
        raise RunError("holds several runs", where=path, fix=f"give one of them: {', '.join(runs)}")


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _result(folder: Path) -> dict[str, Any]:
    file = folder / "result.json"
    try:
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}
    except ValueError as error:
        raise RunError("not JSON", where=file, why=error, fix="delete it and run its command again") from None


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue
