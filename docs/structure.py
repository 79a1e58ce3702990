"""Writes docs/STRUCTURE.md: one line a file, from the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "klimb"
PAGE = Path(__file__).parent / "STRUCTURE.md"
INTRODUCTION = """# Structure

What each file is for, in its own words. Imports point downwards only: `cli → stages → {runtime, rollout, rewards,
watch, report} → {models, data, objective} → {types, batch, metrics, config}`. Written by `python docs/structure.py`.
"""


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, or of the comment that a C file begins with."""
    text = path.read_text()
    if path.suffix == ".py":
        return " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
    return text[text.index("/*") + 2 :].split("\n")[0].removesuffix("*/").strip()


def document() -> str:
    parts = [INTRODUCTION]
    for folder in [ROOT, *sorted(path.parent for path in ROOT.glob("*/**/__init__.py"))]:
        parts.append(f"\n## {folder.relative_to(ROOT.parents[1])}\n\n| | |\n|---|---|\n")
        files = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".c", ".h"))
        told = ((path.name, summary(path).replace("|", "\\|")) for path in files if path.stem != "__init__")
        parts += [f"| `{name}` | {text} |\n" for name, text in told]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(document())
