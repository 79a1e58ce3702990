"""A constitution: principles in a YAML file, one drawn for each answer (Bai et al. 2022, arXiv 2212.08073)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from klimb.config import parse_yaml
from klimb.errors import ConfigError

SHIPPED = Path(__file__).with_name("principles.yaml")


class Principle(NamedTuple):
    """How an answer is criticised, revised, and compared with another by it."""

    name: str
    criticise: str
    revise: str
    compare: str


def load_principles(path: str | None) -> list[Principle]:
    """Of a file, or those that come with klimb. Raises ConfigError."""
    file = Path(path) if path is not None else SHIPPED
    try:
        entries = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the principles cannot be read", where=file, why=error) from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError("no list of principles", where=file, fix=f"write: - {{{': …, '.join(Principle._fields)}: …}}")
    for number, entry in enumerate(entries, start=1):
        keys = entry if isinstance(entry, dict) else {}
        wrong = [name for name in Principle._fields if not (isinstance(keys.get(name), str) and keys[name].strip())]
        wrong += [str(name) for name in keys if name not in Principle._fields]
        if wrong:
            raise ConfigError(f"principle {number}: {wrong[0]!r} is missing, empty or unknown", where=file,
                              fix=f"each has {', '.join(Principle._fields)}, all of them texts")  # fmt: skip
    return [Principle(**entry) for entry in entries]


def principle_for(principles: list[Principle], seed: int, *about: str) -> Principle:
    """Drawn by content, so that neither the order of rows nor a resume changes it."""
    digest = hashlib.blake2b("\0".join([str(seed), *about]).encode("utf-8", "replace"), digest_size=8).digest()
    return principles[int.from_bytes(digest, "little") % len(principles)]
