"""`klimb completion`: a static script for the shell, made from the parser and the configs."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from klimb.commands.schema import config_class, stage_of
from klimb.errors import ConfigError, did_you_mean
from klimb.objective.algorithms import ALGORITHMS
from klimb.objective.preference import PREFERENCE_LOSSES
from klimb.stages.registry import STAGES

_FURTHER = {"evaluate": "evaluate_reward"}
"""Stages that a command runs besides that of its name, where other keys ask for it."""


class Words(NamedTuple):
    """What may follow a command: `--flags`, and `key=` with the values that are known for it."""

    flags: list[str]
    keys: dict[str, list[str]]
    about: str


def completion(shell: str, commands: Mapping[str, Any]) -> str:
    """The script for bash, zsh or fish. commands: the parser's, by name. Raises ConfigError for another shell."""
    if shell not in _SHELLS:
        raise ConfigError(f"no completion for {shell!r}", where="command line", fix=did_you_mean(shell, _SHELLS))
    found = {name: _words(name, command) for name, command in commands.items()}
    for method in (*ALGORITHMS, *PREFERENCE_LOSSES):
        stage = stage_of(method)
        found[method] = found[stage]._replace(about=f"the {stage} stage with {method}")
    return _SHELLS[shell](found)


def _words(name: str, command: Any) -> Words:
    from klimb.commands.chat import ChatConfig
    from klimb.commands.check_data import CheckConfig
    from klimb.commands.export import ExportConfig

    own: dict[str, Any] = {"chat": ChatConfig, "check": CheckConfig, "export": ExportConfig}
    config = own.get(name) or (config_class(name) if name in STAGES else None)
    flags = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    about = (command.help or "").splitlines()[0]
    further = dict(_keys(config_class(_FURTHER[name]))) if name in _FURTHER else {}
    return Words([*flags, "--help"], further | (dict(_keys(config)) if config else {}), about)


def _keys(config: type[BaseModel], above: str = "") -> Iterator[tuple[str, list[str]]]:
    for name, field in config.model_fields.items():
        sections = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        if sections:
            yield from _keys(sections[0], f"{above}{name}.")
        else:
            yield f"{above}{name}", _choices(name, field.annotation)


def _choices(name: str, annotation: Any) -> list[str]:
    known = {"algorithm": ALGORITHMS, "loss": PREFERENCE_LOSSES, "device": ("auto", "cpu", "cuda", "mps")}
    if name in known and not _literals(annotation):
        return [*known[name]]
    if bool in _parts(annotation):
        return ["true", "false"]
    return _literals(annotation)


def _literals(annotation: Any) -> list[str]:
    return [str(value) for part in _parts(annotation) if typing.get_origin(part) is typing.Literal
            for value in typing.get_args(part)]  # fmt: skip


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, `Annotated` taken off."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(annotation) for part in _parts(member)]
    return [annotation]


def _grouped(found: Mapping[str, Words]) -> Iterator[tuple[list[str], Words]]:
    """Commands that are followed by the same words, together."""
    groups: dict[str, list[str]] = {}
    for name, words in found.items():
        groups.setdefault(repr((words.flags, words.keys)), []).append(name)
    for names in groups.values():
        yield names, found[names[0]]


_BASH = """# klimb completion bash > ~/.local/share/bash-completion/completions/klimb
_klimb() {{
    local line=${{COMP_LINE:0:COMP_POINT}} words= values=
    local word=${{line##*[[:space:]]}} command=${{COMP_WORDS[1]}}
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case $command in
{words}
    esac
    if [[ $word == *=* ]]; then
        case "$command ${{word%%=*}}" in
{values}
        esac
        if [[ $values ]]; then
            COMPREPLY=($(compgen -W "$values" -- "${{word#*=}}"))
        else
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "${{word#*=}}"))
        fi
        return
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
    if [[ ${{#COMPREPLY[@]}} -eq 1 && $COMPREPLY == *= ]]; then
        compopt -o nospace 2>/dev/null
    fi
}}
complete -F _klimb klimb
"""


def _bash(found: Mapping[str, Words]) -> str:
    words, values = [], []
    for names, each in _grouped(found):
        pattern = "|".join(names)
        words.append(f'        {pattern}) words="{" ".join([*each.flags, *(f"{key}=" for key in each.keys)])}" ;;')
        for key, choices in each.keys.items():
            if choices:
                patterns = "|".join(f'"{name} {key}"' for name in names)
                values.append(f'            {patterns}) values="{" ".join(choices)}" ;;')
    return _BASH.format(commands=" ".join(found), words="\n".join(words), values="\n".join(values))


_ZSH = """#compdef klimb
# klimb completion zsh > ~/.zfunc/_klimb, with fpath+=~/.zfunc before compinit
_klimb() {{
    local -a flags keys values commands
    commands=(
{commands}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case $words[2] in
{words}
    esac
    if [[ $PREFIX == *=* ]]; then
        case "$words[2] ${{PREFIX%%=*}}" in
{values}
        esac
        compset -P '*='
        if (( $#values )); then compadd -a values; else _files; fi
        return
    fi
    compadd -S '' -a keys
    compadd -a flags
    _files
}}
compdef _klimb klimb
"""


def _zsh(found: Mapping[str, Words]) -> str:
    words, values = [], []
    for names, each in _grouped(found):
        keys = " ".join(f"{key}=" for key in each.keys)
        words.append(f"        {'|'.join(names)}) flags=({' '.join(each.flags)}); keys=({keys}) ;;")
        for key, choices in each.keys.items():
            if choices:
                patterns = "|".join(f'"{name} {key}"' for name in names)
                values.append(f"            {patterns}) values=({' '.join(choices)}) ;;")
    commands = "\n".join(f"        {_quoted(f'{name}:{each.about}')}" for name, each in found.items())
    return _ZSH.format(commands=commands, words="\n".join(words), values="\n".join(values))


def _fish(found: Mapping[str, Words]) -> str:
    lines = ["# klimb completion fish > ~/.config/fish/completions/klimb.fish"]
    for name, each in found.items():
        lines.append(f"complete -c klimb -n __fish_use_subcommand -f -a {name} -d {_quoted(each.about)}")
    for names, each in _grouped(found):
        when = _quoted(f"__fish_seen_subcommand_from {' '.join(names)}")
        lines += [f"complete -c klimb -n {when} -l {flag.removeprefix('--')}" for flag in each.flags]
        keys = [f"{key}={value}" for key, values in each.keys.items() for value in values or [""]]
        if keys:
            lines.append(f"complete -c klimb -n {when} -a {_quoted(' '.join(keys))}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Between single quotes, for all three shells."""
    return "'" + text.replace("'", "’") + "'"


_SHELLS: Mapping[str, Callable[[Mapping[str, Words]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
