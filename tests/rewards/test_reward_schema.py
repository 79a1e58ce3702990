"""JSON in a form, against an independent implementation."""

import json
import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.errors import RewardError
from klimb.rewards.spec import parse_reward
from klimb.rewards.verifiers.schema import TYPES, fits, json_schema

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, -2.0]) | st.text("ab", max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3)
)
SMALL = st.integers(0, 3)


def schemas(inner: st.SearchStrategy) -> st.SearchStrategy:
    keywords = {
        "type": st.sampled_from([*TYPES]) | st.lists(st.sampled_from([*TYPES]), min_size=1, max_size=2, unique=True),
        "enum": st.lists(VALUES, min_size=1, max_size=3),
        "const": VALUES,
        "properties": st.dictionaries(st.sampled_from("xyz"), inner, max_size=2),
        "required": st.lists(st.sampled_from("xyz"), max_size=2, unique=True),
        "additionalProperties": st.booleans(),
        "items": inner,
        "anyOf": st.lists(inner, min_size=1, max_size=2),
        "minimum": SMALL, "maximum": SMALL, "exclusiveMinimum": SMALL, "exclusiveMaximum": SMALL,
        "minItems": SMALL, "maxItems": SMALL, "minLength": SMALL, "maxLength": SMALL,
    }  # fmt: skip
    some = st.lists(st.sampled_from([*keywords]), max_size=3, unique=True)
    return some.flatmap(lambda keys: st.fixed_dictionaries({key: keywords[key] for key in keys}))


@settings(max_examples=300, deadline=None)
@given(VALUES, st.recursive(st.booleans() | st.just({}), schemas, max_leaves=4))
def test_it_agrees_with_jsonschema(value: object, schema: object) -> None:
    assert fits(value, schema) == jsonschema.Draft202012Validator(schema).is_valid(value)


EDGES = [
    ({"minimum": 2}, [1.9, 2, "x"], [False, True, True]),
    ({"maximum": 2}, [2, 2.1], [True, False]),
    ({"exclusiveMinimum": 2}, [2, 2.1], [False, True]),
    ({"exclusiveMaximum": 2}, [1.9, 2], [True, False]),
    ({"minItems": 1}, [[], [0], ""], [False, True, True]),
    ({"maxItems": 1}, [[0], [0, 0]], [True, False]),
    ({"minLength": 1}, ["", "a", []], [False, True, True]),
    ({"maxLength": 1}, ["a", "ab"], [True, False]),
    ({"const": 1}, [1, 1.0, True, "1"], [True, True, False, False]),
    ({"const": [0, {"x": False}]}, [[0, {"x": False}], [0, {"x": 0}], [False, {"x": False}]], [True, False, False]),
    ({"enum": [True, "a"]}, [True, 1, "a", "b"], [True, False, True, False]),
    ({"type": "integer"}, [1, 1.0, 1.5, True], [True, True, False, False]),
    ({"type": ["null", "number"]}, [None, 1.5, "x", False], [True, True, False, False]),
    ({"anyOf": [{"type": "null"}, {"minimum": 2}]}, [None, 2, 1], [True, True, False]),
    ({"items": {"type": "string"}}, [[], ["a"], ["a", 1]], [True, True, False]),
    ({"properties": {"x": {"type": "null"}}, "additionalProperties": False},
     [{}, {"x": None}, {"x": 1}, {"y": None}], [True, True, False, False]),
    ({"required": ["x"]}, [{"x": None}, {}, 3], [True, False, True]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "values", "valid"), EDGES)
def test_the_edge_of_each_keyword(schema: dict, values: list, valid: list[bool]) -> None:
    assert [fits(value, schema) for value in values] == valid
    assert [jsonschema.Draft202012Validator(schema).is_valid(value) for value in values] == valid


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('Here:\n```json\n{"name": "Ada"}\n```', 1.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"name": "Ada", "age": true}', 0.0),
        ('{"age": 36}', 0.0),
        ('{"name": "Ada", "x": 1}', 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ('{"name": "Ada"} and more', 0.0),
        ("{'name': 'Ada'}", 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_completions(text: str, score: float) -> None:
    assert json_schema(schema=PERSON).score(text) == score


def test_any_json_and_a_schema_a_row() -> None:
    assert json_schema().score("[1, 2]") == 1.0
    assert json_schema().score("1, 2") == 0.0
    assert json_schema().score("[NaN]") == 0.0
    rule = json_schema(column="form")
    assert rule.score("[1]", {"type": "array"}) == 1.0
    assert rule.score("[1]", '{"type": "object"}') == 0.0
    assert rule.score("[1]", None) is None
    with pytest.raises(ValueError, match="unknown type 'list'"):
        rule.score("[1]", {"type": "list"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"requred": ["x"]}}, "keyword 'requred' of JSON Schema is not known here; did you mean 'required'"),
        ({"schema": {"items": {"pattern": "a+"}}}, "keyword 'pattern'"),
        ({"schema": {"type": "strin"}}, "unknown type 'strin'; did you mean 'string'"),
        ({"schema": {"enum": "a"}}, "enum is 'a': a list is wanted"),
        ({"schema": {"minimum": "3"}}, "minimum is '3': a number is wanted"),
        ({"schema": {"additionalProperties": {}}}, "true or false is wanted"),
        ({"schema": {"properties": {"x": 3}}}, "3 is no JSON schema"),
        ({"schema": {}, "column": 3}, "column is 3"),
        ({"schema": {"type": "null"}, "column": "form"}, "`schema` or `column`"),
        ({"schema": "person.json"}, "schema is 'person.json'"),
    ],
)
def test_a_schema_outside_the_subset_is_refused(options: dict, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        parse_reward({"json_schema": options})
    assert "\n" not in str(caught.value)


def test_a_megabyte_is_bounded_in_time() -> None:
    rule, started = json_schema(schema={"items": {"enum": [1, 2, 3]}}), time.process_time()
    assert rule.score(json.dumps([1] * 100_000)) == 1.0
    for text in ('{"a":' * 200_000, '"' * 1_000_000, "[1," * 300_000, " " * 1_000_000, "`" * 1_000_000):
        assert rule.score(text) == 0.0
    assert time.process_time() - started < 5.0  # 0.5 s when it was written
