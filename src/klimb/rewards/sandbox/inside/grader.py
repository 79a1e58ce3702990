"""The grader's process: it holds the tests and what they expect, and asks the candidate's process for values.

The test's ``check(candidate)`` gets a function that sends its arguments to the candidate and returns plain data
(see wire.py). Each assertion is counted, so that part of the tests can give part of the score; an assertion that
holds counts only where the candidate has been asked since the one before.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
from collections.abc import Callable
from typing import Any

from .wire import LENGTH, NotPlain, TooLarge, decode, encode, read_exactly, read_frame, write_frame

JOB, VERDICT, REQUESTS, REPLIES = 3, 4, 5, 6
PASSED, FAILED = "__klimb_passed__", "__klimb_failed__"


class Stop(BaseException):
    """An assertion failed, and one is enough."""


class Broken(BaseException):
    """The test fails by itself, before it has asked the candidate for anything."""


class Unfit(Exception):
    """The candidate's process ended, or its answer is no plain value."""


def serve() -> None:
    """Read the job, grade, and write {"nonce", "verdict", "passed", "failed", "why"}."""
    (length,) = LENGTH.unpack(read_exactly(JOB, LENGTH.size))
    job = json.loads(read_exactly(JOB, length))
    tally = Tally(stop=not job["partial"])
    try:
        graded(job, tally)
        verdict, why = tally.verdict()
    except NotPlain as error:
        verdict, why = "abstain", f"an argument of the test cannot be sent to the candidate: {error}"
    except Broken as error:
        verdict, why = "error", str(error)
    except BaseException as error:  # of the test's, or made by answers that it could not take
        verdict, why = "wrong" if tally.asked else "error", f"the test ends by {type(error).__name__}"
    told = {"verdict": verdict, "passed": tally.passed, "failed": tally.failed, "why": why[:500]}
    write_frame(VERDICT, {"nonce": job["nonce"], **told})


class Tally:
    """Assertions that held and that did not, and how often the candidate was asked."""

    def __init__(self, stop: bool) -> None:
        self.passed = self.failed = self.asked = 0
        self.why = ""
        self._stop = stop
        self._counted = 0

    def hold(self) -> None:
        if self.asked > self._counted:
            self.passed += 1
            self._counted = self.asked

    def fail(self, error: Exception, line: int) -> None:
        if not self.asked:
            raise Broken(f"the test fails before it asks the candidate: {type(error).__name__}: {error}") from error
        self.failed += 1
        self._counted = self.asked
        self.why = self.why or f"line {line} of the test: {type(error).__name__}: {error}".removesuffix(": ")
        if self._stop:
            raise Stop

    def verdict(self) -> tuple[str, str]:
        if self.failed:
            return "wrong", self.why
        return ("ok", "") if self.passed else ("error", "the test asserts nothing about the candidate")


def graded(job: dict[str, Any], tally: Tally) -> None:
    """Run the test against the candidate. Raises Broken, NotPlain."""
    before = next(filter(None, map(definitions, job["prompts"])), "")
    names: dict[str, Any] = {"__name__": "test", PASSED: tally.hold, FAILED: tally.fail}
    try:
        tree = ast.parse(job["test"])
        tree.body = counted(tree.body)
        exec(compile(before, "prompt.py", "exec"), names)
        exec(compile(tree, "test.py", "exec", optimize=0), names)
    except Exception as error:
        raise Broken(f"the test cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(names.get("check")):
        raise Broken("the test defines no function check(candidate)")
    check, candidate = names["check"], proxy(tally)
    names[job["entry"]] = candidate  # tests call it by its name too
    with contextlib.suppress(OSError):  # it has died already; the first call says so
        write_frame(REQUESTS, {"before": before, "code": job["code"], "entry": job["entry"]})
    try:
        check(candidate)
    except Stop:
        pass
    except Exception as error:
        tally.fail(error, 0)


def definitions(prompt: str) -> str:
    """`prompt` where it is Python that defines something, as HumanEval's are, ready to be continued; else nothing."""
    try:
        body = ast.parse(prompt).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    if not any(isinstance(part, ast.FunctionDef | ast.ClassDef) for part in body):
        return ""
    return prompt if prompt.endswith("\n") else f"{prompt}\n"


def counted(statements: list[ast.stmt], check: bool = False) -> list[ast.stmt]:
    """Every assertion, and every other statement right below check(), tells the tally whether it held."""
    plain = ast.FunctionDef | ast.ClassDef | ast.Return | ast.Global | ast.Import | ast.ImportFrom
    done: list[ast.stmt] = []
    for statement in statements:
        named = isinstance(statement, ast.FunctionDef) and statement.name == "check"
        for holder in (statement, *getattr(statement, "handlers", ())):
            for field in ("body", "orelse", "finalbody"):
                if inner := getattr(holder, field, None):
                    setattr(holder, field, counted(inner, named))
        if isinstance(statement, ast.Assert):
            statement = guarded(statement, PASSED)
        elif check and not isinstance(statement, plain):
            statement = guarded(statement, "")
        done.append(statement)
    return done


def guarded(statement: ast.stmt, held: str) -> ast.Try:
    """try: statement; except Exception as _error: FAILED(_error, its line); else: held()."""
    where = {"lineno": statement.lineno, "col_offset": 0, "end_lineno": statement.lineno, "end_col_offset": 0}

    def call(name: str, *arguments: ast.expr) -> ast.Expr:
        function = ast.Name(name, ast.Load(), **where)
        return ast.Expr(ast.Call(function, list(arguments), [], **where), **where)

    failed = call(FAILED, ast.Name("_error", ast.Load(), **where), ast.Constant(statement.lineno, None, **where))
    handler = ast.ExceptHandler(ast.Name("Exception", ast.Load(), **where), "_error", [failed], **where)
    return ast.Try([statement], [handler], [call(held)] if held else [], [], **where)


def proxy(tally: Tally) -> Callable[..., Any]:
    """The candidate as the test sees it."""

    def candidate(*args: Any, **kwargs: Any) -> Any:
        request = {"args": encode(list(args)), "kwargs": encode(kwargs)}
        tally.asked += 1
        try:
            write_frame(REQUESTS, request)
            answer = read_frame(REPLIES)
            if "value" in answer:
                return decode(answer["value"])
            kind, said = answer["raised"] if "raised" in answer else ("", answer["unfit"])
        except TooLarge as error:
            raise Unfit(f"an argument of {error}") from None
        except (EOFError, OSError):
            raise Unfit("the candidate's process ended") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError):
            raise Unfit("the candidate's answer is nonsense") from None
        raise expected(kind)(str(said)[:500])

    return candidate


def expected(name: Any) -> type[Exception]:
    """A builtin exception by name, for tests that want one. Not all: at a StopIteration a loop would end in silence."""
    found = getattr(builtins, str(name), None)
    plain = (ValueError, TypeError, LookupError, ArithmeticError)
    if isinstance(found, type) and issubclass(found, plain) and not issubclass(found, UnicodeError):
        return found
    return Unfit
