"""Changes to the source of a module, one at a time: what a formula may be mistaken for."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

HEART = Path(__file__).resolve().parents[1] / "src" / "klimb" / "objective"


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
    def module(self) -> str:
        parts = Path(self.file).with_suffix("").parts
        return ".".join(["klimb", "objective", *(part for part in parts if part != "__init__")])

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
LAYOUT = ("shape", "device", "dtype")
"""Of a tensor, what its numbers do not change; nor do they where only the layout is taken, as in x.expand_as(y)."""


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
    if isinstance(node, ast.Attribute) and node.attr in LAYOUT:
        return
    like = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("_like", "_as"))
    for field, value in ast.iter_fields(node):
        if (
            (like and field == "args")
            or field in ("annotation", "returns", "decorator_list")
            or (isinstance(node, ast.keyword) and node.arg in SHAPE)
        ):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr) or not isinstance(
                child, ast.AST
            ):
                continue
            counts = (isinstance(node, ast.Attribute) and node.attr in ("sum", "any")) or (
                isinstance(node, ast.Call) and ast.unparse(node.func) == "len"
            )
            counted = counts and ast.unparse(child).endswith("mask")
            if isinstance(child, ast.expr) and not counted:  # a shift along the tokens leaves their count as it is
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
