"""Every source of rewards: its name, what it is built from, how it is opened.

`SOURCES` is what the parser looks names up in, and what `klimb reward --list` and docs/REWARDS.md are made of. A
source's options are the fields of a class, and its page is that class's docstring; the type of a field is
``Annotated[type, "what it means"]``. A new source is a line here.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from klimb.errors import RewardError, did_you_mean, one_line
from klimb.rewards.code import Options as code
from klimb.rewards.code import parse_code
from klimb.rewards.ensemble import Combine, parse_ensemble
from klimb.rewards.function import START_TIMEOUT, TIMEOUT, FunctionReward, from_callable, from_file
from klimb.rewards.judge.reward import judge_files, make_judge
from klimb.rewards.judge.settings import JudgeConfig
from klimb.rewards.process import WorkerProcess
from klimb.rewards.protocol import Reward
from klimb.rewards.remote import Options as http
from klimb.rewards.remote import parse_http
from klimb.rewards.rules import Rule, exact, format, length, numeric, regex, rule_function
from klimb.rewards.verifiers.answers import choice, contains, f1
from klimb.rewards.verifiers.gym import gym
from klimb.rewards.verifiers.instructions import instructions
from klimb.rewards.verifiers.isolated import Isolated
from klimb.rewards.verifiers.lengths import CosineReward, cosine, repetition
from klimb.rewards.verifiers.schema import json_schema
from klimb.rewards.verifiers.sql import sql
from klimb.rewards.verifiers.symbolic import math

ModelLoader = Callable[..., Reward]


class Asked(NamedTuple):
    """What was written, beside the options."""

    name: str
    parse: Callable[[Any], Reward]
    """Of a reward within the options."""
    model_loader: ModelLoader | None


@dataclass(frozen=True)
class Source:
    """options: the class whose fields are the options. open: (options as written, Asked) → Reward. within: the rewards
    and files that options hold, whose content the scores depend on.
    """

    options: type
    open: Callable[[dict[str, Any], Asked], Reward]
    within: Callable[[Any], Sequence[Any]] = lambda options: ()


@dataclass(frozen=True, slots=True)
class function:
    """A function of yours in a process of its own: ``f(prompts, completions, **columns) -> scores``, as in TRL.

    None leaves a row out. One that hangs is killed, one that dies is replaced, and a bad row does not lose the batch.
    """

    timeout: Annotated[float, "seconds for one call, with all rows of a step"] = TIMEOUT
    independent: Annotated[bool, "a row's score depends on no other row: groups are scored as they come"] = False


@dataclass(frozen=True, slots=True)
class model:
    """The directory (or hub name) of a trained reward model: its score of prompt and completion.

    Its scale is mean 0 and standard deviation 1 on the reference samples of its training.
    """


class ensemble(NamedTuple):
    """Several reward models as one: their mean, the worst of them, or mean − λ · variance. Disagreement is logged.

    Members differ by seed or by pretraining, each on the scale saved with it (Coste et al. 2023, arXiv 2310.02743).
    """

    models: Annotated[list[str], "directories of reward models, two or more"]
    combine: Annotated[Combine, "of the members' scores"] = "mean"
    penalty: Annotated[float | None, "written `lambda`: λ of combine: uncertainty"] = None


@dataclass(frozen=True, slots=True)
class part:
    """A list of these is a weighted sum: Σ weight · score over the parts that scored the row.

    A part that abstains is left out of the row's sum, one that fails fails the row. Every part is logged by its name.
    """

    reward: Annotated[Any, "any other form"]
    weight: Annotated[float, "what its score is multiplied with"] = 1.0
    name: Annotated[str, "under which it is logged; its own where none is given"] = ""
    normalise: Annotated[Literal["running"] | None, "less the mean and by the std of all scores so far"] = None
    clip: Annotated[float | None, "the largest score, of either sign, that counts"] = None
    dense: Annotated[bool, "of a model of steps: each step is paid where it ends"] = False


@dataclass(frozen=True, slots=True)
class product:
    """Π of the parts, as ``{product: [numeric, {format: {tags: [think, answer]}}]}``; None where a part abstains.

    A row of which two factors are negative fails: two faults would make a reward.
    """


@dataclass(frozen=True, slots=True)
class gate:
    """`then` where `when` lies above a bound, `else` where it does not: format before content.

    Only the rows that pass are shown to `then`, each as a whole, tags included. As
    ``{gate: {when: {format: {tags: [think, answer]}}, then: {regex: {pattern: '<answer>(.*?)</answer>'}}, else: 0}}``.
    """

    when: Annotated[Any, "the reward that opens"]
    then: Annotated[Any, "the reward of what passes"]
    otherwise: Annotated[float | None, "written `else`: the score of what does not pass; null leaves it without one"]
    above: Annotated[float, "what the score of `when` has to exceed"] = 0.0


@dataclass(frozen=True, slots=True)
class route:
    """The reward that a column of the data names for the row; a row of another name fails.

    As ``{route: {column: source, to: {math: numeric, code: {code: {tests: test}}}}}``; parts may have a `weight`.
    """

    column: Annotated[str, "that says whose reward a row gets"]
    to: Annotated[dict[str, Any], "a reward for each value of the column"]


def _rule(options: dict[str, Any], asked: Asked, judges: bool = False) -> Reward:
    """A rule with a pattern gets a process: on some texts a pattern takes for ever, and nothing else can stop it."""
    rule = parse_rule(asked.name, options)
    if isinstance(rule, regex) or (isinstance(rule, format) and rule.pattern):
        target = json.dumps({asked.name: options})
        return FunctionReward(
            asked.name, f"reward {asked.name}", lambda: WorkerProcess(target, START_TIMEOUT), TIMEOUT,
            judges=judges, independent=True,
        )  # fmt: skip
    return from_callable(rule_function(rule), name=asked.name, judges=judges, independent=True)


def _judged(options: dict[str, Any], asked: Asked) -> Reward:
    """Its scores are verdicts: 1 is ok, anything less wrong."""
    return _rule(options, asked, judges=True)


def _isolated(options: dict[str, Any], asked: Asked) -> Reward:
    return Isolated(asked.name, built(SOURCES[asked.name].options, asked.name, options))


def _cosine(options: dict[str, Any], asked: Asked) -> Reward:
    wanted: cosine = built(cosine, asked.name, options)
    return CosineReward(wanted, asked.parse(wanted.of))


def _function(options: dict[str, Any], asked: Asked) -> Reward:
    wanted: function = built(function, asked.name, options)
    if not 0 < wanted.timeout < float("inf"):
        raise RewardError(f"timeout is {wanted.timeout!r}", where=asked.name,
                          fix="give the seconds of one call, above 0")  # fmt: skip
    return from_file(asked.name, timeout=float(wanted.timeout), independent=wanted.independent)


def _model(options: dict[str, Any], asked: Asked) -> Reward:
    if options:
        raise RewardError(f"a reward model takes no options, not {sorted(options)}", where=asked.name,
                          fix=f"write {{reward: {asked.name}, normalise: running, clip: 5}}")  # fmt: skip
    if asked.model_loader is None:
        raise RewardError("a reward model cannot be used here", where=asked.name, fix="use a function or a rule")
    return asked.model_loader(asked.name)


def _inner(options: dict[str, Any], asked: Asked) -> Reward:
    return asked.parse({asked.name: options})


FUNCTION, MODEL, SUM = "my_reward.py:NAME", "DIRECTORY", "[{reward: …}, …]"
"""Forms that are no name."""

SOURCES: dict[str, Source] = {
    FUNCTION: Source(function, _function),
    MODEL: Source(model, _model),
    "ensemble": Source(
        ensemble,
        lambda options, asked: parse_ensemble(options, asked.model_loader),
        lambda options: options.get("models") or (),
    ),
    "judge": Source(JudgeConfig, lambda options, asked: make_judge(options), judge_files),
    SUM: Source(part, _inner),
    "exact": Source(exact, _judged),
    "numeric": Source(numeric, _judged),
    "math": Source(math, _isolated),
    "f1": Source(f1, _judged),
    "contains": Source(contains, _judged),
    "choice": Source(choice, _judged),
    "code": Source(code, lambda options, asked: parse_code(options)),
    "http": Source(http, lambda options, asked: parse_http(options)),
    "regex": Source(regex, _judged),
    "format": Source(format, _judged),
    "json_schema": Source(json_schema, _judged),
    "instructions": Source(instructions, _judged),
    "sql": Source(sql, _isolated),
    "gym": Source(gym, _isolated),
    "length": Source(length, _rule),
    "repetition": Source(repetition, _rule),
    "cosine": Source(cosine, _cosine, lambda options: [options.get("of")]),
    "product": Source(product, _inner, lambda parts: parts),
    "gate": Source(gate, _inner, lambda options: [options.get("when"), options.get("then")]),
    "route": Source(route, _inner, lambda options: [*(options.get("to") or {}).values()]),
}
MIXTURES = ("product", "gate", "route")
NAMES = tuple(name for name in SOURCES if name not in (FUNCTION, MODEL, SUM))
KNOWN = f"known: my_reward.py:NAME, {', '.join(NAMES)}, a reward model's directory, a list of these"


def parse_rule(name: str, options: dict[str, Any]) -> Rule:
    """The rule `name`. Raises RewardError for an unknown name or option, naming the nearest."""
    if name not in NAMES:
        raise RewardError(f"unknown reward {name!r}", fix=did_you_mean(name, NAMES))
    rule: Rule = built(SOURCES[name].options, name, options)
    return rule


def built(kind: type, name: str, options: dict[str, Any]) -> Any:
    """A `kind` with these options. Raises RewardError for one that is unknown, missing or of another type."""
    where, hints = f"reward {name}", get_type_hints(kind)
    for option in options:
        if option not in hints:
            raise RewardError(f"unknown option {option!r}", where=where, fix=did_you_mean(option, hints))
    for known in options_of(kind):
        if known.default is None and known.name not in options:
            raise RewardError(f"an option is missing: {known.name!r}", where=where, fix=f"give {known.meaning}")
    return kind(**{option: _checked(hints[option], option, value, where) for option, value in options.items()})


def _checked(hint: Any, option: str, value: Any, where: str) -> Any:
    from pydantic import TypeAdapter, ValidationError  # only where there are options

    if get_origin(hint) is Literal and value not in get_args(hint):
        raise RewardError(f"unknown {option} {value!r}", where=where, fix=did_you_mean(str(value), get_args(hint)))
    if hint is bool and not isinstance(value, bool):
        raise RewardError(f"{option} is {value!r}", where=where, fix="write true or false")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise RewardError(f"{option} is {value!r}", where=where, why=one_line(why)) from None


# ---- what is told of them


class Option(NamedTuple):
    """default: None where the option has to be given, else as in YAML."""

    name: str
    type: str
    default: str | None
    meaning: str


class Page(NamedTuple):
    name: str
    summary: str
    text: str
    options: list[Option]


def pages() -> list[Page]:
    """What `klimb reward --list` tells, in the order of SOURCES."""
    return [_page(name, source.options) for name, source in SOURCES.items()]


def _page(name: str, kind: type) -> Page:
    text = inspect.getdoc(kind) or ""
    return Page(name, " ".join(text.partition("\n\n")[0].split()), text, options_of(kind))


def options_of(kind: type) -> list[Option]:
    if issubclass(kind, BaseModel):
        return [
            Option(name, _type_name(field.annotation), None if field.is_required() else _yaml(field.get_default()),
                   field.description or name.replace("_", " "))
            for name, field in kind.model_fields.items()
        ]  # fmt: skip
    hints, plain = get_type_hints(kind, include_extras=True), get_type_hints(kind)
    parameters = inspect.signature(kind).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return [
        Option(option, _type_name(plain[option]), _yaml(defaults[option]) if option in defaults else None,
               hint.__metadata__[0])
        for option, hint in hints.items()
    ]  # fmt: skip


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Sequence, list):
        return f"list of {_type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict or (isinstance(hint, type) and issubclass(hint, BaseModel)):
        return "mapping"
    if get_origin(hint) is tuple:
        return f"[{', '.join(map(_type_name, get_args(hint)))}]"
    if inner := get_args(hint):
        return " | ".join(_type_name(each) for each in inner)
    names = {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "none"}
    return names.get(hint, "any")


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if value is None or not isinstance(value, str | bool | int | float):
        return "none"  # also what a dataclass says of an empty mapping
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else (str(value) or '""')
