"""What a recipe or a command line says after ``reward:``, made into a Reward.

::

    reward: my_reward.py:score                           a function in a file, in a process of its own
    reward: exact                                        a rule of rules.py
    reward: {numeric: {column: solution}}                a rule with options
    reward: {my_reward.py:score: {timeout: 300}}         a function with more time than 60 s a call
    reward: {my_reward.py:score: {independent: true}}    its score of a row depends on no other row: it is called with
                                                         single groups in any order, while others are generated
    reward: {code: {tests: test, timeout: 5}}            hidden tests, in the sandbox (code.py)
    reward: {judge: {url: "https://host/v1", model: NAME, rubric: "Is it kind?"}}  a model that judges (judge/)
    reward: runs/rm/model                                the directory of a trained reward model
    reward: {ensemble: {models: [runs/rm-1/model, runs/rm-2/model], combine: min}}     several of them (ensemble.py)
    reward:                                              a weighted sum
      - {reward: my_reward.py:score, weight: 1.0}
      - {reward: length, weight: -0.01, name: brevity}
    reward: {reward: runs/rm/model, normalise: running, clip: 5}
                                                         less the mean and by the std of all scores so far, within ±5
    reward: {reward: runs/prm/model, dense: true}        a model of steps, each of which is paid where it ends
    reward: {http: {url: "http://scores:8000/score"}}    a server (remote.py)
    reward: {product: [numeric, {format: {tags: [think, answer]}}]}
    reward: {gate: {when: {format: {tags: [think, answer]}}, then: {regex: {pattern: '<answer>(.*?)</answer>'}},
                    else: 0}}                            `then` where `when` is above 0 (or `above`); null: no score
    reward: {route: {column: source, to: {math: numeric, code: {code: {tests: test}}}}}
                                                         by a column of the data

Parts of mixtures are rewards themselves, mixtures too (a list is a sum), or {reward: …, normalise: …, clip: …}; with a
`name` where they have none from a route, and with a `weight` in sums and routes.

Without `normalise` a reward model keeps the mean and std of its reference samples, and others the scale they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from klimb.errors import RewardError, did_you_mean, nearest
from klimb.rewards.catalogue import FUNCTION, KNOWN, MIXTURES, MODEL, NAMES, SOURCES, SUM, Asked, ModelLoader
from klimb.rewards.catalogue import options_of as _options_of
from klimb.rewards.combine import Gate, Part, Product, Route, WeightedSum
from klimb.rewards.function import from_callable
from klimb.rewards.normalise import Normalised
from klimb.rewards.protocol import Reward


def parse_reward(
    spec: Any, *, model_loader: ModelLoader | None = None, running: list[Normalised] | None = None
) -> Reward:
    """The Reward that `spec` means: text, a mapping or a list as in a recipe, a callable, or a Reward as it
    is.

    `model_loader` makes a Reward of the directory (or hub name) of a trained reward model. `running` takes
    what follows the training, in the order of the spec, for its checkpoints; where nothing is trained it is
    None and such parts are refused. Starts the processes of functions from files, so that what is wrong
    with them is said now. Raises RewardError.
    """
    if isinstance(spec, list | tuple):
        return _weighted_sum(spec, model_loader, running)
    if isinstance(spec, dict) and "reward" in spec:
        return _weighted_sum([spec], model_loader, running)
    if isinstance(spec, dict):
        if len(spec) != 1:
            raise RewardError(
                f"a reward with options is one name and its options, not the keys {sorted(map(str, spec))}",
                fix="write {exact: {column: answer}}, or a list of {reward: …, weight: …} for a sum",
            )
        [(name, options)] = spec.items()
        if name in MIXTURES:
            return _mixture(str(name), options, model_loader, running)
        if options is not None and not isinstance(options, dict):
            close = nearest(str(name), MIXTURES)
            fix = f"did you mean {close!r}?" if close else "write {exact: {column: answer}}"
            raise RewardError(f"{name} with {options!r}, which are no options", fix=fix)
        return _named(str(name), dict(options or {}), model_loader)
    if isinstance(spec, str):
        return _named(spec, {}, model_loader)
    if callable(spec):
        return spec if hasattr(spec, "close") and hasattr(spec, "name") else from_callable(spec)
    raise RewardError(f"{spec!r} is no reward", fix=KNOWN)


def reward_files(spec: Any) -> list[Path]:
    """The files and directories that the scores depend on, for hashes. Starts nothing and reads nothing."""
    if isinstance(spec, list | tuple):
        return [path for part in spec for path in reward_files(part)]
    if isinstance(spec, dict) and "reward" in spec:
        return reward_files(spec["reward"])
    if isinstance(spec, dict):
        return [path for name, options in spec.items() for path in reward_files([name, *_within(name, options)])]
    if not isinstance(spec, str) or spec in NAMES:
        return []
    path = Path(spec.rpartition(":")[0] if _is_function(spec) else spec)
    return [path] if path.exists() else []


def asks_for_steps(spec: Any) -> bool:
    """Does a reward, or a part of one, say ``dense: true``?"""
    if isinstance(spec, list | tuple):
        return any(map(asks_for_steps, spec))
    return isinstance(spec, dict) and spec.get("dense") is True


def _named(spec: str, options: dict[str, Any], model_loader: ModelLoader | None) -> Reward:
    form = spec if spec in NAMES else FUNCTION if _is_function(spec) else ""
    if not form and spec.endswith(".py"):
        raise RewardError("a file without the name of a function", where=spec, fix=f"write {spec}:NAME")
    if not form and (Path(spec).is_dir() or spec.count("/") == 1):
        form = MODEL
    if not form:
        close = nearest(spec, NAMES)
        raise RewardError(f"unknown reward {spec!r}", fix=f"did you mean {close!r}? {KNOWN}" if close else KNOWN)
    return SOURCES[form].open(options, Asked(spec, partial(parse_reward, model_loader=model_loader), model_loader))


def _is_function(spec: str) -> bool:
    return ".py:" in spec


def _within(name: Any, options: Any) -> Sequence[Any]:
    """What the options of `name` hold of rewards and files."""
    source = SOURCES.get(name) if isinstance(name, str) else None
    return source.within(options) if source is not None and isinstance(options, dict | list | tuple) else ()


# Mixtures -------------------------------------------------------------------------------------------------------------


def _weighted_sum(specs: Sequence[Any], model_loader: ModelLoader | None, running: list[Normalised] | None) -> Reward:
    return _built(WeightedSum, "sum", specs, model_loader, running)


def _mixture(name: str, options: Any, model_loader: ModelLoader | None, running: list[Normalised] | None) -> Reward:
    where, specs = f"reward {name}", options
    make: Callable[[list[Part]], Reward] = Product
    if name == "product" and not isinstance(options, list | tuple):
        raise RewardError(f"{options!r} is no list", where=where, fix="write {product: [exact, length]}")
    if name == "gate":
        _has_keys(options, where, needed=("when", "then", "else"), others=("above",))
        otherwise, above = options["else"], options.get("above", 0.0)
        if not (otherwise is None or _is_number(otherwise)) or not _is_number(above):
            raise RewardError(f"else is {otherwise!r} and above is {above!r}", where=where,
                              fix="give numbers; else: null leaves what does not pass without a score")  # fmt: skip
        specs = [options["when"], options["then"]]
        make = lambda parts: Gate(*parts, otherwise=otherwise, above=above)  # noqa: E731
    if name == "route":
        _has_keys(options, where, needed=("column", "to"))
        column, to = options["column"], options["to"]
        if not isinstance(column, str) or not isinstance(to, dict):
            raise RewardError(f"column is {column!r} and to is {to!r}", where=where,
                              fix="write {route: {column: source, to: {math: numeric, code: code}}}")  # fmt: skip
        named = [part if isinstance(part, dict) and "reward" in part else {"reward": part} for part in to.values()]
        for value, part in zip(to, named):
            if "name" in part:
                raise RewardError(f"{value} has the name {part['name']!r}, too", where=where, fix="leave `name` out")
        specs = [{**part, "name": value} for value, part in zip(to, named)]
        make = lambda parts: Route(column, parts)  # noqa: E731
    return _built(make, name, specs, model_loader, running)


def _has_keys(options: Any, where: str, *, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> None:
    given = options if isinstance(options, dict) else {}
    for key in given:
        if key not in (*needed, *others):
            raise RewardError(f"unknown key {key!r}", where=where, fix=did_you_mean(str(key), (*needed, *others)))
    for key in needed:
        if key not in given:
            raise RewardError(f"without {key!r}", where=where, fix=f"it needs {', '.join(needed)}")


def _built(
    make: Callable[[list[Part]], Reward], kind: str, specs: Sequence[Any], model_loader: ModelLoader | None,
    running: list[Normalised] | None,
) -> Reward:  # fmt: skip
    parts: list[Part] = []
    try:
        for spec in specs:
            parts.append(_part(spec, kind, model_loader, running))
        return make(parts)
    except BaseException:
        for part in parts:
            part.reward.close()
        raise


def _part(spec: Any, kind: str, model_loader: ModelLoader | None, running: list[Normalised] | None) -> Part:
    if not isinstance(spec, dict) or "reward" not in spec:
        spec = {"reward": spec}
    options = [option.name for option in _options_of(SOURCES[SUM].options)]
    where_known = {"weight": ("sum", "route"), "dense": ("sum",)}
    known = [name for name in options if kind in where_known.get(name, (kind,))]
    for key in spec:
        if key not in known:
            raise RewardError(f"unknown key {key!r} in a {_KINDS[kind]}", fix=did_you_mean(str(key), known))
    where = f"reward {spec['reward']}"
    within = isinstance(spec["reward"], dict) and "reward" in spec["reward"]
    if within or (kind == "sum" and isinstance(spec["reward"], list | tuple)):
        raise RewardError("a sum within a sum", where="reward", fix="put all parts into one list")
    if kind != "sum" and asks_for_steps(spec["reward"]):
        raise RewardError(f"dense: true within a {_KINDS[kind]}", where=where, why="that gives whole scores, no steps",
                          fix="leave dense out, or give a sum alone")  # fmt: skip
    weight, clip = spec.get("weight", 1.0), spec.get("clip")
    if not _is_number(weight):
        raise RewardError(f"weight is {weight!r}", where=where, fix="give a finite number")
    if clip is not None and not (_is_number(clip) and clip > 0):
        raise RewardError(f"clip is {clip!r}", where=where, fix="give the largest score that counts, above 0")
    follows = _follows_training(spec.get("normalise"), where, running)
    if spec.get("dense", False) is not False:
        reward = _by_steps(spec, where, model_loader, trained=running is not None)
    else:
        reward = parse_reward(spec["reward"], model_loader=model_loader, running=running)
    if follows or clip is not None:
        reward = Normalised(reward, running=follows, clip=clip)
        if running is not None and follows:
            running.append(reward)
    return Part(str(spec.get("name", reward.name)), reward, float(weight))


_KINDS = {"sum": "weighted reward", "product": "product", "gate": "gate", "route": "route"}


def _by_steps(spec: dict[str, Any], where: str, model_loader: ModelLoader | None, trained: bool) -> Reward:
    """A model of steps that are paid where they end."""
    if spec["dense"] is not True or not isinstance(spec["reward"], str) or model_loader is None:
        raise RewardError(f"dense is {spec['dense']!r}", where=where, why="it belongs to a reward model's directory",
                          fix="write dense: true beside one of kind process, or leave it out")  # fmt: skip
    if not trained:
        raise RewardError("dense: true", where=where, why="nothing is trained on these scores, token by token",
                          fix="leave dense out")  # fmt: skip
    if {"normalise", "clip"} & spec.keys():
        raise RewardError("dense beside normalise or clip", where=where, why="its steps would not add up to the score",
                          fix="leave one of them out")  # fmt: skip
    reward = parse_reward(spec["reward"], model_loader=partial(model_loader, dense=True))
    if not getattr(reward, "dense", False):
        reward.close()
        raise RewardError("dense: it has no steps", where=where, fix="leave dense out, or give a reward model")
    return reward


def _follows_training(normalise: Any, where: str, running: list[Normalised] | None) -> bool:
    if normalise is None:
        return False
    if normalise != "running":
        raise RewardError(f"normalise is {normalise!r}", where=where, fix="write running, or leave it out")
    if running is None:
        raise RewardError(
            "normalise: running", where=where, why="nothing is trained on these scores, and figures that move would "
            "make two measurements incomparable", fix="leave normalise out",
        )  # fmt: skip
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
