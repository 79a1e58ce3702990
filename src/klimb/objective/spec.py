"""Algorithms and losses as people write them (names, and names with changes), and as they read them.

grpo
{name: grpo, surrogate: {clip: [0.2, 0.28]}, kl: {where: reward, estimator: k1, beta: 0.05}}
{name: grpo, advantage: my_file.py:centred}
my_file.py:MY_GRPO
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from klimb.objective.advantage import ADVANTAGES, NORMALISATIONS
from klimb.objective.aggregate import AGGREGATES
from klimb.objective.algorithm import Algorithm
from klimb.objective.algorithms import ALGORITHMS
from klimb.objective.critic import Critic
from klimb.objective.entropy import ENTROPY_BONUSES
from klimb.objective.importance import IMPORTANCES
from klimb.objective.kl import ESTIMATORS, KL, NO_KL
from klimb.objective.reference import REFERENCES
from klimb.objective.sampling import CURRICULA, OVERLONG, SAMPLINGS, WEIGHTINGS
from klimb.objective.surrogate import SURROGATES
from klimb.objective.tokens import IMITATIONS, TOKEN_FILTERS
from klimb.plugin import is_reference, load_attribute, unknown_name

AXES: Mapping[str, Mapping[str, Any]] = {
    "advantage": ADVANTAGES,
    "normalise": NORMALISATIONS,
    "surrogate": SURROGATES,
    "importance": IMPORTANCES,
    "aggregate": AGGREGATES,
    "sampling": SAMPLINGS,
    "overlong": OVERLONG,
    "weighting": WEIGHTINGS,
    "token_filter": TOKEN_FILTERS,
    "imitation": IMITATIONS,
    "reference": REFERENCES,
    "curriculum": CURRICULA,
    "entropy_bonus": ENTROPY_BONUSES,
}
OPTIONAL = tuple(axis for axis in AXES if axis not in ("advantage", "surrogate", "aggregate", "entropy_bonus"))


def parse_algorithm(spec: str | Mapping[str, Any] | Algorithm) -> Algorithm:
    """Out of a name, a name with changes, ``file.py:NAME``, or the value itself. Errors: ValueError."""
    if isinstance(spec, Algorithm):
        return spec
    if isinstance(spec, str):
        return _named(spec)
    if not isinstance(spec, Mapping):
        raise ValueError(f"algorithm: {spec!r} is no algorithm; known: {_names(ALGORITHMS)}, my_file.py:NAME.")
    if "name" not in spec:
        raise ValueError("algorithm: it has no name; write {name: grpo, ...}, the row that the changes start from.")
    changes = {key: value for key, value in spec.items() if key != "name"}
    known = [field.name for field in fields(Algorithm) if field.name not in ("name", "source")]
    for key in changes:
        if key not in known:
            raise unknown_name("algorithm: unknown key", key, known)
    base = _named(spec["name"])
    return replace(base, **{key: _parse_axis(key, value, base) for key, value in changes.items()})


def parse_value(where: str, spec: Any, known: Mapping[str, Any]) -> Any:
    """One value of an axis: ``name``, ``{name: arguments}``, ``file.py:NAME``, or the value itself.

    Arguments are a number, a list of them, or a mapping by name. Errors (ValueError) begin with `where`.
    """
    name, arguments = spec, None
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise ValueError(f"{where}: expected one {{name: arguments}}, got {dict(spec)}; known: {_names(known)}.")
        [(name, arguments)] = spec.items()
    elif not isinstance(spec, str):
        if callable(spec):
            return spec
        raise ValueError(f"{where}: {spec!r} is neither a name nor a function; known: {_names(known)}.")
    if is_reference(name):
        value = load_attribute(name)
    elif name in known:
        value = known[name]
    else:
        raise unknown_name(f"{where}: unknown", str(name), known)
    if isinstance(value, type):
        return _construct(f"{where}.{name}", value, arguments)
    if arguments is not None:
        raise ValueError(f"{where}: {name} takes no arguments, got {arguments!r}; write {where}: {name}.")
    if not callable(value):
        raise ValueError(f"{where}: {name} is {type(value).__name__} and cannot be called; name a function.")
    return value


def describe(algorithm: Algorithm) -> str:
    """``grpo(advantage=group_mean, β=0.15)``: the difference from the row of that name."""
    row = _columns(algorithm)
    base = ALGORITHMS.get(algorithm.name)
    usual = _columns(base) if base else {}
    changes = [f"{key}={value}" for key, value in row.items() if usual.get(key, "none") != value]
    return f"{algorithm.name}({', '.join(changes)})" if changes else algorithm.name


def algorithm_table() -> list[dict[str, str]]:
    """The rows of ALGORITHMS as text, one column an axis."""
    return [algorithm_row(algorithm) for algorithm in ALGORITHMS.values()]


def algorithm_row(algorithm: Algorithm) -> dict[str, str]:
    axes = {field.name: _label(getattr(algorithm, field.name)) for field in fields(Algorithm)}
    return {**axes, "name": algorithm.name, "source": algorithm.source}


def _named(name: str) -> Algorithm:
    if is_reference(name):
        value = load_attribute(name)
        if not isinstance(value, Algorithm):
            raise ValueError(
                f"algorithm: {name} is {type(value).__name__}, no Algorithm; write NAME = replace(GRPO, ...)."
            )
        return value
    if name not in ALGORITHMS:
        raise unknown_name("algorithm: unknown", str(name), ALGORITHMS)
    return ALGORITHMS[name]


def _parse_axis(axis: str, spec: Any, base: Algorithm) -> Any:
    where = f"algorithm.{axis}"
    if axis == "kl":
        return _parse_kl(spec, base.kl)
    if axis == "entropy_bonus" and not (callable(spec) or isinstance(spec, Mapping) or spec in ENTROPY_BONUSES):
        return _number(where, spec)
    if spec in (None, "none") and axis in (*OPTIONAL, "critic"):
        return None
    if axis == "critic":
        return spec if isinstance(spec, Critic) else _construct(where, Critic, spec)
    return parse_value(where, spec, AXES[axis])


def _parse_kl(spec: Any, base: KL) -> KL:
    """A mapping changes the named row's KL; `none` takes it away."""
    if isinstance(spec, KL):
        return spec
    if spec in (None, "none"):
        return NO_KL
    if isinstance(spec, Mapping) and spec.get("where") == "none":
        if pulls := [key for key in ("beta", "target") if spec.get(key)]:
            raise ValueError(f"algorithm.kl: where is none and {pulls[0]} is set; set where to reward or loss.")
        return NO_KL
    if not isinstance(spec, Mapping):
        raise ValueError(f"algorithm.kl: {spec!r} is no mapping; write {{where: reward, estimator: k1, beta: 0.05}}.")
    known = [field.name for field in fields(KL)]
    changes: dict[str, Any] = {}
    for key, value in spec.items():
        where = f"algorithm.kl.{key}"
        if key not in known:
            raise unknown_name("algorithm.kl: unknown key", key, known)
        if key == "estimator":
            changes[key] = parse_value(where, value, ESTIMATORS)
        else:
            changes[key] = value if key in ("where", "level") or value is None else _number(where, value)
    return replace(base, **changes)


def _construct(where: str, kind: type, arguments: Any) -> Any:
    """kind(...), with the arguments as numbers."""
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else None
    listed, named = [], {}
    if isinstance(arguments, Mapping):
        named = {key: _number(f"{where}.{key}", value) for key, value in arguments.items()}
        for key in named:
            if known is not None and key not in known:
                raise unknown_name(f"{where}: unknown argument", key, known)
    elif arguments is not None:
        given = arguments if isinstance(arguments, list | tuple) else [arguments]
        if known and len(given) > len(known):
            raise ValueError(f"{where}: takes {', '.join(known)} at most, got {len(given)} values: {given}.")
        listed = [_number(where, value) for value in given]
    try:
        return kind(*listed, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'{kind.__name__}: ')}") from None


def _number(where: str, value: Any) -> float | bool | None:
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        return float(value)  # YAML reads 3e-4 as text
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected a number, got {value!r}.") from None


def _columns(algorithm: Algorithm) -> dict[str, str]:
    """The row with the KL taken apart, so that a change of β alone reads as that."""
    row = algorithm_row(algorithm)
    kl = algorithm.kl
    parts: dict[str, str] = {"kl": kl.where}
    if kl.where != "none":
        parts |= {"estimator": _label(kl.estimator), "β": _label(kl.beta), "level": kl.level}
        parts |= {"target": _label(kl.target)} | ({"gain": _label(kl.gain)} if kl.target else {})
        parts |= {"corrected": "true"} if kl.corrected else {}
    return {k: v for k, v in row.items() if k not in ("name", "source", "kl")} | parts


def _label(value: Any) -> str:
    """clip(0.2, 0.28), group_mean, 0.15, none: as one would write it, and the same in every process."""
    if value is None:
        return "none"
    if isinstance(value, KL):
        level = ", sequence" if value.level == "sequence" else ""
        target = f", target {value.target:g}" if value.target else ""
        corrected = ", corrected" if value.corrected else ""
        text = f"{value.where} {_label(value.estimator)}{level}{corrected}, β={value.beta:g}{target}"
        return text if value.active else "none"
    if isinstance(value, int | float):
        return f"{value:g}"
    if is_dataclass(value) and not isinstance(value, type):
        shown = (getattr(value, field.name) for field in fields(value))
        arguments = ", ".join(_label(x) for x in shown if x is not None)
        return f"{type(value).__name__}({arguments})" if arguments else type(value).__name__
    return _known_name(value) or str(getattr(value, "__name__", value))


def _known_name(value: Callable[..., Any]) -> str | None:
    """The name that people type, where it is another than the function's own."""
    axes = (*AXES.values(), ESTIMATORS)
    names = (name for axis in axes for name, known in axis.items() if known is value)
    return next(names, None)


def _names(known: Mapping[str, Any]) -> str:
    return ", ".join(known)
