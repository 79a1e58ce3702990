"""Would the tests notice? Every formula of the heart is changed in one place at a time, and its tests have to fail.

    python tests/mutate.py                       all of src/klimb/objective (one process, about half a second a mutant)
    python tests/mutate.py --count 200 --seed 1  a sample
    python tests/mutate.py surrogate.py kl.py    some files

A mutant lives in the memory of a forked process and nowhere else. Of the tests it runs those that enter the function
that was changed, quickest first, until one fails. Survivors that cannot be told apart from the original are listed with
the reason in mutants.toml; any other survivor is a test that is missing. Exit code 1: fewer than 95 % were noticed.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import gc
import importlib.machinery
import json
import os
import random
import resource
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
HEART = TESTS.parent / "src" / "klimb" / "objective"
SUITE = TESTS / "objective"
WANTED = 0.95
CPU_SECONDS = 60
"""What a mutant may take (processor time: a machine that stops the process for a while decides nothing)."""


class Mutant(NamedTuple):
    """One change. `span`: first and last line of the function around it, None at the top of a module or class."""

    file: str
    line: int
    function: str
    was: str
    becomes: str
    span: tuple[int, int] | None
    code: CodeType

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.file, self.function, self.was, self.becomes


SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
PAIRS = (
    ("max", "min"), ("maximum", "minimum"), ("amax", "amin"), ("any", "all"), ("mean", "sum"), ("gamma", "lam"),
    ("tokens", "samples"), ("low", "high"), ("chosen", "rejected"), ("chosen_tokens", "rejected_tokens"),
    ("chosen_log_ratio", "rejected_log_ratio"), ("logps", "old_logps"),
)  # fmt: skip
OTHER = {a: b for a, b in PAIRS} | {b: a for a, b in PAIRS}
SHED = ("detach", "clamp", "abs", "square", "sqrt", "exp", "log", "where", "clamp_min", "relu", "sign", "flip")
"""Methods that are dropped: x.detach() → x."""
SHAPE = ("dim", "keepdim", "dtype", "strict")
"""Keywords whose other values do not run at all: nothing to be noticed by a formula's test."""


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of an expression."""
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in SWAPS:
                yield ast.BinOp(left, SWAPS[type(op)](), right)
            if isinstance(op, ast.Add | ast.Sub):  # a term forgotten: the KL, the bonus, the baseline
                yield left
        case ast.UnaryOp(ast.USub() | ast.Invert() | ast.Not(), operand):
            yield operand
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.Compare(left, [op], comparators):
            yield from (ast.Compare(left, [other()], comparators) for other in COMPARISONS[type(op)])
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(float() as value):
            yield ast.Constant(2 * value or 1.0)
        case ast.Constant("amin" | "amax" as value):
            yield ast.Constant(OTHER[value])
        case ast.Name(name, ast.Load()) if name in OTHER:
            yield ast.Name(OTHER[name], ast.Load())
        case ast.Attribute(value, name, ast.Load()) if name in OTHER:
            yield ast.Attribute(value, OTHER[name], ast.Load())
        case ast.Name("mask", ast.Load()) | ast.Attribute(_, "mask", ast.Load()):
            yield ast.parse(f"{ast.unparse(node)}.roll(1, -1)", mode="eval").body
        case ast.Call():
            yield from _other_calls(node)
        case ast.IfExp(test, body, orelse) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            yield ast.IfExp(test, orelse, body)


def _other_calls(call: ast.Call) -> Iterator[ast.AST]:
    named = [keyword.arg for keyword in call.keywords]
    if named in (["min"], ["max"]):  # clamp(min=1)
        yield ast.Call(call.func, call.args, [ast.keyword(OTHER[str(named[0])], call.keywords[0].value)])
    match call:
        case ast.Call(ast.Attribute(ast.Name("torch"), "where"), [condition, a, b]):
            yield a
            yield ast.Call(call.func, [condition, b, a], [])
        case ast.Call(ast.Attribute(value, name)) if name in SHED:
            yield value
        case ast.Call(ast.Name(name), [only], []) if name.islower() and not hasattr(builtins, name):
            if not isinstance(only, ast.Starred):
                yield only


def places(node: ast.AST, function: str = "", span: tuple[int, int] | None = None) -> Iterator[tuple[Any, ...]]:
    """(holder, field, index, child, function, span) of every expression that computes something."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
        if isinstance(node, ast.FunctionDef) and span is None:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            span = (first, node.end_lineno or node.lineno)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or (
            isinstance(node, ast.keyword) and node.arg in SHAPE
        ):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr) or not isinstance(
                child, ast.AST
            ):
                continue
            if isinstance(child, ast.expr):
                yield node, field, index, child, function, span
            yield from places(child, function, None if isinstance(child, ast.ClassDef) else span)


def mutants(path: Path) -> Iterator[Mutant]:
    """Of one file, each a module compiled with one change."""
    file = path.relative_to(HEART).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(part): node for node in ast.walk(tree) if isinstance(node, ast.stmt) for part in _own(node)}
    for holder, field, index, child, function, span in [*places(tree)]:
        statement = statements[id(child)]
        was = _text(statement)
        for other in [*variants(child), *_negated(holder, field, child)]:
            _put(holder, field, index, ast.copy_location(other, child))
            becomes = _text(statement)
            code = compile(ast.fix_missing_locations(tree), str(path), "exec") if becomes != was else None
            _put(holder, field, index, child)
            if code is not None:
                line = getattr(child, "lineno", statement.lineno)
                yield Mutant(file, line, function, *_difference(was, becomes), span, code)


def _negated(holder: ast.AST, field: str, child: ast.expr) -> Iterator[ast.expr]:
    """`if x` → `if not x`, where no other change amounts to that."""
    if field == "test" and isinstance(child, ast.Name | ast.Attribute | ast.Call) and not isinstance(holder, ast.IfExp):
        yield ast.UnaryOp(ast.Not(), child)


def _own(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement, without those of the statements in its body."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if not isinstance(child, ast.stmt):
                yield child
                waiting.append(child)


def _text(statement: ast.stmt) -> str:
    """The statement on one line, of a compound one its head."""
    if isinstance(statement, ast.FunctionDef):
        return f"def {statement.name}({ast.unparse(statement.args)})"
    text = ast.unparse(statement)
    return text.split(":\n")[0] if hasattr(statement, "body") else text.replace("\n", " ")


def _difference(was: str, becomes: str) -> tuple[str, str]:
    """Both without a long common beginning and end: the change, and what tells where it is."""
    start = _common(was, becomes)
    end = _common(was[start:][::-1], becomes[start:][::-1])
    start, end = max(start - 30, 0), max(end - 30, 0)
    return was[start : len(was) - end], becomes[start : len(becomes) - end]


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _put(holder: Any, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(holder, field, node)
    else:
        getattr(holder, field)[index] = node


class Suite:
    """What each test enters and how long it takes (first run), or the tests of one mutant, quickest first."""

    def __init__(self, wanted: list[str] | None = None) -> None:
        self.wanted = wanted
        self.entered: dict[str, list[tuple[str, int]]] = {}
        self.seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.wanted is not None:
            rank = {name: place for place, name in enumerate(self.wanted)}
            items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.wanted is not None and report.failed:
            os._exit(1)  # noticed; nothing of this process is wanted any more

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.wanted is not None:
            os._exit(exitstatus)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.wanted is not None:
            return (yield)
        found: set[tuple[str, int]] = set()
        here = str(HEART)

        def note(frame: FrameType, event: str, argument: object) -> None:
            if frame.f_code.co_filename.startswith(here):
                code = frame.f_code
                found.add((Path(code.co_filename).relative_to(HEART).as_posix(), code.co_firstlineno))

        start = time.process_time()
        sys.settrace(note)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.process_time() - start
            self.entered[item.nodeid] = sorted(found)


def forked(work: Any) -> int:
    """Runs `work() -> int` in a process of its own → its exit code; 128 and more: it was ended by a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            code = int(work())
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def run_pytest(suite: Suite, files: list[str], scratch: str) -> int:
    options = ["-x", "-q", "--assert=plain", "-m", "not slow", "--rootdir", str(TESTS.parent), "--basetemp", scratch]
    without = ("cacheprovider", "unraisableexception", "threadexception", "faulthandler")
    return int(pytest.main([*options, *(f"-pno:{name}" for name in without), *files], plugins=[suite]))


def first_run() -> tuple[dict[str, list[list[Any]]], dict[str, float]]:
    """The whole suite on the code as it is; it has to pass."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "suite.json"

        def work() -> int:
            suite = Suite()
            code = run_pytest(suite, [str(SUITE)], f"{folder}/pytest")
            told.write_text(json.dumps([suite.entered, suite.seconds]))
            return code

        if forked(work) != 0:
            sys.exit("the suite does not pass on the code as it is: run pytest on it first")
        entered, seconds = json.loads(told.read_text())
        return entered, seconds


def batches(mutant: Mutant, entered: dict[str, list[list[Any]]], seconds: dict[str, float]) -> list[list[str]]:
    """The tests that enter its function (outside of functions, as for defaults and tables: all), quickest first.

    Those of the file that enters it most often are a batch of their own: usually no other has to be loaded.
    """

    def times(name: str) -> int:
        first, last = mutant.span or (0, 10**6)
        return sum(file == mutant.file and first <= line <= last for file, line in entered[name])

    concerned = sorted((name for name in seconds if mutant.span is None or times(name)), key=lambda name: seconds[name])
    by_file: dict[str, int] = defaultdict(int)
    for name in concerned:
        by_file[name.split("::")[0]] += times(name)
    nearest = max(by_file, key=lambda file: by_file[file], default="")
    parts = [[name for name in concerned if name.startswith(f"{nearest}::") == near] for near in (True, False)]
    return [part for part in parts if part]


def survives(mutant: Mutant, tests: list[str], scratch: str) -> bool:
    parts = Path(mutant.file).with_suffix("").parts
    module = ".".join(["klimb", "objective", *(part for part in parts if part != "__init__")])
    usual = importlib.machinery.SourceFileLoader.get_code

    def work() -> int:
        def get_code(self: Any, name: str) -> Any:
            return mutant.code if name == module else usual(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        files = sorted({str(TESTS.parent / name.split("::")[0]) for name in tests})
        return run_pytest(Suite(tests), files, scratch)

    return forked(work) == 0


def equivalents() -> dict[tuple[str, str, str, str], str]:
    listed = tomllib.loads((TESTS / "mutants.toml").read_text(encoding="utf-8")).get("equivalent", [])
    return {(e["file"], e["function"], e["was"], e["becomes"]): e["why"] for e in listed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="names in src/klimb/objective (default: all)")
    parser.add_argument("--count", type=int, help="try a sample of this many")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(HEART.parents[1]))
    import klimb.batch  # torch and what lies below the heart: loaded once, before any fork
    import klimb.native  # noqa: F401

    gc.freeze()
    entered, seconds = first_run()
    paths = [HEART / name for name in asked.files] or sorted(
        path for path in HEART.rglob("*.py") if path != HEART / "__init__.py"
    )
    found = [mutant for path in paths for mutant in mutants(path)]
    same = equivalents()
    for key in same.keys() - {mutant.key for mutant in found}:
        if HEART / key[0] in paths:
            print(f"mutants.toml: no such mutant any more: {key}")
    chosen = [mutant for mutant in found if mutant.key not in same]
    print(f"{len(found)} mutants, {len(found) - len(chosen)} of them listed as equivalent; {len(seconds)} tests")
    if asked.count is not None:
        chosen = random.Random(asked.seed).sample(chosen, min(asked.count, len(chosen)))
    left = survivors(chosen, entered, seconds)
    share = 1 - left / max(len(chosen), 1)
    print(f"tried {len(chosen)}, noticed {len(chosen) - left} ({share:.1%}), {left} survive")
    sys.exit(int(share < WANTED))


def survivors(chosen: list[Mutant], entered: dict[str, list[list[Any]]], seconds: dict[str, float]) -> int:
    """How many no test noticed; each is printed when it is found."""
    start, count = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        for done, mutant in enumerate(chosen, 1):
            if all(survives(mutant, tests, f"{scratch}/pytest") for tests in batches(mutant, entered, seconds)):
                count += 1
                print(
                    f"{mutant.file}:{mutant.line} {mutant.function}\n  - {mutant.was}\n  + {mutant.becomes}", flush=True
                )
            if done % 50 == 0:
                print(f"{done} of {len(chosen)}, {count} survive, {time.monotonic() - start:.0f} s", flush=True)
    return count


if __name__ == "__main__":
    main()
