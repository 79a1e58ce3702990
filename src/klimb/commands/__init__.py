"""Commands that train nothing: each is a few lines of typer here, and a file beside this one that it loads when run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the defaults")]


class StageCommand(TyperCommand):
    """A command that runs a stage: its help ends with every key, its default and what it is."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from klimb.commands.schema import keys

        formatter.width = max(formatter.width, min(shutil.get_terminal_size().columns - 2, 118))
        with formatter.section("Keys, with their defaults"):
            formatter.write_dl(keys(str(ctx.info_name)), col_max=34)


def export(
    run: Annotated[str, typer.Argument(help="run directory")],
    arguments: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """A run's model as a folder to take away: weights, tokenizer, template, generation config, model card."""
    from klimb.commands.export import export as write

    result = write(run, arguments or [])
    if as_json:
        print(json.dumps(result, indent=1))
        return
    print(f"model      {result['model']}\nweights    {result['weights']}\nfiles      {', '.join(result['files'])}")
    print(f"megabytes  {result['bytes'] / 1e6:.1f}")


def chat(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN|MODEL [RUN|MODEL] [KEY=VALUE]...", help="what to talk to, and how to sample"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the reply to standard input as JSON")] = False,
) -> None:
    """Talk to a model, or to two side by side; `echo hi | klimb chat RUN` answers once."""
    from klimb.commands.chat import chat as talk

    words = arguments or []
    models = [word for word in words if "=" not in word or Path(word).exists()]
    talk(models, [word for word in words if word not in models], as_json)


def new(name: Annotated[str, typer.Argument(help="folder to make")]) -> None:
    """A folder to begin with: recipe, 20 rows, reward function, a tiny model; it runs as it stands."""
    from klimb.commands.new import new as make

    folder = make(name)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f"next: cd {folder} && klimb grpo recipe.yaml")


def schema(
    kind: Annotated[
        str, typer.Argument(metavar="[recipe|task|STAGE|ALGORITHM]", help="what the file holds")
    ] = "recipe",
) -> None:
    """JSON schema of a recipe, of a task, or of one stage's keys, for editors."""
    from klimb.commands.schema import schema as schema_of

    print(json.dumps(schema_of(kind), indent=1, ensure_ascii=False))


def completion(
    context: typer.Context, shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="your shell")]
) -> None:
    """A script for the shell: commands, keys and their values, completed with TAB."""
    from klimb.commands.completion import completion as script

    parser = context.parent.command if context.parent else context.command
    print(script(shell, getattr(parser, "commands", {})), end="")


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STAGE|ALGORITHM|LOSS] [KEY=VALUE]...", help="a job: does it fit into the memory?"),
    ] = None,
    memory: Annotated[float | None, typer.Option("--memory", help="GB of a GPU to plan the job for")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Can klimb train here? With a job (`klimb doctor dpo model=DIR`): its memory plan, and settings that fit."""
    from klimb.commands.doctor import asked, examine, show, show_answer

    if arguments:
        answer = asked(arguments, memory)
        print(json.dumps(answer._asdict(), indent=1)) if as_json else show_answer(answer)
        raise typer.Exit(int(answer.peak > answer.free))
    findings = examine()
    print(json.dumps([f._asdict() for f in findings], indent=1, ensure_ascii=False)) if as_json else show(findings)
    raise typer.Exit(int(any(finding.ok is False for finding in findings)))


def check(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA|RECIPE [KEY=VALUE]...", help="data with model=DIR, or what would be trained"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """What is wrong with data or a recipe: bad rows, lengths, template, reward, memory, time; fit or not."""
    from klimb.commands.check import check as look

    raise typer.Exit(look(arguments or [], as_json))


def verify(
    name: Annotated[str, typer.Argument(metavar="my_file.py:NAME", help="an Algorithm or a preference loss")],
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Has a row or a loss of your own the properties that those of the tables have?"""
    from klimb.commands.verify import Report
    from klimb.commands.verify import verify as examine

    report = Report(name, examine(name))
    if as_json:
        print(json.dumps([finding._asdict() for finding in report.findings], indent=1, ensure_ascii=False))
    else:
        print("\n".join(report.lines()))
    raise typer.Exit(int(not report.passed))


_COMMANDS = (new, check, chat, export, doctor, verify, schema, completion)
"""Now: once a file of the same name is imported, the name stands for that."""


def add_to(app: typer.Typer) -> None:
    for command in _COMMANDS:
        app.command()(command)
