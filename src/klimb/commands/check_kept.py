"""What a check found, kept: the same check of the same file answers at once, before anything large is imported."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from klimb.commands.check_data import CheckConfig
from klimb.data import cache
from klimb.data.formats import Problem
from klimb.data.readers import open_source

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
KEPT = 200
"""Answers; the oldest goes first."""


def place_of(config: CheckConfig) -> Path | None:
    """Where the answer to this check is kept: under a hash of the rows, the model's files, the options and the code.
    None where they cannot be told from others, as those of a model on the hub."""
    model = Path(config.model or "")
    if config.model is None or not model.is_dir():
        return None
    identity = open_source(config.data).identity()
    if identity is None:
        return None
    facts = {"check": [identity, config.model_dump(), dict(_described(model))], "code": _hash(*_code())}
    return cache.folder().with_name("checks") / f"{cache.key_of(facts)}.json"


def find(place: Path) -> tuple[dict[str, Any], list[Problem]] | None:
    """The facts and the bad rows, if they are there and the prepared rows are, too."""
    try:
        kept = json.loads(place.read_bytes())
        facts, problems, rows = kept["facts"], [Problem(*each) for each in kept["problems"]], kept["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not Path(rows).is_file():
        return None
    return {**facts, "cache": f"hit: {rows}"}, problems


def keep(place: Path, facts: dict[str, Any], problems: Sequence[Problem]) -> None:
    """Where the rows could not be kept, or this cannot, the next check looks again."""
    found, _, rows = facts["cache"].partition(": ")
    if not found.startswith(("hit", "miss")):
        return
    content = json.dumps({"facts": facts, "problems": problems, "rows": rows}, ensure_ascii=False)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=place.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, place)
        for old in sorted(place.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()


def _described(model: Path) -> Iterator[tuple[str, str]]:
    """A model's files but its weights, by their hashes; an adapter's base, too."""
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS:
            yield str(path.resolve()), _hash(path)
    adapter = model / "adapter_config.json"
    if adapter.is_file():
        base = Path(str(json.loads(adapter.read_bytes()).get("base_model_name_or_path")))
        yield from _described(base) if base.is_dir() else [(str(base), "")]


def _code() -> list[Path]:
    return sorted(Path(__file__).parent.glob("check*.py"))


def _hash(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
