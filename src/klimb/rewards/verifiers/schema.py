"""JSON in a given form, checked by a subset of JSON Schema of our own.

The `jsonschema` package would be a dependency for what is a page of code, follows references over the network in older
versions, and runs the schema's patterns on the policy's text. What is not in the subset is refused when the reward is
made, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from klimb.errors import RewardError, did_you_mean
from klimb.rewards.code import code_of

MAX_JSON = 1_000_000
"""Characters; more is wrong without being read."""


@dataclass(frozen=True, slots=True)
class json_schema:
    """1 where the completion, or its last fenced block, is JSON that fits the schema.

    Of JSON Schema: type, enum, const, properties, required, additionalProperties (true or false), items, minItems,
    maxItems, minLength, maxLength, minimum, maximum, exclusiveMinimum, exclusiveMaximum, anyOf. Without a schema any
    JSON will do.
    """

    schema: Annotated[dict[str, Any], "the schema"] = field(default_factory=dict)
    column: Annotated[str, "column of the schemas, where each row has its own"] = ""

    def __post_init__(self) -> None:
        if self.schema and self.column:
            raise RewardError("`schema` or `column` is wanted, not both", where="reward json_schema")
        try:
            check_schema(self.schema)
        except ValueError as error:
            raise RewardError(str(error), where="reward json_schema") from error

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if self.column else ()

    def score(self, text: str, *columns: Any) -> float | None:
        schema: Any = self.schema
        if self.column:
            if columns[0] is None:
                return None
            schema = json.loads(columns[0]) if isinstance(columns[0], str) else columns[0]
            check_schema(schema)
        try:
            value = json.loads(_candidate(text), parse_constant=_refused)
        except (ValueError, RecursionError):
            return 0.0
        return float(fits(value, schema))


def _candidate(text: str) -> str:
    bare = text.strip()
    if len(bare) > MAX_JSON:
        raise ValueError("too long")
    return bare if bare[:1] in ("{", "[", '"') else code_of(bare)


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


TYPES: dict[str, Any] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and value == value // 1,
}
SIZES: dict[str, Any] = {
    "minItems": (list, lambda size, bound: size >= bound), "maxItems": (list, lambda size, bound: size <= bound),
    "minLength": (str, lambda size, bound: size >= bound), "maxLength": (str, lambda size, bound: size <= bound),
}  # fmt: skip
BOUNDS: dict[str, Any] = {
    "minimum": lambda value, bound: value >= bound, "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound, "exclusiveMaximum": lambda value, bound: value < bound,
}  # fmt: skip
NOTES = ("title", "description", "default", "examples", "$schema", "$id", "$comment")
KEYWORDS = ("type", "enum", "const", "properties", "required", "additionalProperties", "items", "anyOf",
            *SIZES, *BOUNDS, *NOTES)  # fmt: skip


def check_schema(schema: Any) -> None:
    """Raises ValueError for what is no schema, or not in the subset."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{schema!r} is no JSON schema: write a mapping")
    for key, value in schema.items():
        if key not in KEYWORDS:
            raise ValueError(f"the keyword {key!r} of JSON Schema is not known here; {did_you_mean(key, KEYWORDS)}")
        listed = isinstance(value, list)
        if key in ("enum", "anyOf", "required") and not listed:
            raise ValueError(f"{key} is {value!r}: a list is wanted")
        if key in (*SIZES, *BOUNDS) and not _is_number(value):
            raise ValueError(f"{key} is {value!r}: a number is wanted")
    for name in _types(schema):
        if name not in TYPES:
            raise ValueError(f"unknown type {name!r}; {did_you_mean(str(name), TYPES)}")
    extra = schema.get("additionalProperties", True)
    if not isinstance(extra, bool):
        raise ValueError(f"additionalProperties is {extra!r}: true or false is wanted")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise ValueError(f"properties is {properties!r}: a mapping is wanted")
    for inner in [*properties.values(), *schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]:
        check_schema(inner)


def fits(value: Any, schema: Any) -> bool:
    """Whether `value`, as json.loads gives it, is valid under a schema that `check_schema` accepts."""
    if isinstance(schema, bool):
        return schema
    types = _types(schema)
    if types and not any(TYPES[name](value) for name in types):
        return False
    if "enum" in schema and not any(_same(value, each) for each in schema["enum"]):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(fits(value, each) for each in schema["anyOf"]):
        return False
    if _is_number(value) and not all(within(value, schema[key]) for key, within in BOUNDS.items() if key in schema):
        return False
    for key, (kind, within) in SIZES.items():
        if key in schema and isinstance(value, kind) and not within(len(value), schema[key]):
            return False
    if isinstance(value, list) and "items" in schema:
        return all(fits(entry, schema["items"]) for entry in value)
    return not isinstance(value, dict) or _object_fits(value, schema)


def _object_fits(value: dict[str, Any], schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties", {})
    return (
        all(name in value for name in schema.get("required", []))
        and (schema.get("additionalProperties", True) or value.keys() <= properties.keys())
        and all(fits(entry, properties[name]) for name, entry in value.items() if name in properties)
    )


def _types(schema: Mapping[str, Any]) -> list[Any]:
    named = schema.get("type", [])
    return named if isinstance(named, list) else [named]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 is 1.0, and true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
