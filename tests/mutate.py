"""Would the tests notice? Every formula of the heart is changed in one place at a time, and its tests have to fail.

    python tests/mutate.py                       all of src/klimb/objective (one process)
    python tests/mutate.py --count 200 --seed 1  a sample
    python tests/mutate.py surrogate.py kl.py    some files
    python tests/mutate.py --keep noticed.jsonl  goes on where it was cut off: what was noticed is not tried again
    python tests/mutate.py kl.py --tests tests/objective/test_kl.py   by some of the tests

A mutant lives in the memory of a forked process and nowhere else. Of the tests it runs those that enter the function
that was changed, quickest first, until one fails; what these let pass is tried again with all modules loaded anew,
and so is a change outside of functions (a default, a table). Survivors that cannot be told apart from the original
are listed with the reason in mutants.toml; any other is a test that is missing. Exit code 1: under 95 % were noticed.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from mutants import HEART, Mutant, mutants

TESTS = Path(__file__).resolve().parent
SUITE = TESTS / "objective"
WANTED = 0.95
CPU_SECONDS = 60
"""What a mutant may take (processor time: a machine that stops the process for a while decides nothing)."""


class Noticed:
    """The mutants that a test has noticed, kept in a file where one is given (to be deleted when the code changes)."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
        self.known = {tuple(json.loads(line)) for line in lines}

    def __contains__(self, mutant: Mutant) -> bool:
        return (*mutant.key, mutant.line) in self.known

    def add(self, mutant: Mutant) -> None:
        if self.file:
            with self.file.open("a", encoding="utf-8") as kept:
                kept.write(json.dumps((*mutant.key, mutant.line), ensure_ascii=False) + "\n")


class Only:
    """Of what is collected the tests of one mutant, quickest first; the process ends with the first that fails."""

    def __init__(self, wanted: list[str]) -> None:
        self.rank = {name: place for place, name in enumerate(wanted)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os._exit(1)  # noticed; nothing of this process is wanted any more

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        os._exit(exitstatus)


class Warm:
    """Collects the suite once, and then forks for each mutant of a function: in the fork it has the other code."""

    def __init__(self, chosen: list[Mutant], told: Path, noticed: Noticed) -> None:
        self.chosen, self.told, self.noticed = chosen, told, noticed
        self.entered: Entered = {}
        self.seconds: dict[str, float] = {}
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.entered:
            os._exit(1)
        self.failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if forked(lambda: self.look(session.items)) != 0:
            sys.exit("the suite does not pass on the code as it is: run pytest on it first")
        self.entered, self.seconds = json.loads(self.told.read_text())
        items, left, start = {item.nodeid: item for item in session.items}, [], time.monotonic()
        for number, mutant in enumerate(self.chosen):
            tests = [items[name] for name in tests_of(mutant, self.entered, self.seconds)]
            if mutant.span is None or not tests or forked(partial(self.changed, mutant, tests)) == 0:
                left.append(number)
            else:
                self.noticed.add(mutant)
            if number % 100 == 99:
                took = f"{time.monotonic() - start:.0f} s"
                print(f"{number + 1} of {len(self.chosen)}, {len(left)} to be tried anew: {took}", flush=True)
        self.told.write_text(json.dumps([self.entered, self.seconds, left]))
        return True

    def look(self, items: list[pytest.Item]) -> int:
        """What each test enters, and how long it takes."""
        for item in items:
            found: set[tuple[str, int]] = set()
            start = time.process_time()
            sys.settrace(partial(_note, found))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            sys.settrace(None)
            self.seconds[item.nodeid] = time.process_time() - start
            self.entered[item.nodeid] = sorted(found)
        self.told.write_text(json.dumps([{name: found for name, found in self.entered.items()}, self.seconds]))
        return int(self.failed)

    def changed(self, mutant: Mutant, items: list[pytest.Item]) -> int:
        try:
            _change(mutant)
        except (AttributeError, KeyError, StopIteration, ValueError):
            return 0  # no function of the module's own: to be tried anew
        for item, following in zip(items, [*items[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return 0


Entered = dict[str, list[tuple[str, int]]]
"""Test → file and first line of every function of the heart that it enters."""


def _note(found: set[tuple[str, int]], frame: FrameType, event: str, argument: object) -> None:
    code = frame.f_code
    if code.co_filename.startswith(str(HEART)):
        found.add((Path(code.co_filename).relative_to(HEART).as_posix(), code.co_firstlineno))


def _change(mutant: Mutant) -> None:
    """Gives the mutant's code to the function that is loaded: whoever imported it has the mutant."""
    holder: Any = sys.modules[mutant.module]
    for name in mutant.function.split("."):
        holder = vars(holder)[name]
        holder = getattr(holder, "fget", None) or getattr(holder, "__func__", None) or holder
        if isinstance(holder, FunctionType):
            break
    assert mutant.span is not None
    waiting = [mutant.code]
    while waiting:
        code = waiting.pop()
        if code.co_firstlineno == mutant.span[0] and code.co_name == holder.__name__:
            holder.__code__ = code
            return
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    raise KeyError(mutant.function)


def forked(work: Callable[[], int], silent: bool = True) -> int:
    """Runs `work` in a process of its own → its exit code; 128 and more: it was ended by a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            if silent:
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
            code = int(work())
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def run_pytest(plugin: object, files: list[str], scratch: Path) -> int:
    options = ["-x", "-qs", "--assert=plain", "-m", "not slow", f"--rootdir={TESTS.parent}", f"--basetemp={scratch}"]
    without = ("cacheprovider", "unraisableexception", "threadexception", "faulthandler")
    return int(pytest.main([*options, *(f"-pno:{name}" for name in without), *files], plugins=[plugin]))


def tests_of(mutant: Mutant, entered: Entered, seconds: dict[str, float]) -> list[str]:
    """Those that enter its function, quickest first; outside of functions (defaults, tables) all."""

    def enters(name: str) -> bool:
        first, last = mutant.span or (0, 0)
        return any(file == mutant.file and first <= line <= last for file, line in entered[name])

    return sorted((n for n in seconds if mutant.span is None or enters(n)), key=lambda name: seconds[name])


def survives(mutant: Mutant, tests: list[str], scratch: Path) -> bool:
    """Where the heart is loaded anew, the mutant in the place of its module."""
    usual = importlib.machinery.SourceFileLoader.get_code

    def work() -> int:
        def get_code(self: Any, name: str) -> Any:
            return mutant.code if name == mutant.module else usual(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        return run_pytest(Only(tests), sorted({str(TESTS.parent / name.split("::")[0]) for name in tests}), scratch)

    return not tests or forked(work) == 0


def survivors(chosen: list[Mutant], tests: list[str], noticed: Noticed) -> int:
    """How many no test noticed; each is printed when it is found."""
    with tempfile.TemporaryDirectory() as folder:
        told, scratch, count = Path(folder) / "told.json", Path(folder) / "pytest", 0
        if forked(lambda: run_pytest(Warm(chosen, told, noticed), tests, scratch), silent=False) != 0:
            sys.exit(1)
        entered, seconds, left = json.loads(told.read_text())
        print(f"{len(seconds)} tests; {len(left)} mutants are tried on a heart that is loaded anew", flush=True)
        for mutant in (chosen[number] for number in left):
            if survives(mutant, tests_of(mutant, entered, seconds), scratch):
                count += 1
                place = f"{mutant.file}:{mutant.line} {mutant.function}"
                print(f"{place}\n  - {mutant.was}\n  + {mutant.becomes}", flush=True)
            else:
                noticed.add(mutant)
    return count


def equivalents() -> dict[tuple[str, str, str, str], str]:
    listed = tomllib.loads((TESTS / "mutants.toml").read_text(encoding="utf-8")).get("equivalent", [])
    return {(e["file"], e["function"], e["was"], e["becomes"]): e["why"] for e in listed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="names in src/klimb/objective (default: all)")
    parser.add_argument("--count", type=int, help="try a sample of this many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="remembers what was noticed, and does not try it again"
    )
    parser.add_argument("--tests", nargs="+", default=[str(SUITE)], help="test files (default: tests/objective)")
    asked = parser.parse_args()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(HEART.parents[1]))
    import klimb.batch  # torch and what lies below the heart: loaded once, before any fork
    import klimb.native  # noqa: F401

    gc.freeze()
    modules = sorted(path for path in HEART.rglob("*.py") if path != HEART / "__init__.py")
    paths = [HEART / name for name in asked.files] or modules
    found = [mutant for path in paths for mutant in mutants(path)]
    same = equivalents()
    for key in same.keys() - {mutant.key for mutant in found}:
        if HEART / key[0] in paths:
            print(f"mutants.toml: no such mutant any more: {key}")
    chosen = [mutant for mutant in found if mutant.key not in same]
    print(f"{len(found)} mutants, {len(found) - len(chosen)} of them listed as equivalent", flush=True)
    if asked.count is not None:
        chosen = random.Random(asked.seed).sample(chosen, min(asked.count, len(chosen)))
    noticed = Noticed(asked.keep)
    left = survivors([mutant for mutant in chosen if mutant not in noticed], asked.tests, noticed)
    share = 1 - left / max(len(chosen), 1)
    print(f"tried {len(chosen)}, noticed {len(chosen) - left} ({share:.1%}), {left} survive")
    sys.exit(int(share < WANTED))


if __name__ == "__main__":
    main()
