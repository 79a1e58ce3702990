"""Commands that train nothing: each is a few lines of typer here, and a file beside this one that it loads when run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to the defaults")]


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


def add_to(app: typer.Typer) -> None:
    for command in (export, chat):
        app.command()(command)
