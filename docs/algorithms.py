"""Writes docs/ALGORITHMS.md: every method that klimb knows, out of the same source as `klimb algorithms`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from klimb.commands.algorithms import NOT_HERE, RULE_OF_THUMB, pages, said_by
from klimb.objective.spec import AXES

PAGE = Path(__file__).with_name("ALGORITHMS.md")


def document() -> str:
    return "\n".join([*_lines()]) + "\n"


def _lines() -> Iterator[str]:
    yield from (
        "# Algorithms and losses",
        "",
        "Each is a value; its page at the command line is `klimb algorithms NAME`. Written by",
        "`python docs/algorithms.py` out of the values and their docstrings, and held against them by a test.",
        "",
        *(f"- {line}" for line in RULE_OF_THUMB),
        "",
        "## On the policy's own samples",
        "",
        "score − β·KL (reward) → advantage → normalise → surrogate × importance + β·KL (loss) → aggregate.",
        "A is the advantage, r = π/π_old the ratio, x = log π/π_ref. What a row does not name, it does not have.",
    )
    for page in pages(offline=False):
        axes = {axis: text for axis, text in page["axes"].items() if text not in ("none", "0")}
        yield from ("", f"### {page['name']}", "", page["source"], "")
        yield from (f"- {axis}: `{text}`" for axis, text in axes.items())
        yield from _told(page)
    yield from ("", "## The axes", "", "What a row may be made of: `algorithm: {name: grpo, AXIS: VALUE}`.")
    for axis, known in AXES.items():
        yield from ("", f"### {axis}", "", "| | |", "|---|---|")
        yield from (f"| `{name}` | {_cell(_whole(value))} |" for name, value in known.items())
    yield from (
        "", "## On preferences", "",
        "h = log π/π_ref summed over a completion, Δ = h_w − h_l its difference between chosen and rejected.",
        NOT_HERE,
    )  # fmt: skip
    for page in pages(offline=True):
        defaults = ", ".join(f"{key} {value:g}" for key, value in page["defaults"].items())
        yield from ("", f"### {page['name']}", "", page["source"], "", f"`{page['formula']}`", "")
        yield from ([page["notes"], ""] if page["notes"] else [])
        yield from ([f"- defaults: {defaults}"] if defaults else [])
        yield from _told(page)


def _told(page: Mapping[str, Any]) -> Iterator[str]:
    for title, key in (("models in memory", "models"), ("needs", "takes")):
        yield f"- {title}: {'; '.join(page[key])}"
    for title, key in (("main failure", "fails"), ("degrades", "degrades")):
        yield from (f"- {title}: {text}" for text in page[key])


def _whole(value: Any) -> str:
    said = said_by(value)
    return " ".join(text for text in (said.formula, said.notes, said.fails, said.degrades) if text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
    print(f"{PAGE}: {len(document().splitlines())} lines")
