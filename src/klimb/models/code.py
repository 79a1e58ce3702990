"""Python code that a model brings along: it runs only where that was typed, and then only what was pinned.

What may run is known while a stage runs, and forgotten with it; whoever loads from a place asks `loading`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from klimb.errors import ConfigError


class Pin(NamedTuple):
    """May the code of a place run, and at which commit is it read (of a hub)?"""

    trusted: bool
    commit: str | None = None


_PINS: ContextVar[Mapping[str, Pin]] = ContextVar("pins", default=MappingProxyType({}))


@contextmanager
def pinned(pins: Mapping[str, Pin]) -> Iterator[None]:
    """While this lasts, these places are loaded as pinned, and no others."""
    token = _PINS.set({_place(model): pin for model, pin in pins.items()})
    try:
        yield
    finally:
        _PINS.reset(token)


def loading(model: str) -> dict[str, Any]:
    """Options of everything in transformers that loads from `model`."""
    pin = _PINS.get().get(_place(model), Pin(False))
    commit = {} if pin.commit is None else {"revision": pin.commit, "code_revision": pin.commit}
    return {"trust_remote_code": pin.trusted, **commit}


def building(model: str) -> dict[str, Any]:
    """Options of `from_config`, for the config that was loaded from `model`."""
    options = loading(model)
    options.pop("revision", None)
    return options if options["trust_remote_code"] else {"trust_remote_code": False}


def _place(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).exists() else model


def fingerprint(model: str, commit: str | None) -> dict[str, str] | None:
    """What the code of a place is known by, None where it has none: the commit; of a folder SHA-256 of its .py files.

    Nothing of it runs. Raises ConfigError where it lies in a repository of its own, which no commit here pins.
    """
    references = list(_references(_configs(model, commit)))
    for reference in references:
        repository = reference.partition("--")[0]
        if "--" in reference and repository != model:
            raise ConfigError(f"its Python code lies in another repository, {repository}", where=f"model={model}",
                              why="no commit pins that one", fix="give a folder that holds its .py files")  # fmt: skip
    if not references:
        return None
    if commit is not None:
        return {"commit": commit}
    digest = hashlib.sha256()
    for file in sorted(Path(model).rglob("*.py")):
        digest.update(
            f"{file.relative_to(model).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return {"sha256": digest.hexdigest()}


def _configs(model: str, commit: str | None) -> list[Any]:
    """Those that can name code."""
    try:
        if not Path(model).exists():
            return [PretrainedConfig.get_config_dict(model, revision=commit)[0],
                    get_tokenizer_config(model, revision=commit)]  # fmt: skip
        files = (Path(model) / name for name in ("config.json", "tokenizer_config.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    except (OSError, ValueError) as error:
        raise ConfigError("its config cannot be read", where=f"model={model}", why=error) from None


def _references(value: Any, mapped: bool = False) -> Iterator[str]:
    """`module.Class`, or `repository--module.Class`, of every `auto_map`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _references(inner, mapped or key == "auto_map")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _references(inner, mapped)
    elif mapped and isinstance(value, str):
        yield value
