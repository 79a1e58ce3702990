"""`klimb check`: what is wrong with data or a recipe, before it costs time; the exit code says whether it is fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from klimb.commands import check_kept
from klimb.commands.check_data import (
    SHOWN,
    CheckConfig,
    Held,
    bad_lines,
    first_good,
    holds_transcripts,
    in_characters,
    in_tokens,
    line_of,
    write_problems,
)
from klimb.config import load_config, shipped_recipes
from klimb.data.formats import BadRows, Problem
from klimb.errors import ConfigError, did_you_mean


def check(words: Sequence[str], as_json: bool) -> int:
    """words: data or a recipe, or a training command as it is typed; then key=value. Returns the exit code.

    Raises KlimbError where there is nothing to look at.
    """
    first = words[0] if words else ""
    if _is_job(first):
        from klimb.commands.check_recipe import check_job

        return check_job(words, as_json)
    if not words:
        raise ConfigError("nothing to see", where="command line", fix="write klimb check DATA model=DIR, or a recipe")
    given = {} if "=" in first and not Path(first).exists() else {"data": first}
    return _check_data(load_config(CheckConfig, given, words[1:] if given else words, "check"), as_json)


def _is_job(word: str) -> bool:
    """A recipe, or what a training command begins with: its name."""
    if Path(word).suffix.lower() in (".yaml", ".yml"):
        return True
    if (not word.isidentifier() and word not in shipped_recipes()) or Path(word).exists():
        return False
    from klimb.objective.algorithms import ALGORITHMS
    from klimb.objective.preference import PREFERENCE_LOSSES
    from klimb.stages.registry import STAGES

    known = [*shipped_recipes(), *STAGES, *ALGORITHMS, *PREFERENCE_LOSSES]
    if word not in known:
        raise ConfigError(f"no file, recipe or method {word!r}", where="check", fix=did_you_mean(word, known))
    return True


def _check_data(config: CheckConfig, as_json: bool) -> int:
    place = check_kept.place_of(config)
    found = check_kept.find(place) if place is not None else None
    if found is None:
        found = _looked(config)
        if place is not None:
            check_kept.keep(place, *found)
    facts, problems = found
    fit = facts["used"] > 0 and (not problems or config.on_bad == "drop")
    file = write_problems(problems, facts["source"]) if len(problems) > SHOWN else None
    if as_json:
        print(json.dumps({**facts, "fit": fit, "bad_rows_file": file and str(file)}, indent=1, ensure_ascii=False))
    else:
        print("\n".join([*_lines(facts, problems, file), *_text_lines(facts), _verdict(facts, problems, fit)]))
    return int(not fit)


def _aside(line: str) -> None:
    from klimb.stages.common import say_aside

    say_aside(line)


def _looked(config: CheckConfig) -> tuple[dict[str, Any], list[Problem]]:
    """What it holds as JSON, and every bad row."""
    from klimb.stages.progress import Preparing, live_line

    live = live_line("check")
    try:
        held, further = _at(config, Preparing("check", live, _aside))
    except BadRows as error:  # and no good one
        held, further = Held(config.data, "none", error.rows, 0, error.problems, 0, 0, "characters", {}), {}
    finally:
        if live is not None:
            live.close()
    return {**held.facts(), **further}, held.problems


def _at(config: CheckConfig, progress: Any) -> tuple[Held, dict[str, Any]]:
    kind, first = first_good(config)
    further: dict[str, Any] = {"transcripts": holds_transcripts(first)}
    if config.model is None:
        missed = ["lengths in tokens and what limits cut off", "the chat template", "which tokens are trained on"]
        return in_characters(config), {**further, "not_looked_at": missed}
    from klimb.commands.check_text import ends, examples, template_facts
    from klimb.data.render import Renderer
    from klimb.models.place import base_of, declared_context, load_tokenizer

    renderer = Renderer(load_tokenizer(config.model))
    local = Path(base_of(config.model))
    context = declared_context(config.model) if (local / "config.json").exists() or not local.exists() else None
    held, loaded = in_tokens(config, kind, renderer, context, progress)
    chat = loaded.conversational or renderer.tokenizer.chat_template
    return held, {
        **further,
        "ends": ends(loaded.items, renderer, loaded.conversational),
        "template": template_facts(renderer) if chat else {},
        "examples": [{"row": row, "text": text} for row, text in examples(loaded.items, renderer)],
    }


# In lines -------------------------------------------------------------------------------------------------------------


def _lines(found: Mapping[str, Any], problems: Sequence[Problem], file: Path | None) -> Iterator[str]:
    yield f"{found['source']}: {found['rows']:,} rows, {found['type']}; {found['used']:,} can be read"
    yield from bad_lines(problems, file)
    if found["used"]:
        yield line_of(
            "repeats", f"{found['repeats']:,} rows repeat an earlier one exactly; {found['prompts']:,} prompts differ"
        )
    if found["columns"]:
        yield line_of("columns", f"{', '.join(found['columns'])}: reach a reward function by their names")
    yield from _table(**found["lengths"])
    for what, over in found["over"].items():
        share = over["rows"] / max(found["used"], 1)
        yield line_of(
            "over the limit", f"{over['rows']:,} {what} ({share:.2%}) have more than {over['at_most']:,} tokens"
        )
    if found["balance"]:
        yield line_of("balance", ", ".join(f"{what}: {share:.1%}" for what, share in found["balance"].items()))
    yield from (line_of("note", note) for note in found["notes"])
    if found["cache"]:
        yield line_of("cache", found["cache"])


def _table(unit: str, **lengths: Mapping[str, int]) -> Iterator[str]:
    rows = {part: values for part, values in lengths.items() if values}
    for number, (part, values) in enumerate(rows.items()):
        if number == 0:
            yield line_of(unit, "  ".join(f"{name:>7}" for name in values))
        yield line_of(f"  {part}", "  ".join(f"{value:>7,}" for value in values.values()))


def _text_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if counts := found.get("ends"):
        told = [f"{count:,} {what}" for what, count in counts.items() if what != "rows" and count]
        twice = "" if counts["begin with two"] or counts["end with two"] else "none has one of them twice"
        yield line_of("BOS and EOS", f"of the first {counts['rows']:,} rows {', '.join([*told, twice]).rstrip(', ')}")
    for what, does in found.get("template", {}).items():
        yield line_of("chat template", f"{what}: {does}")
    if found.get("examples"):
        yield from _example_lines(found["examples"])
    if found.get("transcripts"):
        how = "these are transcripts of Human: and Assistant: turns; transcripts=chat makes messages of them"
        yield line_of("note", how)
    if missed := found.get("not_looked_at"):
        yield line_of("not looked at", f"{', '.join(missed)}: add model=DIR, a Hugging Face directory or hub name")


def _example_lines(examples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    from klimb.commands.check_text import Stretch, in_colour, shown

    colour = in_colour()
    yield line_of("examples", "what is trained on is green" if colour else "what is trained on stands between ⟦ and ⟧")
    for example in examples:
        yield f"── {example['row']}"
        yield from (f"  {line}" for line in shown([Stretch(*each) for each in example["text"]], colour).split("\n"))


def _verdict(found: Mapping[str, Any], problems: Sequence[Problem], fit: bool) -> str:
    if fit:
        return f"fit to train on{f', {len(problems):,} rows left out' if problems else ''}"
    if not found["used"]:
        return "not fit to train on: no row can be used"
    return f"not fit to train on: {len(problems):,} bad rows stop a run; mend them, or set on_bad=drop"
