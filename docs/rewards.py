"""Writes docs/REWARDS.md: every source of rewards, out of the catalogue that the parser reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from klimb.rewards.catalogue import Page, pages

PAGE = Path(__file__).with_name("REWARDS.md")


def document() -> str:
    return "\n".join([*_lines()]) + "\n"


def _lines() -> Iterator[str]:
    yield from (
        "# Rewards",
        "",
        "What can stand after `reward:` and `gold:`, at the command line as `klimb reward --list [NAME]`. Written by",
        "`python docs/rewards.py` out of the catalogue that the parser reads, and held against it by a test.",
        "",
        "Without options a source is its name (`reward: exact`), with options a mapping",
        "(`reward: {exact: {column: solution}}`). A row without a reference (null) is not scored; of a list of",
        "references any will do. Verifiers count how their rows end: ok (full marks), wrong, abstain, timeout, error;",
        "the counts are in metrics.jsonl as `verdict/…`.",
    )
    for page in pages():
        yield from _section(page)


def _section(page: Page) -> Iterator[str]:
    yield from ("", f"## {page.name}", "", page.text)
    if page.options:
        yield from ("", "| option | type | default | |", "|---|---|---|---|")
    for name, kind, default, meaning in page.options:
        cells = (f"`{name}`", kind, "(has to be given)" if default is None else f"`{default}`", meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
    print(f"{PAGE}: {len(document().splitlines())} lines")
