"""The candidate's process: it runs the code, then answers calls. It never sees a test, nor what is expected."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

from .wire import LENGTH, NotPlain, TooLarge, decode, encode, read_exactly, read_frame, write_frame

REQUESTS, REPLIES = 3, 4


def serve() -> None:
    """Run the code of the first frame, then answer {"args", "kwargs"} until the requests end.

    A reply is {"value": …}, {"raised": [type, message]}, or {"unfit": why}. A candidate that writes replies of its own
    has only answered: there is nothing here to tell it which answer is right.
    """
    job = read_frame(REQUESTS)
    function, problem = None, ""
    try:
        names = loaded(job["before"], job["code"])
        entry = job["entry"] or last_function(names)
        function = names.get(entry)
        problem = "" if callable(function) else f"the code defines no function {entry!r}"
    except BaseException as error:
        problem = f"the code fails when it is run: {shown(error)}"
    while True:
        try:
            request = read_frame(REQUESTS)
        except EOFError:
            return
        try:
            answer = {"unfit": problem} if problem else {"value": called(function, request)}
            write_frame(REPLIES, answer)
        except (NotPlain, TooLarge) as error:
            write_frame(REPLIES, {"unfit": f"the answer cannot be compared: {error}"})
        except BaseException as error:  # sys.exit() too
            write_frame(REPLIES, {"raised": [type(error).__name__, shown(error)]})


def called(function: Any, request: dict[str, Any]) -> Any:
    return encode(function(*decode(request["args"]), **decode(request["kwargs"])))


def loaded(before: str, code: str) -> dict[str, Any]:
    """The names that the code defines: as a continuation of `before`, else alone."""
    try:
        program = compile(before + code, "solution.py", "exec")
    except (SyntaxError, ValueError):
        program = compile(code, "solution.py", "exec")
    return executed(program, "solution")


def executed(program: Any, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look there
    exec(program, module.__dict__)
    return module.__dict__


def last_function(names: dict[str, Any]) -> str:
    own = [name for name, value in names.items() if isinstance(value, types.FunctionType)]
    return own[-1] if own else "(none)"


def shown(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # its __str__ is the candidate's too
        return type(error).__name__[:300]


def run_program() -> None:
    """A whole program: descriptor 0 holds its length, its text, then its input; 1 takes what it prints."""
    (length,) = LENGTH.unpack(read_exactly(0, LENGTH.size))
    code = read_exactly(0, length).decode()
    with contextlib.suppress(BaseException):  # what it printed so far counts
        executed(compile(code, "solution.py", "exec"), "__main__")
    sys.stdout.flush()
