"""A recipe, before it runs: its keys, the data of each stage, its rewards on a few rows, memory, and two real steps."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from klimb.commands.check_data import SHOWN, bad_lines, write_problems
from klimb.commands.dry_run import lines_of_all, told, told_of_all
from klimb.commands.schema import config_class, stage_of
from klimb.config import load_recipe, load_yaml, shipped_recipes
from klimb.data.feedback import load_feedback
from klimb.data.formats import BadRows
from klimb.data.kinds import Detector
from klimb.data.load import load_examples, load_prompts
from klimb.data.report import Loaded
from klimb.errors import ConfigError, KlimbError
from klimb.objective.algorithms import ALGORITHMS
from klimb.objective.preference import PREFERENCE_LOSSES, needs_of, parse_preference
from klimb.rewards.protocol import Scores
from klimb.rewards.scorer import distributions, dry_run
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, say_aside, target_of
from klimb.stages.dry_run import rehearse, rehearse_recipe
from klimb.stages.evaluate import open_reward
from klimb.stages.memory import admitted
from klimb.stages.models import load_texts, prompt_room
from klimb.stages.pipeline import check_recipe, with_overrides
from klimb.stages.progress import Preparing
from klimb.stages.registry import STAGES, preview
from klimb.stages.reward import kind_of
from klimb.stages.seeds import configs_by_seed
from klimb.types import Prompt

Write = Callable[[str], None]


def check_job(words: Sequence[str], as_json: bool) -> int:
    """words: a recipe or the name of a method, perhaps a recipe behind it, then key=value. Returns the exit code.

    Raises KlimbError where a key or a value is wrong; what is wrong with data, rewards or models is told with the rest.
    """
    write: Write = (lambda line: None) if as_json else print
    method = words[0] if words[0] in (*STAGES, *ALGORITHMS, *PREFERENCE_LOSSES) else None
    rest = [*words[1:]] if method else [*words]
    recipe = rest.pop(0) if rest and "=" not in rest[0] else None
    shipped = recipe is not None and (recipe in shipped_recipes() and not Path(recipe).exists())
    values = load_recipe(recipe).values if recipe and shipped else load_yaml(Path(recipe)) if recipe else {}
    found: dict[str, Any] = {}
    try:
        if "stages" in values or shipped:
            _check_pipeline(load_recipe(str(recipe)).name, with_overrides(values, rest), found, write)
        else:
            _check_stage(method, values, rest, str(recipe or "config"), found, write)
    except _Unfit as error:
        found["error"] = str(error)
    found["fit"] = "error" not in found
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False, default=str))
    write("training would start" if found["fit"] else f"training would not start: {found['error']}")
    return int(not found["fit"])


class _Unfit(Exception):
    """What was told in full already, in a line."""


def _check_stage(
    method: str | None, values: dict[str, Any], overrides: Sequence[str], where: str, found: dict[str, Any],
    write: Write,
) -> None:  # fmt: skip
    stage = stage_of(method) if method else _guessed(values, overrides, where)
    key = {"rl": "algorithm", "preference": "loss"}.get(stage)
    if method and key and method != stage:
        values.setdefault(key, method)
    configs = configs_by_seed(stage, values, overrides, where)
    config = next(iter(configs.values()))
    named = getattr(config, key) if key else None
    name = method or (named if isinstance(named, str) and named in {**ALGORITHMS, **PREFERENCE_LOSSES} else stage)
    write(f"{where}: {stage}{f', {len(configs)} seeds' if len(configs) > 1 else ''}: klimb {name}")
    found |= {"stage": stage, "seeds": [*configs]}
    look(stage, config, found, write)
    try:
        estimate, place = rehearse(stage, configs, name=name, fresh=False, say=lambda line: None)
    except KlimbError as error:
        raise _Unfit(error) from None
    found |= {"estimate": told(estimate), "out": place}
    for line in [*estimate.lines(), f"out: {place}"]:
        write(line)


def _check_pipeline(name: str, values: Mapping[str, Any], found: dict[str, Any], write: Write) -> None:
    values = check_recipe(name, values)
    found["stages"] = {}

    def each(stage: str, kind: str, config: Any) -> None:
        write(f"── {stage} ({kind})")
        look(kind, config, found["stages"].setdefault(stage, {}), write)

    try:
        estimates, place = rehearse_recipe(name, values, say=lambda line: None, look=each)
    except KlimbError as error:
        raise _Unfit(error) from None
    found["estimate"] = told_of_all(values, estimates, place)
    write("── two steps of each stage, on what the two of the stages before it left")
    for line in lines_of_all(values, estimates, place):
        write(line)


# Which stage a file is for --------------------------------------------------------------------------------------------


def _guessed(values: Mapping[str, Any], overrides: Sequence[str], where: str) -> str:
    """The stage whose keys these are; where several have them, by the type of the data. Raises ConfigError."""
    keys = {*values, *(text.partition("=")[0].split(".")[0] for text in overrides)}
    wrong = {}
    for stage in STAGES:
        fields = config_class(stage).model_fields
        brought = getattr(config_class(stage), "from_task", ()) if "task" in keys else ()
        missing = [name for name, field in fields.items() if field.is_required() and name not in {*keys, *brought}]
        wrong[stage] = len(keys - fields.keys()) + len(missing)
    fewest = [stage for stage in wrong if wrong[stage] == min(wrong.values())]
    if len(fewest) > 1 and isinstance(values.get("data"), str):
        suited = {"preference": {"reward", "preference"}, "prompt": {"rl", "sample"}}
        fewest = [each for each in fewest if each in suited.get(_kind(values), {"sft"})] or fewest
    if len(fewest) > 1:
        fix = f"say it: klimb check {fewest[0]} {where}"
        raise ConfigError(f"which of {', '.join(fewest)} is it for?", where=where, why="its keys suit all", fix=fix)
    return fewest[0]


def _kind(values: Mapping[str, Any]) -> str:
    from klimb.data.formats import rows_of
    from klimb.data.readers import open_source

    detector = Detector()
    columns = values.get("columns")
    with suppress(KlimbError):  # what is wrong with it is told when the data is looked at
        for row in rows_of(open_source(values["data"]), columns if isinstance(columns, Mapping) else {}):
            detector.attempt(row)
            if detector.kind is not None:
                break
    return str(detector.kind)


# One stage ------------------------------------------------------------------------------------------------------------


def look(stage: str, config: Any, found: dict[str, Any], write: Write) -> None:
    """All but the two steps. Raises _Unfit after everything that can be looked at has been told."""
    problems: list[str] = []
    prompts: dict[str, Loaded[Prompt]] = {}
    try:
        for line in preview(stage, config):
            write(f"  {line}")
        found["data"] = {}
        for source in sources_of(stage, config):
            _look_at(source, found["data"], prompts, problems, write)
        if prompts:
            found["rewards"] = {}
            _look_at_rewards(config, prompts, found["rewards"], problems, write)
        if (fits := admitted(config, target_of(config), lambda line: None)) is not None:
            found["memory"] = {"peak": fits.plan.peak, "free": target_of(config).free, "lines": fits.plan.lines}
    except (KlimbError, OSError, ValueError) as error:
        problems.append(str(error))
        write(f"  ✗ {error}")
    if problems:
        raise _Unfit(problems[0].splitlines()[0])


class Source(NamedTuple):
    """Data of a stage, as the stage reads it."""

    key: str
    load: Callable[..., Loaded[Any]]
    data: Any
    options: Mapping[str, Any]


def sources_of(stage: str, config: Any) -> Iterator[Source]:
    """All that a stage will read, with the limits under which it does. Raises KlimbError where no prompt would fit."""
    if stage == "label":
        return  # its rows are looked at when it is tried, and its model may be on a server
    renderer, context = load_texts(config.model)
    typed = {key: getattr(config, key) for key in ("columns", "on_bad", "transcripts")} | {"renderer": renderer}
    if stage in ("sft", "reward", "preference"):
        limit = min(config.max_tokens or context, context)
        load: Callable[..., Loaded[Any]] = load_examples
        if stage == "reward":
            load = kind_of(config).load
        if stage == "preference":
            load = partial(load_feedback, needs_of(parse_preference(config.loss)).data)
        for key in ("data", "eval_data"):
            if getattr(config, key) is not None:
                yield Source(key, load, getattr(config, key), {**typed, "max_length": limit})
        if stage == "reward" and config.reference is not None:
            yield Source("reference", load_examples, config.reference, {**typed, "max_length": limit})
    elif stage in ("rl", "sample", "distill", "online_preference", "revise"):
        room = prompt_room(context, config.max_tokens)
        limit = min(getattr(config, "max_prompt_tokens", None) or room, room)
        yield Source("data", load_prompts, config.data, {**typed, "max_length": limit})
        if stage == "distill" and config.drawn < config.prompts_per_step:
            yield Source("demonstrations", load_examples, config.data, {**typed, "max_length": context})
    for key in ("measure", "until"):
        if (holder := getattr(config, key, None)) is not None:
            room = prompt_room(context, holder.max_tokens)
            named = {"columns": getattr(holder, "columns", {}), "renderer": renderer}
            yield Source(f"{key}.data", load_prompts, holder.data, {**named, "max_length": room})


def _look_at(
    source: Source, found: dict[str, Any], prompts: dict[str, Loaded[Any]], problems: list[str], write: Write
) -> None:
    progress = Preparing(source.key, None, say_aside)
    try:
        loaded = source.load(source.data, cache=True, progress=progress, **source.options)
    except BadRows as error:
        problems.append(f"{source.key}: {len(error.problems):,} of {error.rows:,} rows cannot be used")
        found[source.key] = {"rows": error.rows, "bad": [list(problem) for problem in error.problems]}
        file = write_problems(error.problems, str(source.data)) if len(error.problems) > SHOWN else None
        write(f"  ✗ {source.key}: {error.rows:,} rows")
        for line in bad_lines(error.problems, file):
            write(f"  {line}")
        return
    found[source.key] = loaded.report.facts()
    write(f"  {source.key}: {loaded.report}".replace("\n", "\n  "))
    lengths = loaded.report.lengths
    if "chosen" in lengths:
        longer = float((lengths["chosen"] > lengths["rejected"]).mean())
        found[source.key]["chosen is longer"] = longer
        write(f"    chosen is longer in {longer:.1%} of the pairs")
    if source.load is load_prompts:
        prompts[source.key] = loaded


# Rewards --------------------------------------------------------------------------------------------------------------


def _look_at_rewards(
    config: Any, prompts: Mapping[str, Loaded[Prompt]], found: dict[str, Any], problems: list[str], write: Write
) -> None:
    """Each on the prompts that it will judge, in a session like that of the stage."""
    judged = [(key, getattr(config, key, None), prompts.get("data")) for key in ("reward", "gold")]
    for holder in ("measure", "until"):
        for key in ("reward", "gold"):
            spec = getattr(getattr(config, holder, None), key, None)
            judged.append((f"{holder}.{key}", spec, prompts.get(f"{holder}.data")))
    seen: list[Any] = []
    renderer = load_texts(config.model)[0]
    with (
        tempfile.TemporaryDirectory() as folder,
        Run.open(Path(folder) / "run", config, {}, name="check", say=lambda line: None) as run,
    ):
        session = Session.begin(config, run, Interrupt(), lambda line: None)
        for key, spec, loaded in judged:
            if spec is None or loaded is None or spec in seen:
                continue
            seen.append(spec)
            try:
                reward = open_reward(spec, session, renderer, [])
                shown = dry_run(reward, loaded.items)
                compared = distributions(reward, loaded.items[:_FIRST])
            except KlimbError as error:
                problems.append(str(error))
                write(f"  ✗ {key}: {error}")
                continue
            found[key] = {"rows": shown.lines(), **{kind: _spread(scores) for kind, scores in compared.items()}}
            for line in [*shown.lines(), *_compared_lines(found[key], compared)]:
                write(f"  {key}: {line}")


_FIRST = 512
"""Prompts among which reference answers are looked for."""


def _spread(scores: Scores) -> dict[str, Any]:
    values = sorted(value for value in scores.values if value is not None)
    facts: dict[str, Any] = {"rows": len(scores.values), "failed": len(scores.failures)}
    facts["abstained"] = len(scores.values) - len(values) - facts["failed"]
    facts["verdicts"] = {ending: n for ending, n in (scores.counts or scores.endings()).items() if n}
    if values:
        facts |= {"mean": statistics.fmean(values), "std": statistics.pstdev(values), "least": values[0],
                  "half": values[len(values) // 2], "most": values[-1]}  # fmt: skip
    return facts


def _compared_lines(found: Mapping[str, Any], compared: Mapping[str, Scores]) -> Iterator[str]:
    for kind, scores in compared.items():
        facts = found[kind]
        counted = ", ".join(f"{n} {ending}" for ending, n in facts["verdicts"].items())
        told = " ".join(f"{name} {facts[name]:.3g}" for name in ("mean", "std", "least", "half", "most")
                        if name in facts)  # fmt: skip
        why = f": {scores.failures[0].reason}" if scores.failures else ""
        yield f"{kind} ({facts['rows']}): {told}{' · ' if told else ''}{counted}{why}"
    means = {kind: found[kind].get("mean") for kind in compared}
    right = means.get("reference answers")
    for kind in ("shuffled answers", "empty answers"):
        if right is not None and means.get(kind) is not None and right <= means[kind]:
            yield f"it does not prefer reference answers to {kind}: does it look for what the data calls an answer?"
