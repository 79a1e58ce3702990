"""Who a run directory belongs to: config and inputs by hash, versions, and the process that holds it.

RUN/lock           the process that writes here; the system lets go of it when that process ends
RUN/config.yaml    fully resolved
RUN/manifest.json  identity, versions, seed, hashes of the inputs, decisions that a resumed run repeats
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel

import klimb
from klimb.config import config_changes, dump_config, load_yaml, plain
from klimb.errors import KlimbError, RunError
from klimb.runtime import durable

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "bitsandbytes")
_BEFORE_MANIFEST = {"lock", "config.yaml"}
_LEFT_BY_A_RUN = (
    "result.json",
    "report.html",
    "metrics.jsonl",
    "events.jsonl",
    "samples.jsonl",
    "steps.jsonl",
    "preferences.jsonl",
    "undecided.jsonl",
    "demonstrations.jsonl",
    "checkpoints",
    "samples",
    "model",
)
"""In this order they go, so that a run that is cut off while it is deleted never looks finished."""


def take(path: Path) -> tuple[TextIO, str | None]:
    """Makes the directory and holds it for this process: the open lock, and who held it last and was cut off.

    Raises RunError when another process holds it, or when it is a directory of something else than a run;
    OSError when it cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    refuse_foreign(path)
    lock = (path / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another"
        lock.close()
        fix = "wait for it, or choose another out"
        raise RunError("is being written", where=path, why=f"process {holder} holds it", fix=fix) from None
    lock.seek(0)
    predecessor = lock.read().strip() or None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock, predecessor


def refuse_foreign(path: Path) -> None:
    """Raises RunError where a directory holds something else than a run."""
    names = {file.name for file in path.iterdir() if not file.name.startswith(durable.TEMPORARY)}
    if "manifest.json" not in names and (foreign := sorted(names - _BEFORE_MANIFEST)):
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise RunError("is not a run directory", where=path, why=f"it holds {shown}", fix="choose another out")


def read(path: Path) -> dict[str, Any] | None:
    """The manifest in `path`, None when there is none yet. Raises RunError when it is not that of a run."""
    file = path / "manifest.json"
    try:
        facts: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError("is not JSON", where=file, why=error, fix="choose another out") from None
    if not isinstance(facts, dict) or not {"identity", "inputs", "versions", "decisions"} <= facts.keys():
        raise RunError("is not the manifest of a run", where=file, fix="choose another out")
    return facts


def describe(
    name: str,
    identity: str,
    config: BaseModel | Mapping[str, Any],
    inputs: Mapping[str, Path | str],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a new run."""
    return {
        "name": name,
        "identity": identity,
        "seed": plain(config).get("seed"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "inputs": {key: {"source": str(inputs[key]), "hash": hashes[key]} for key in inputs},
        "decisions": {},
    }


def begin(path: Path, facts: Mapping[str, Any], config: BaseModel | Mapping[str, Any]) -> None:
    """Deletes what an earlier run left in `path`, and writes the config and the manifest of the new one."""
    for name in _LEFT_BY_A_RUN:
        old = path / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    durable.remove_leftovers(path)
    durable.replace_file(path / "config.yaml", dump_config(config).encode())
    durable.replace_file(path / "manifest.json", to_json(facts))


def is_untouched(path: Path) -> bool:
    """Did the run here end before it made anything?"""
    return not any((path / name).exists() for name in _LEFT_BY_A_RUN if name not in ("events.jsonl", "report.html"))


def versions() -> dict[str, str]:
    """What can change the bits of a run, apart from the machine."""
    found = {"klimb": klimb.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(key: str, value: Path | str) -> str:
    """The hash of a file or folder; text is its own."""
    if isinstance(value, str):
        return value
    try:
        return durable.content_hash(value)
    except OSError as error:
        raise KlimbError(f"{key} cannot be read", where=value, why=error.strerror or error) from None


def most_recent(folder: Path, name: str, holding: str = "manifest.json") -> Path | None:
    """The run of this name that began last, by the file that it wrote then."""
    runs = [path for path in folder.glob(f"{name}-*") if re.fullmatch(r"[0-9a-f]{8}", path.name[len(name) + 1 :])]
    known = [path for path in runs if (path / holding).exists()]
    return max(known, key=lambda path: (path / holding).stat().st_mtime_ns, default=None)


def differences(path: Path, config: BaseModel | Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    """What the run in `path` had otherwise, key by key."""
    facts = read(path) or {"inputs": {}}
    old = {key: value["hash"] for key, value in facts["inputs"].items()}
    changed = [key for key in {**old, **hashes} if old.get(key) != hashes.get(key)]
    return [
        *config_changes(load_yaml(path / "config.yaml"), plain(config)),
        *(f"{key}: its content changed" for key in changed),
    ]


def to_json(value: Mapping[str, Any]) -> bytes:
    """Indented, for people."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False).encode()


def finite(value: Any) -> Any:
    """The value with null where a float is NaN or infinite, which JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
