"""The sandbox in which chat templates run: what one rendering may cost, beside what jinja's own forbids.

jinja keeps a template away from Python's insides, and lets it run for ever: loops within loops, macros that call
themselves, texts that double. Here a turn of a loop and a call are a step each, and filters and operators cost by
the lengths of their values. It is counted and not timed, so a template ends at the same place in any thread and on
any machine. Not bounded is what one operation does that is cheap to write down, as printing a list that holds
itself many times over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, wraps
from types import FunctionType
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 1_000_000
"""A second or two. A conversation of a thousand messages takes some ten thousand, and a million where the template
looks at each of them from each."""
SMALL = 4096
"""Characters of a text that one filter or operator may handle for nothing."""
SIZES: dict[type, int] = {str: 1024, list: 64, tuple: 64, dict: 64, range: 64}
"""How many characters or elements cost a step."""


class TooManySteps(Exception):
    """The template was stopped."""


class _Budget(threading.local):
    left = STEPS


_budget = _Budget()


def _spend(*values: object) -> None:
    """A step, and what the lengths of the values cost."""
    steps = 1
    for value in values:
        if (size := SIZES.get(type(value))) is not None:
            steps += len(value) // size  # type: ignore[arg-type]
        elif isinstance(value, int):
            steps += value.bit_length() >> 13
    _budget.left -= steps
    if _budget.left < 0:
        raise TooManySteps


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # jinja keeps notes on its filters, which are copied with the name
    def paid(*arguments: Any, **named: Any) -> Any:
        if len(arguments) == 1 and not named and type(arguments[0]) is str and len(arguments[0]) < SMALL:
            return function(*arguments)  # the usual case: 'a' | trim
        _spend(*arguments)
        if name not in ("default", "d"):
            _spend(*map(_width, [*arguments[1:], *named.values()]))
        result = function(*arguments, **named)
        _spend(result)
        return result

    return paid


def _width(value: object) -> object:
    """A number that says how long a result gets costs as much as that: 'a'|center(10 ** 9)."""
    return range(max(value, 0)) if isinstance(value, int) else None


def _same(value: Any) -> Any:
    return value


@pass_context  # what depends on a context is not worked out when the template is compiled
def _step(context: Context, value: bool) -> bool:
    _spend()
    return value


class _Counting(NodeTransformer):
    """Puts a step into each turn of a loop, and one behind each `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        step = nodes.Filter(nodes.Const(True), "step", [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step))
        if node.test is not None:
            node.test = nodes.And(step, node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(node, "same", [], [], None, None, lineno=node.lineno)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which all that runs is paid for."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def from_string(self, *arguments: Any, **named: Any) -> Template:
        """Called once, when all filters are in place."""
        self.filters = {name: _paid(name, each) for name, each in {**self.filters, "same": _same}.items()}
        self.filters["step"] = _step
        return super().from_string(*arguments, **named)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call(self, context: Context, callee: Any, /, *arguments: Any, **named: Any) -> Any:
        _spend(*arguments)
        if isinstance(getattr(callee, "__self__", None), str):
            _spend(*map(_width, arguments))
        result = super().call(context, callee, *arguments, **named)
        _spend(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":  # the usual one
            result = left + right
            if type(result) is not str or len(result) > SMALL:
                _spend(result)
            return result
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if type(one) in SIZES and isinstance(other, int):
                    _spend(range(len(one) * max(other, 0)))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _spend(range(left.bit_length() * max(right, 0)))
        result = super().call_binop(context, operator, left, right)
        _spend(result)
        return result

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        texts = list(parts)
        _spend(range(sum(map(len, texts)) // 16))
        return "".join(texts)


@cache
def _render() -> Callable[..., tuple[list[str], list[list[tuple[int, int]]]]]:
    """transformers' own rendering in this sandbox: its functions, in which two names mean something else."""
    from transformers.utils import chat_template_utils as theirs

    names = {**vars(theirs), "ImmutableSandboxedEnvironment": BoundedEnvironment}
    compiled = FunctionType(theirs._cached_compile_jinja_template.__code__, names)
    their_render = theirs.render_jinja_template
    render = FunctionType(their_render.__code__, {**names, "_compile_jinja_template": lru_cache(compiled)})
    render.__defaults__, render.__kwdefaults__ = their_render.__defaults__, their_render.__kwdefaults__
    return render


def render_template(**arguments: Any) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """As transformers' `render_jinja_template`. Raises TooManySteps, and whatever a template raises."""
    _budget.left = STEPS
    return _render()(**arguments)
