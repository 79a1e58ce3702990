"""Imports go one way, and what has to be light is light."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "klimb"

# A module may import from its own layer and from those below it.
LAYERS = (
    {"errors", "types", "plugin", "config_errors"},
    {"config", "metrics", "batch"},
    {"data", "objective", "native"},
    {"models"},
    {"rewards", "runtime", "rollout", "watch", "report"},
    {"lab"},
    {"stages"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_parts(tree: ast.AST) -> set[str]:
    """Second names of everything imported from klimb, at the top of the file or within a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "klimb":
            names = node.module.split(".")
            found |= {names[1]} if len(names) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("klimb.")}
    return found & LEVEL.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = part_of(path)
    assert own in LEVEL, f"{own} belongs to no layer: add it to LAYERS"
    above = {part for part in imported_parts(ast.parse(path.read_text())) if LEVEL[part] > LEVEL[own]}
    assert not above, f"{path.name} imports from above itself: {above}"


LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "kind")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_pickled_or_evaluated(path: Path) -> None:
    sandboxed = path.parent == PACKAGE / "rewards" / "sandbox" / "inside"  # the one place that runs foreign code
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[0] in ("pickle", "dill", "cloudpickle") for name in names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "exec" or sandboxed
            assert called not in ("eval", "torch.load", "torch.save", "dist.all_gather_object")
            if called.endswith(".from_pretrained") and called.split(".")[0] in LOADERS:
                assert "**code.loading(" in ast.unparse(node), "whether a model's own code may run is decided there"
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import klimb", ("torch", "transformers", "numpy")),
        ("import klimb.types, klimb.config, klimb.cli, klimb.data.formats", ("torch", "transformers", "datasets")),
        ("import klimb.objective", ("transformers", "peft", "datasets", "pyarrow")),
        ("import klimb.report", ("torch", "transformers")),
        ("import klimb.stages.rl", ("peft", "datasets", "trl")),
    ],
)
def test_what_is_light_stays_light(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_files_and_functions_stay_small() -> None:
    for path in modules():
        text = path.read_text()
        assert text.count("\n") <= 420, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 75, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_the_list_of_files_is_of_today() -> None:
    docs = PACKAGE.parents[1] / "docs"
    document = runpy.run_path(str(docs / "structure.py"))["document"]()
    assert (docs / "STRUCTURE.md").read_text() == document, "write it anew: python docs/structure.py"
