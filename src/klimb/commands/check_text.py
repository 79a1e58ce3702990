"""Rendered rows as a person can check them: what is trained on is marked; and what a chat template does to turns."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from klimb.data.render import Renderer
from klimb.data.template import RenderError
from klimb.errors import one_line
from klimb.report.text import visible
from klimb.types import Example, Preference, Prompt

EXAMPLES = 3
LOOKED_AT = 1000
"""Rows whose first and last tokens are looked at."""
_CLIP = 400
"""Characters of a stretch that are shown of its start and of its end."""


class Stretch(NamedTuple):
    """Text of neighbouring tokens that are all trained on, or all not."""

    text: str
    trained: bool


def examples(items: Sequence[Any], renderer: Renderer) -> list[tuple[str, list[Stretch]]]:
    """The first, the middle and the last row, by what they are: (which, its text)."""
    chosen = dict.fromkeys((0, len(items) // 2, len(items) - 1)) if len(items) > 0 else {}
    shown = []
    for at in list(chosen)[:EXAMPLES]:
        for part, tokens, mask in _parts(items[at]):
            shown.append((f"row {at + 1:,} of {len(items):,}{part}", _stretches(tokens, mask, renderer)))
    return shown


def _parts(item: Prompt | Example | Preference) -> Iterator[tuple[str, list[int], list[bool]]]:
    if isinstance(item, Prompt):
        yield ", to be continued", item.tokens, [False] * len(item.tokens)
        return
    before = [False] * len(item.prompt)
    if isinstance(item, Example):
        yield "", item.prompt + item.completion, before + item.mask
        return
    yield ", chosen", item.prompt + item.chosen, before + item.chosen_mask
    yield ", rejected", item.prompt + item.rejected, before + item.rejected_mask


def _stretches(tokens: list[int], mask: list[bool], renderer: Renderer) -> list[Stretch]:
    """By what each further token adds to the text: some tokenizers read a token otherwise at the start of one."""
    found, text, end = [], "", 0
    for trained, group in groupby(mask):
        end += len(list(group))
        longer = renderer.tokenizer.decode(
            tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )  # fmt: skip
        found.append(Stretch(longer[len(text) :], trained))
        text = longer
    return found


def in_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def shown(stretches: Sequence[Stretch], colour: bool) -> str:
    """What is trained on in green, or between ⟦ and ⟧; nothing in it reaches the terminal as a command."""
    marks = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    texts = [(visible(_clipped(stretch.text)), stretch.trained) for stretch in stretches]
    return "".join(f"{marks[0]}{text}{marks[1]}" if trained else text for text, trained in texts)


def _clipped(text: str) -> str:
    left_out = len(text) - 2 * _CLIP
    return text if left_out <= 0 else f"{text[:_CLIP]} … ({left_out:,} characters) … {text[-_CLIP:]}"


# Begin and end --------------------------------------------------------------------------------------------------------


def ends(items: Sequence[Any], renderer: Renderer, conversational: bool) -> dict[str, int]:
    """Of the first rows: how many begin with BOS, end with what ends a completion, and have one of them twice."""
    bos, stops = renderer.tokenizer.bos_token_id, renderer.stop_tokens(conversational)
    counts = {"rows": 0, "begin with BOS": 0, "begin with two": 0, "end with a stop token": 0, "end with two": 0}
    for item in items[:LOOKED_AT]:
        parts = list(_parts(item))
        firsts = [tokens[:2] for _, tokens, _ in parts]
        lasts = [tokens[-2:] for _, tokens, mask in parts if True in mask]
        counts["rows"] += 1
        counts["begin with BOS"] += bos is not None and all(first[:1] == [bos] for first in firsts)
        counts["begin with two"] += bos is not None and any(first == [bos, bos] for first in firsts)
        counts["end with a stop token"] += bool(lasts) and all(last[-1] in stops for last in lasts)
        counts["end with two"] += any(len(last) == 2 and stops.issuperset(last) for last in lasts)
    return counts


# The chat template ----------------------------------------------------------------------------------------------------


def template_facts(renderer: Renderer) -> dict[str, str]:
    """What it does with a system turn and with thinking tags, and what ends a turn, each in a few words."""
    try:
        template = renderer.template
    except RenderError as error:
        return {"chat template": f"refused: {one_line(error)}"}
    own = "" if renderer.tokenizer.chat_template else " (the model brings none: klimb's plain one)"
    found = {"end of the assistant's turn": f"{template.end!r}{own}"}
    system, question, *thoughts = (_sentinel() for _ in range(4))
    turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    found["system turn"] = _does(renderer, turns, system)
    spoken = [
        turn
        for thought in thoughts
        for turn in ({"role": "user", "content": _sentinel()},
                     {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{_sentinel()}"})
    ]  # fmt: skip
    found["<think> in the last answer"] = _does(renderer, spoken, thoughts[1])
    found["<think> in an earlier answer"] = _does(renderer, spoken, thoughts[0])
    try:
        renderer.completion(spoken[:1], spoken[1:2])
        found["training on <think>"] = "as it stands"
    except RenderError as error:
        found["training on <think>"] = f"refused: {one_line(error)}"
    asked = template.render(turns[1:], generation_prompt=True)[0].partition(question)[2]
    if "<think>" in asked:
        found["the prompt"] = f"opens the answer with {asked[asked.index('<think>') :]!r}"
    return found


def _does(renderer: Renderer, messages: list[dict[str, Any]], content: str) -> str:
    try:
        text, _ = renderer.template.render(messages)
    except RenderError as error:
        return f"refused: {one_line(error)}"
    return "kept" if content in text else "dropped"


def _sentinel() -> str:
    return "".join(secrets.choice("0123456789") for _ in range(12))
