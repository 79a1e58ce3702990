"""Typed configuration: YAML and `a.b.c=value` in, one frozen value out; a key that means nothing is an error.

    config = load_config(GrpoConfig, {"lr": "1e-6"}, ["algorithm.kl.beta=0.1"], where="my.yaml")
    load_config(GrpoConfig, parse_yaml(dump_config(config))) == config

YAML is read by the rules of version 1.2: `1e-6` is a number, and `no`, `on`, `010` and `2024-01-01` are text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from klimb.config_errors import one_line_each, shown
from klimb.errors import ConfigError, did_you_mean


class StageConfig(BaseModel):
    """Base of every config and of its sections. A number may be written as text (`"1e-6"`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


Config = TypeVar("Config", bound=BaseModel)


def load_config(
    cls: type[Config], values: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config"
) -> Config:
    """`values` of the file `where`, changed by the `overrides` of the command line, as a `cls`.

    Raises ConfigError with one line for each problem: file, key, what was expected, what was there.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected `key: value` lines, got {shown(values)}", where=where)
    merged = _copied(values)
    changed = [apply_override(merged, override) for override in overrides]
    try:
        return cls.model_validate(merged)
    except ValidationError as error:
        problems = one_line_each(cls, merged, error)
    lines = []
    for path, what in problems:
        on_command_line = any(path[: len(key)] == key for key in changed)
        lines.append(f"{'command line' if on_command_line else where}: {what}")
    raise ConfigError("\n".join(dict.fromkeys(lines)))


def _copied(values: Any) -> Any:
    """Of the sections, which overrides change; what stands in them is left as it is, rows and functions too."""
    return {key: _copied(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def apply_override(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets the dotted key of `key=value` in `values`; returns its path.

    A text in the way is the name of what is changed: `algorithm: grpo` and `algorithm.kl.beta=0` make
    `algorithm: {name: grpo, kl: {beta: 0}}`.
    """
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"expected key=value, got {override!r}", where="command line")
    section = values
    for depth, part in enumerate(path[:-1]):
        inner = section.get(part)
        if isinstance(inner, str):
            inner = {"name": inner}
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            above = ".".join(path[: depth + 1])
            problem = f"{above!r} is {shown(inner)}, it has no keys of its own"
            raise ConfigError(problem, where=f"command line: {key}")
        section[part] = inner
        section = inner
    section[path[-1]] = parse_value(text, where=f"command line: {key}")
    return path


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, and a key given twice is an error: one of the two would be ignored without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever version 1.1 or 1.2 would not read back as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        rare_break = any(character in data for character in "\r\x85\u2028\u2029\ufeff")
        style = '"' if rare_break else None  # elsewhere they would come back as other breaks
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


_SCALARS: list[tuple[str, str, list[str]]] = [  # tag, pattern, first characters
    ("merge", r"<<", ["<"]),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
]
_Loader.yaml_implicit_resolvers = {}  # forgets the rules of 1.1
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first)


def parse_yaml(text: str, where: str = "config") -> Any:
    """The value of a YAML text. Raises ConfigError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError("not YAML", where=place, why=getattr(error, "problem", None) or error) from None


def parse_value(text: str, where: str = "command line") -> Any:
    """The value of one `key=value`: `0.1`, `true`, `[1, 2]`, `{beta: 0}`, else text."""
    try:
        return parse_yaml(text, where)
    except ConfigError as error:
        raise ConfigError(f"{error}", fix=f"""if it is text, quote it twice: '"{text}"'""") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [file.name for file in path.parent.glob("*.y*ml")]
        raise ConfigError("no such file", where=path, fix=did_you_mean(path.name, near) if near else "") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot be read", where=path, why=error) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"expected `key: value` lines, got {shown(values)}", where=path)
    return values


def dump_config(config: BaseModel | Mapping[str, Any]) -> str:
    """YAML that loads back to the same config, and whose dump is the same text."""
    values = plain(config)
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)
    return text


def plain(config: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The config as dicts, lists, text, numbers and None."""
    return config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)


def config_hash(config: BaseModel | Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> str:
    """What a run is known by: SHA-256 over its resolved config, less `out`, and the hashes of its inputs."""
    values = {key: value for key, value in plain(config).items() if key != "out"}
    text = json.dumps([values, dict(inputs or {})], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, one line for each key: `optimizer.lr: 1e-06 → 2e-06`."""
    before, after = dict(_leaves(old)), dict(_leaves(new))

    def side(leaves: dict[str, Any], key: str) -> str:
        return shown(leaves[key]) if key in leaves else "(none)"

    changed = [key for key in {**before, **after} if key != "out"]
    changed = [key for key in changed if side(before, key) != side(after, key) or before[key] != after[key]]
    return [f"{key}: {side(before, key)} → {side(after, key)}" for key in changed]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ---------------------------------------------------------------- recipes


class Recipe(NamedTuple):
    """A YAML file of named stages."""

    name: str
    path: Path
    values: dict[str, Any]


def load_recipe(name: str, kind: str = "recipe") -> Recipe:
    """A recipe (or kind="task") by its path, or by its name when klimb ships it; a path that exists wins."""
    path = Path(name)
    if not path.is_file():
        shipped = shipped_recipes(kind)
        if name not in shipped and path.suffix in (".yaml", ".yml"):
            load_yaml(path)  # says what is wrong with the path
        if name not in shipped:
            raise ConfigError(f"no {kind} {name!r}", fix=did_you_mean(name, shipped))
        path = shipped[name]
    return Recipe(path.stem, path, load_yaml(path))


def shipped_recipes(kind: str = "recipe") -> dict[str, Path]:
    """The recipes (or kind="task") that come with klimb: in an installed package, else in a source tree."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        if folder.is_dir():
            files = (folder / "tasks" if kind == "task" else folder).glob("*.yaml")
            return {path.stem: path for path in sorted(files)}
    return {}


REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def find_references(value: Any) -> list[str]:
    """The `stage.key` of every `${stage.key}` in a value and all that it holds."""
    found: list[str] = []
    map_text(value, lambda text: found.extend(REFERENCE.findall(text)))
    return found


def resolve_references(value: Any, results: Mapping[str, Mapping[str, Any]], where: str = "config") -> Any:
    """`value` with each `${stage.key}` replaced by that result of an earlier stage.

    A text that is one reference becomes the result itself, be it a number, a list or None.
    """

    def resolve(text: str) -> Any:
        if whole := REFERENCE.fullmatch(text):
            return _look_up(whole[1], results, where)
        resolved = REFERENCE.sub(lambda match: str(_look_up(match[1], results, where)), text)
        if "${" in REFERENCE.sub("", text):
            raise ConfigError(f"'${{' without its '}}' in {text!r}", where=where)
        return resolved

    return map_text(value, resolve)


def _look_up(reference: str, results: Mapping[str, Mapping[str, Any]], where: str) -> Any:
    stage, *keys = reference.strip().split(".")
    shown = f"${{{reference}}}"
    if not keys:
        raise ConfigError(f"{shown} names no key", where=where, fix="write ${stage.key}, e.g. ${sft.model}")
    if stage not in results:
        fix = f"{did_you_mean(stage, results)} (a stage can use the results of earlier stages only)"
        raise ConfigError(f"no result of a stage {stage!r} for {shown}", where=where, fix=fix)
    value: Any = results[stage]
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            known = value if isinstance(value, Mapping) else ()
            raise ConfigError(f"{shown}: the result has no {key!r}", where=where, fix=did_you_mean(key, known))
        value = value[key]
    return value


def map_text(value: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [map_text(inner, change) for inner in value]
    return value


def parse_seeds(value: int | str | Sequence[int]) -> list[int]:
    """`3` → [3]; `"0..4"` → [0, 1, 2, 3, 4]; `"0,2,5"` and a list likewise."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [seed for item in value for seed in parse_seeds(item)]
    seeds: list[int] = []
    for part in str(value).split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", part)
        if not span or int(span[2] or span[1]) < int(span[1]):
            raise ConfigError(f"seed: expected 0, 0..4 or 0,2,5, got {value!r}")
        seeds.extend(range(int(span[1]), int(span[2] or span[1]) + 1))
    return list(dict.fromkeys(seeds))
