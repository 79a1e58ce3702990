"""The command line: a recipe or nothing first, then key=value, and --flags for behaviour only.

    klimb run quickstart seed=0..4
    klimb grpo model=DIR data=my.jsonl reward=my_reward.py:score algorithm.kl.beta=0.1

Nothing heavy is imported before a command runs, so that `klimb --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from klimb import commands

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="changes to the defaults")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="two steps in a temporary folder: config, memory, time, files; nothing stays")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="delete what an earlier run left in `out` and start anew")]


Changed = Annotated[
    bool,
    typer.Option("--changed", help="delete and restart the stages that differ from what `out` holds, and no others"),
]


class Commands(TyperGroup):
    """An algorithm's or a preference loss's name is a command too: `klimb grpo …`, `klimb dpo …`."""

    def get_command(self, ctx: Any, name: str) -> Any:
        return super().get_command(ctx, name) or _method_command(name, self.list_commands(ctx))


app = typer.Typer(
    cls=Commands, pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False,
    help="Climb the reward, mind the KL: post-train language models. `klimb grpo …`, `klimb dpo …` and every other "
    "algorithm of `klimb algorithms` are commands too.",
)  # fmt: skip


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"klimb {version('klimb')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="print the version", callback=_print_version)] = False,
) -> None:
    pass


@app.command()
def quickstart(
    arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False,
    changed: Changed = False,
) -> None:  # fmt: skip
    """The whole story on a small world: SFT, comparisons, reward model, best-of-n, DPO, PPO, GRPO, report."""
    _pipeline("quickstart", arguments or [], as_json, dry_run, _anew(fresh, changed))


@app.command()
def run(
    arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False,
    changed: Changed = False,
) -> None:  # fmt: skip
    """Run a recipe: a YAML file of named stages, or the name of a shipped one."""
    from klimb.config import shipped_recipes
    from klimb.errors import ConfigError

    if not arguments or "=" in arguments[0]:
        shipped = ", ".join(shipped_recipes())
        raise ConfigError("which recipe", where="command line", fix=f"write klimb run RECIPE.yaml, or one of {shipped}")
    _pipeline(arguments[0], arguments[1:], as_json, dry_run, _anew(fresh, changed))


@app.command(cls=commands.StageCommand)
def sft(arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Supervised fine-tuning on demonstrations."""
    _stage("sft", "sft", arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def reward(
    arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False,
    listed: Annotated[bool, typer.Option("--list", help="tell what can stand after `reward:`; NAME: one page")] = False,
) -> None:  # fmt: skip
    """Train a reward model on comparisons; --list tells every source of rewards."""
    if listed:
        _list_rewards(arguments or [], as_json)
        return
    _stage("reward", "reward", arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def rl(arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Reinforcement learning with any algorithm of the table (default: grpo)."""
    _stage("rl", "rl", arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def preference(
    arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False
) -> None:
    """Direct preference optimisation with any preference loss (default: dpo)."""
    _stage("preference", "preference", arguments or [], {}, as_json, dry_run, fresh)


@app.command(name="online_preference", cls=commands.StageCommand)
def online_preference(
    arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False
) -> None:
    """A preference loss on the policy's own samples, two a prompt, ranked by a reward (online DPO, XPO)."""
    _stage("online_preference", "online_preference", arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def distill(arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Follow a teacher's distribution on the student's own samples, or on written texts."""
    _stage("distill", "distill", arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def sample(arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Completions of a model to a file, scored and paired if wanted."""
    _stage("sample", "sample", arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def evaluate(arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Measure a model: proxy and gold with intervals, KL, best-of-n. With reward=DIR and data=PAIRS: a reward."""
    stage = "evaluate_reward" if any(text.startswith("reward=") for text in arguments or []) else "evaluate"
    _stage(stage, stage, arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def average(arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """The mean of several models' weights: WARM of reward models, soups of policies."""
    _stage("average", "average", arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def label(arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """A judge compares completions: preferences marked as its own, and its agreement with people."""
    _stage("label", "label", arguments or [], {}, as_json, dry_run, fresh)


@app.command(cls=commands.StageCommand)
def revise(arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Constitutional AI: a model answers, criticises its answer by a principle, and revises it, to demonstrations."""
    _stage("revise", "revise", arguments or [], {}, as_json, dry_run, fresh)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="run or pipeline directory")]) -> None:
    """Write report.html of a run, also of one that is still going."""
    from klimb.report.page import write_report

    print(write_report(directory))


@app.command()
def algorithms(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME|my_file.py:NAME]", help="one page about this one")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="the losses that learn from preferences")] = False,
    as_json: Json = False,
) -> None:
    """The tables of methods; with a name, one page: formula, defaults, source, needs, how it fails."""
    from klimb.commands import algorithms as told

    if as_json:
        print(json.dumps(told.page(name) if name else told.pages(offline), indent=1, ensure_ascii=False))
    elif name:
        print(told.text_of(told.page(name)))
    else:
        _print_table(told.listing(offline))
        print("", *([told.NOT_HERE, ""] if offline else []), *told.RULE_OF_THUMB, sep="\n")


commands.add_to(app)


def _list_rewards(names: list[str], as_json: bool) -> None:
    from klimb.commands.rewards import chosen, text_of, told

    pages = chosen(names)
    if as_json:
        print(json.dumps([told(page) for page in pages], indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(text_of(page, whole=bool(names)) for page in pages))


def _method_command(name: str, others: Sequence[str]) -> Any:
    """The command of an algorithm or loss; the tables are loaded only when no other command has this name."""
    from klimb.errors import ConfigError, did_you_mean
    from klimb.objective.algorithms import ALGORITHMS
    from klimb.objective.preference import PREFERENCE_LOSSES

    if name not in ALGORITHMS and name not in PREFERENCE_LOSSES:
        known = [*others, *ALGORITHMS, *PREFERENCE_LOSSES]
        raise ConfigError(f"no command {name!r}", where="command line", fix=did_you_mean(name, known))
    stage, key = ("rl", "algorithm") if name in ALGORITHMS else ("preference", "loss")

    def command(
        arguments: Arguments = None, as_json: Json = False, dry_run: DryRun = False, fresh: Fresh = False
    ) -> None:
        _stage(stage, name, arguments or [], {key: name}, as_json, dry_run, fresh)

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(name, cls=commands.StageCommand, help=f"The {stage} stage with {key}={name}.")(command)
    return typer.main.get_command(alone)


def _stage(
    stage: str, name: str, arguments: Sequence[str], given: Mapping[str, Any], as_json: bool, dry_run: bool, fresh: bool
) -> None:
    from klimb.config import load_yaml
    from klimb.runtime import ranks
    from klimb.stages.registry import run_stage
    from klimb.stages.seeds import configs_by_seed, run_seeds

    recipe = None if not arguments or "=" in arguments[0] else Path(arguments[0])
    overrides = list(arguments[1:] if recipe else arguments)
    values = load_yaml(recipe) if recipe else {}
    for key, method in given.items():
        values[key] = _only_method(key, method, values.get(key), overrides)
    configs = configs_by_seed(stage, values, overrides, where=str(recipe or "config"))
    seeds, config = [*configs], next(iter(configs.values()))
    with ranks.process_group():
        if dry_run:
            from klimb.commands.dry_run import dry_stage

            dry_stage(stage, configs, name, fresh, _say(as_json), as_json)
            return
        if len(seeds) > 1:
            summary = run_seeds(stage, configs, name=name, fresh=fresh, say=_say(as_json))
            if ranks.rank() == 0:
                _print_seeds(summary, as_json)
            return
        result = run_stage(stage, config, name=name, fresh=fresh, say=_say(as_json))
        if ranks.rank() == 0:
            _write_report(Path(result["run"]))
            _print_result(result, as_json)


def _only_method(key: str, method: str, in_file: Any, overrides: Sequence[str]) -> Any:
    """`klimb grpo` with what a file changes in grpo; a second algorithm beside it is a contradiction."""
    from klimb.errors import ConfigError

    named = in_file.get("name", method) if isinstance(in_file, dict) else in_file or method
    twice = [text for text in overrides if text.startswith((f"{key}=", f"{key}.name="))]
    if named != method or twice:
        other = twice[0] if twice else f"{key}: {named}"
        fix = f"leave {other} out"
        raise ConfigError(f"{method} with {other}", where="command line", why="both say what to run", fix=fix)
    return {**in_file, "name": method} if isinstance(in_file, dict) else method


def _anew(fresh: bool, changed: bool) -> bool | Literal["changed"]:
    from klimb.errors import ConfigError

    if fresh and changed:
        why = "one restarts all stages, the other some"
        raise ConfigError("--fresh and --changed", where="command line", why=why, fix="leave one of them out")
    return "changed" if changed else fresh


def _pipeline(
    recipe: str, overrides: Sequence[str], as_json: bool, dry_run: bool, fresh: bool | Literal["changed"]
) -> None:
    from klimb.config import load_recipe
    from klimb.runtime import ranks
    from klimb.stages.pipeline import run_pipeline, with_overrides

    loaded = load_recipe(recipe)
    values = with_overrides(loaded.values, overrides)
    with ranks.process_group():
        if dry_run:
            from klimb.commands.dry_run import dry_recipe

            dry_recipe(loaded.name, values, _say(as_json), as_json)
            return
        summary = run_pipeline(loaded.name, values, fresh=fresh, say=_say(as_json))
        if ranks.rank() != 0:
            return
    if as_json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    _print_table([{k: v for k, v in row.items() if k not in ("algorithm", "by")} for row in summary["rows"]])
    for row in summary["rows"]:
        for value, part in (row.get("by") or {}).items():
            print(f"{row['method']}, {value}: {part['gold']:.3f} [{part['gold_low']:.3f}, {part['gold_high']:.3f}]")
    for row in summary["rows"]:
        if row.get("algorithm"):
            print(f"{row['method']}: {row['algorithm']}")
    _print_table(summary["accuracies"])
    print(f"summary: {summary['out']}/summary.json\nreport:  {summary['out']}/report.html")


def _write_report(directory: Path) -> None:
    from klimb.report.page import write_report

    write_report(directory)


def _say(as_json: bool) -> Any:
    from klimb.runtime import ranks
    from klimb.stages.common import say_aside

    return (lambda line: None) if as_json or ranks.rank() else say_aside


def _print_result(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    from klimb.report.text import cell

    evaluation = result.get("evaluation") or {}
    facts = {**result, **evaluation, "report": f"{result['run']}/report.html"}
    for key in ("method", "algorithm", "model", "proxy", "gold", "kl", "accuracy", "seconds", "run", "report"):
        if facts.get(key) not in (None, ""):
            low, high = (cell(facts.get(f"{key}{end}")) for end in ("_low", "_high"))
            print(f"{key:10} {cell(facts[key])}" + (f" [{low}, {high}]" if f"{key}_low" in facts else ""))
    if "trust" in result:
        from klimb.report.trust import told

        print(f"\n{told(result)}")


def _print_seeds(summary: Mapping[str, Any], as_json: bool) -> None:
    """One line a figure: its mean over the seeds and the 95 % interval."""
    if as_json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    print(f"{summary['method']}, seeds {', '.join(map(str, summary['seeds']))}")
    sides = ("mean", "low", "high")
    _print_table([
        {"figure": key, **{side: f"{found[side]:.4g}" for side in sides}} for key, found in summary["figures"].items()
    ])  # fmt: skip
    if summary["algorithm"]:
        print(f"{summary['method']}: {summary['algorithm']}")
    print(f"summary: {summary['out']}/summary.json\nreport:  {summary['out']}/report.html")


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    from klimb.report.text import columns

    if rows:
        print(columns(rows))


def main() -> None:
    """Entry point: what a person did wrong is one line on standard error and exit code 1."""
    from klimb.errors import Interrupted, KlimbError, one_line, out_of_memory

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its load reports explain nothing to a person
    if sys.argv[1:2] in ([], ["-h"]):
        sys.argv[1:] = ["--help"]
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(code)
    except USAGE_ERROR as error:
        _leave(_usage(error), 2, error)
    except Interrupted as error:
        _leave(str(error), 130, error)
    except (KlimbError, ValueError) as error:
        _leave(str(error), 1, error)
    except OSError as error:  # no room, no permission, a pipe that was closed
        _leave(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1, error)
    except (KeyboardInterrupt, typer.Abort) as error:
        _leave("interrupted; what was saved at the last checkpoint is kept", 130, error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        told = f"the memory ran out: {one_line(error) or type(error).__name__}"
        _leave(f"{told}; `klimb doctor STAGE KEY=VALUE …` plans what settings take", 1, error)


USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for words it does not understand; it brings its own copy of click and shows no more of it."""


def _usage(error: Exception) -> str:
    text = getattr(error, "format_message", lambda: str(error))()
    option = getattr(error, "option_name", "") or ""
    return f"{text}; keys have no dashes: {option.lstrip('-')}=VALUE" if option.startswith("--") else text


def _leave(text: str, code: int, error: BaseException) -> NoReturn:
    if os.environ.get("KLIMB_DEBUG"):
        raise error
    print(f"klimb: {text}", file=sys.stderr)
    sys.exit(code)
