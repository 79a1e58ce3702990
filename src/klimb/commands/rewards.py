"""`klimb reward --list`: every source of rewards with its options, told by the catalogue that the parser reads."""

from __future__ import annotations

import textwrap
from typing import Any

from klimb.errors import RewardError, did_you_mean
from klimb.rewards.catalogue import Page, pages

_WIDTH = 110


def chosen(names: list[str]) -> list[Page]:
    """The pages of these sources, of all where none is named. Raises RewardError for an unknown name."""
    known = {page.name: page for page in pages()}
    for name in names:
        if name not in known:
            raise RewardError(f"unknown reward {name!r}", where="reward --list", fix=did_you_mean(name, known))
    return [known[name] for name in names] or [*known.values()]


def told(page: Page) -> dict[str, Any]:
    """A page for programs."""
    return {**page._asdict(), "options": [option._asdict() for option in page.options]}


def text_of(page: Page, whole: bool) -> str:
    """A source for a terminal: `whole`, or its summary and its options."""
    said = page.text.split("\n\n") if whole else [page.summary]
    lines = [page.name, *(_wrapped(" ".join(part.split()), "  ") for part in said)]
    for option in page.options:
        default = "has to be given" if option.default is None else f"default {option.default}"
        lines.append(_wrapped(f"{option.name} ({option.type}, {default}): {option.meaning}", "    ", "      "))
    return "\n".join(lines)


def _wrapped(text: str, first: str, further: str | None = None) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=first if further is None else further)
