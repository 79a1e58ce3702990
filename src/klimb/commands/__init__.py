"""Commands that train nothing: each is a few lines of typer here, and a file beside this one that it loads when run."""

from __future__ import annotations

import json
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


def add_to(app: typer.Typer) -> None:
    for command in (export,):
        app.command()(command)
