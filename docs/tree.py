"""Prints the tree of README.md: one line a file, from the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "klimb"


def first_line(path: Path) -> str:
    """Of a module's docstring, or of the comment that a C file begins with."""
    text = path.read_text()
    if path.suffix != ".py":
        return text[text.index("/*") + 2 :].split("\n")[0].removesuffix("*/").strip()
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0].strip()


def main() -> None:
    for folder in [ROOT, *sorted(path.parent for path in ROOT.glob("*/**/__init__.py"))]:
        print(f"{folder.relative_to(ROOT.parents[1])}/")
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".py", ".c", ".h")):
            if path.stem != "__init__":
                print(f"  {path.name:16} {first_line(path)}")


if __name__ == "__main__":
    main()
