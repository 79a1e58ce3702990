"""Prepared data is kept, under a hash of all that decides about it, and found again by the next run.

$XDG_CACHE_HOME/klimb/data (else ~/.cache/klimb/data) holds KEY.arrow, the rows, and KEY.json, which says what they
are and their hash. Whoever wants the room deletes the folder: everything in it is made anew when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

LIMIT = 20 * 2**30
"""Bytes. What was not used for longest goes first."""


def folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klimb" / "data"


def key_of(facts: Mapping[str, Any]) -> str:
    """A name for what is prepared from these facts by this code."""
    return hashlib.sha256(json.dumps([_code_version(), facts], sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code_version() -> list[str]:
    """Of all that turns rows into tokens: a hash of this package's files, and the versions of what it calls."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "types.py"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return [digest, *(metadata.version(package) for package in ("tokenizers", "transformers"))]


def find(key: str) -> dict[str, Any] | None:
    """What is noted about the rows in KEY.arrow, if they are there and whole."""
    rows, note = _paths(key)
    try:
        facts = json.loads(note.read_bytes())
        if facts.pop("sha256") != _hash(rows, facts):
            return None
        os.utime(rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(facts)


def path_of(key: str) -> Path:
    return _paths(key)[0]


def keep(key: str, write: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """`write` fills a file and says what is to be noted about it; readers find both or neither.

    Raises OSError where the folder cannot be written.
    """
    rows, note = _paths(key)
    rows.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=rows.parent) as temporary:
        unnamed = Path(temporary) / rows.name
        facts = dict(write(unnamed))
        described = Path(temporary) / note.name
        described.write_text(json.dumps({**facts, "sha256": _hash(unnamed, facts)}, indent=1), encoding="utf-8")
        os.replace(unnamed, rows)
        os.replace(described, note)
    _make_room(rows)
    return facts


def _hash(rows: Path, facts: Mapping[str, Any]) -> str:
    """Of both files: a note that was changed is not trusted either."""
    with rows.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _paths(key: str) -> tuple[Path, Path]:
    return folder() / f"{key}.arrow", folder() / f"{key}.json"


def _make_room(newest: Path) -> None:
    """A process that has a deleted file open keeps on reading it; what a killed one began is a day old at the most."""
    for unfinished in newest.parent.glob(".tmp-*"):
        if unfinished.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(unfinished, ignore_errors=True)
    files = sorted(newest.parent.glob("*.arrow"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > LIMIT and file != newest:
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink(missing_ok=True)
