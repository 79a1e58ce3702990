"""Says in a person's words what is wrong with a config: the key, what was expected, what was there."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from klimb.errors import did_you_mean, nearest

Key = tuple[str | int, ...]
"""`("stages", 0, "lr")`: where a value lies in nested mappings and lists."""


class _Complaint(NamedTuple):
    """One error of pydantic, taken apart."""

    key: Key
    union: Key | None
    """The key whose value may have one of several types (`str | Section`), when one of these complains."""
    branch: str
    sections: list[type[BaseModel]]
    """The classes that the innermost mapping around the key may have."""
    error: ErrorDetails


def one_line_each(cls: type[BaseModel], values: Any, error: ValidationError) -> list[tuple[Key, str]]:
    """(key, line) of each problem that validating `values` as a `cls` met.

    Of the branches of a union only the one that the value resembles most is reported.
    """
    complaints = [_take_apart(cls, values, details) for details in error.errors(include_url=False)]
    lines = [(each.key, _describe(cls, each)) for each in complaints if each.union is None]
    for union in dict.fromkeys(each.union for each in complaints if each.union is not None):
        branches: dict[str, list[_Complaint]] = {}
        for each in complaints:
            if each.union == union:
                branches.setdefault(each.branch, []).append(each)
        entered = [branch for branch in branches.values() if all(len(each.key) > len(union) for each in branch)]
        if entered:
            lines += [(each.key, _describe(cls, each)) for each in min(entered, key=len)]
        else:
            firsts = [branch[0].error for branch in branches.values()]
            expected = " or ".join(dict.fromkeys(_expected(first) for first in firsts))
            lines.append((union, f"{_dotted(union)}: expected {expected}, got {shown(firsts[0]['input'])}"))
    return lines


def _take_apart(cls: type[BaseModel], values: Any, error: ErrorDetails) -> _Complaint:
    """Tells the keys in an error's `loc` from the names of union branches that pydantic puts between them."""
    key: Key = ()
    union, branch = None, ""
    sections, around = [cls], [cls]
    for part in error["loc"]:
        owners = [section for section in sections if part in section.model_fields]
        if owners or isinstance(part, int) or (isinstance(values, Mapping) and part in values):
            key, around = (*key, part), sections
            values = _inner(values, part)
            if owners:
                annotations = [section.model_fields[str(part)].annotation for section in owners]
                sections = [model for annotation in annotations for model in _models_in(annotation)]
        else:
            if union is None:
                union, branch = key, str(part)
            sections = [section for section in sections if section.__name__ == part] or sections
    return _Complaint(key, union, branch, around, error)


def _inner(values: Any, part: str | int) -> Any:
    if isinstance(values, Mapping):
        return values.get(part)
    if isinstance(values, Sequence) and isinstance(part, int) and part < len(values):
        return values[part]
    return None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _describe(cls: type[BaseModel], complaint: _Complaint) -> str:
    key, error = _dotted(complaint.key), complaint.error
    kind, value = error["type"], error["input"]
    if kind == "missing":
        return f"{key}: is required"
    if kind == "extra_forbidden":
        return _unknown_key(cls, complaint)
    if kind in ("value_error", "assertion_error"):
        text = error["msg"].partition(", ")[2]
        return f"{key}: {text}" if key else text
    line = f"{key}: expected {_expected(error)}, got {shown(value)}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        line += f"""; if it is text, quote it: "{value}" in a file, '"{value}"' on the command line"""
    choices = re.findall(r"'([^']*)'", error["msg"]) if kind == "literal_error" else []
    if close := nearest(str(value), choices):
        line += f"; did you mean {close!r}?"
    return line


def _unknown_key(cls: type[BaseModel], complaint: _Complaint) -> str:
    *above, name = complaint.key
    known = [field for section in complaint.sections for field in section.model_fields]
    elsewhere = [path for path in _field_paths(cls) if path.split(".")[-1] == name]
    close = nearest(str(name), known)
    if elsewhere:
        fix = f"did you mean {elsewhere[0]!r}?"
    elif close:
        fix = f"did you mean {_dotted((*above, close))!r}?"
    else:
        fix = did_you_mean(str(name), known)
    return f"unknown key {_dotted(complaint.key)!r}; {fix}"


def _field_paths(cls: type[BaseModel], above: Key = ()) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield _dotted((*above, name))
        for section in _models_in(field.annotation):
            if len(above) < 4:  # a section may hold itself
                yield from _field_paths(section, (*above, name))


def _expected(error: ErrorDetails) -> str:
    text = error["msg"].removeprefix("Input should be ")
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "keys with values"
    if error["type"] == "literal_error":
        return text
    return text.split(", ")[0].replace("a valid integer", "an integer").replace("a valid ", "a ")


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def shown(value: Any) -> str:
    """A value in an error: its repr, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
