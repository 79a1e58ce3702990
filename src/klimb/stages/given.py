"""What a user hands to a stage, also as values from Python: how a config file and a hash speak of them."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_ROWS = ("data", "eval_data")


def described(value: Any, key: str = "") -> Any:
    """A value from Python as a config file can hold it, the same in every process: what it is, not where it lies."""
    if isinstance(value, Mapping):
        return {str(inner): described(each, str(inner)) for inner, each in value.items()}
    if isinstance(value, Iterable) and hasattr(value, "_fingerprint"):
        return f"<rows of datasets, fingerprint {value._fingerprint}>"
    if isinstance(value, list | tuple):
        if key in _ROWS and value and isinstance(value[0], Mapping):
            return f"<{len(value)} rows, sha256 {_digest(json.dumps(value, default=str))}>"
        return [described(inner) for inner in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {_code(type(value)): {each.name: described(getattr(value, each.name)) for each in fields(value)}}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    return _code(value if callable(value) and hasattr(value, "__qualname__") else type(value))


def _code(value: Any) -> str:
    """A function or class by name, with a hash of its text where it is not klimb's own."""
    module = getattr(value, "__module__", None) or "builtins"
    name = f"{module}.{value.__qualname__}"
    if module.startswith("klimb."):
        return name
    try:
        return f"<{name}, sha256 {_digest(inspect.getsource(value))}>"
    except (OSError, TypeError):  # typed in at a prompt, or not written in Python
        return f"<{name}>"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Given = Annotated[Any, PlainSerializer(lambda value: described(value))]
"""A path, a name or a spec in a recipe; from Python also functions and values themselves."""


def known_rows(value: Any) -> Any:
    """Rows whose content a run can be known by: a list, or a data set that knows its fingerprint."""
    known = value is None or isinstance(value, str | Path | list | tuple | Mapping) or hasattr(value, "_fingerprint")
    return value if known or not isinstance(value, Iterable) else list(value)


def with_known_rows(values: Any, key: str = "") -> Any:
    """The same in a recipe, in all of its sections: a run goes through its rows more than once."""
    if key in _ROWS:
        return known_rows(values)
    return {k: with_known_rows(v, k) for k, v in values.items()} if isinstance(values, Mapping) else values


Data = Annotated[Any, BeforeValidator(known_rows), PlainSerializer(lambda value: described(value, "data"))]
"""A path, several (a list, or a mapping from each to its weight), a hub name; from Python any iterable of rows."""
