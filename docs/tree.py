"""Prints the tree of README.md: one line a file, from the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "klimb"


def first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return doc.split("\n")[0].strip()


def main() -> None:
    for folder in [ROOT, *sorted(p for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists())]:
        print(f"{folder.relative_to(ROOT.parents[1])}/")
        for path in sorted(folder.glob("*.py")):
            if path.stem != "__init__":
                print(f"  {path.name:16} {first_line(path)}")


if __name__ == "__main__":
    main()
