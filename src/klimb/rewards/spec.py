"""What a recipe or a command line says after ``reward:``, made into a Reward.

::

    reward: my_reward.py:score                           a function in a file, in a process of its own
    reward: exact                                        a rule of rules.py
    reward: {numeric: {column: solution}}                a rule with options
    reward: {my_reward.py:score: {timeout: 300}}         a function with more time than 60 s a call
    reward: {code: {tests: test, timeout: 5}}            hidden tests, in the sandbox (code.py)
    reward: runs/rm/model                                the directory of a trained reward model
    reward:                                              a weighted sum
      - {reward: my_reward.py:score, weight: 1.0}
      - {reward: length, weight: -0.01, name: brevity}
    reward: {reward: runs/rm/model, normalise: running, clip: 5}
                                                         less the mean and by the std of all scores so far, within ±5
    reward: {reward: runs/prm/model, dense: true}        a model of steps, each of which is paid where it ends

Without `normalise` a reward model keeps the mean and std of its reference samples, and others the scale they have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from klimb.errors import RewardError, did_you_mean, nearest
from klimb.rewards.code import parse_code
from klimb.rewards.combine import Part, WeightedSum
from klimb.rewards.function import START_TIMEOUT, TIMEOUT, FunctionReward, from_callable, from_file
from klimb.rewards.normalise import Normalised
from klimb.rewards.process import WorkerProcess
from klimb.rewards.protocol import Reward
from klimb.rewards.rules import RULES, format, parse_rule, regex, rule_function

ModelLoader = Callable[..., Reward]
NAMES = (*RULES, "code")
KNOWN = f"known: my_reward.py:NAME, {', '.join(NAMES)}, a reward model's directory, a weighted list of these"


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
    if isinstance(spec, dict):
        return reward_files(spec["reward"] if "reward" in spec else next(iter(spec), None))
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
    if _is_function(spec):
        return _function(spec, options)
    if spec in RULES:
        return _rule(spec, options)
    if spec == "code":
        return parse_code(options)
    if spec.endswith(".py"):
        raise RewardError("a file without the name of a function", where=spec, fix=f"write {spec}:NAME")
    if Path(spec).is_dir() or spec.count("/") == 1:
        if options:
            raise RewardError(f"a reward model takes no options, not {sorted(options)}", where=spec,
                              fix=f"write {{reward: {spec}, normalise: running, clip: 5}}")  # fmt: skip
        if model_loader is None:
            raise RewardError("a reward model cannot be used here", where=spec, fix="use a function or a rule")
        return model_loader(spec)
    close = nearest(spec, NAMES)
    raise RewardError(f"unknown reward {spec!r}", fix=f"did you mean {close!r}? {KNOWN}" if close else KNOWN)


def _is_function(spec: str) -> bool:
    return ".py:" in spec


def _function(spec: str, options: dict[str, Any]) -> FunctionReward:
    for option in options:
        if option != "timeout":
            raise RewardError(f"unknown option {option!r}", where=spec, fix="known: timeout")
    timeout = options.get("timeout", TIMEOUT)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise RewardError(f"timeout is {timeout!r}", where=spec, fix="give the seconds of one call, above 0")
    return from_file(spec, timeout=float(timeout))


def _rule(name: str, options: dict[str, Any]) -> FunctionReward:
    """A rule with a pattern gets a process: on some texts a pattern takes for ever, and nothing else can
    stop it.
    """
    rule = parse_rule(name, options)
    if isinstance(rule, regex) or (isinstance(rule, format) and rule.pattern):
        target = json.dumps({name: options})
        return FunctionReward(name, f"reward {name}", lambda: WorkerProcess(target, START_TIMEOUT), TIMEOUT)
    return from_callable(rule_function(rule), name=name)


def _weighted_sum(
    specs: Sequence[Any], model_loader: ModelLoader | None, running: list[Normalised] | None
) -> WeightedSum:
    parts: list[Part] = []
    try:
        for spec in specs:
            parts.append(_part(spec, model_loader, running))
        return WeightedSum(parts)
    except BaseException:
        for part in parts:
            part.reward.close()
        raise


def _part(spec: Any, model_loader: ModelLoader | None, running: list[Normalised] | None) -> Part:
    if not isinstance(spec, dict) or "reward" not in spec:
        spec = {"reward": spec}
    known = ("reward", "weight", "name", "normalise", "clip", "dense")
    for key in spec:
        if key not in known:
            raise RewardError(f"unknown key {key!r} in a weighted reward", fix=did_you_mean(str(key), known))
    where = f"reward {spec['reward']}"
    if isinstance(spec["reward"], list | tuple) or (isinstance(spec["reward"], dict) and "reward" in spec["reward"]):
        raise RewardError("a sum within a sum", where="reward", fix="put all parts into one list")
    weight, clip = spec.get("weight", 1.0), spec.get("clip")
    if not _is_number(weight):
        raise RewardError(f"weight is {weight!r}", where=where, fix="give a finite number")
    if clip is not None and not (_is_number(clip) and clip > 0):
        raise RewardError(f"clip is {clip!r}", where=where, fix="give the largest score that counts, above 0")
    follows = _follows_training(spec.get("normalise"), where, running)
    if spec.get("dense", False) is not False:
        reward = _by_steps(spec, where, model_loader, trained=running is not None)
    else:
        reward = parse_reward(spec["reward"], model_loader=model_loader)
    if follows or clip is not None:
        reward = Normalised(reward, running=follows, clip=clip)
        if running is not None and follows:
            running.append(reward)
    return Part(str(spec.get("name", reward.name)), reward, float(weight))


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
