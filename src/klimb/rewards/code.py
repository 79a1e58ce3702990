"""Code that is run against hidden tests, in the sandbox.

::

    reward: {code: {tests: test, entry_point: entry_point, timeout: 10, partial: false}}

The code is the last fenced block of the completion, else all of it. A prompt that is Python itself, as HumanEval's are,
or has it in such a block, goes before it and before the test. A row's tests are one of

- a text that defines ``check(candidate)``, as HumanEval's do. It runs in a process of its own and reaches the
  candidate by value: arguments and answers are plain data (inside/wire.py), an argument that is changed in place does
  not come back, a function as an argument makes the row unscored (abstain);
- a list of {"input": …, "output": …}: the code as a program, once for each, by what it prints.

With `service: http://HOST:PORT` the programs run there, on a server that speaks SandboxFusion's ``POST /run_code``
(sandbox/fusion.py).

None abstains. 1 where all tests pass, else 0, or their share with `partial`. A timeout counts as 0: it is the
candidate's doing. A test that fails before it has asked the candidate for anything is a failure of the row (error).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

from klimb.errors import RewardError, did_you_mean
from klimb.rewards.combine import sources
from klimb.rewards.protocol import Columns, Failure, Reward, Scores
from klimb.rewards.rules import plain_text
from klimb.rewards.sandbox import Kind, Sandbox, Verdict, open_sandbox
from klimb.types import Text

if TYPE_CHECKING:
    from klimb.rewards.sandbox.fusion import FusionSandbox
    from klimb.rewards.service import Service

AT_ONCE = 16
"""Programs that a service gets at the same time."""


class Options(NamedTuple):
    """1 where the completion's code passes the row's hidden tests, run in the sandbox; 0 where it does not.

    The code is the last fenced block, else all of the completion. A row's tests are a text that defines
    ``check(candidate)``, as HumanEval's do, or a list of {"input": …, "output": …} for a whole program.
    """

    tests: Annotated[str, "column of the tests"] = "test"
    entry_point: Annotated[str | None, "column of the function's name; none: the last of the code"] = None
    timeout: Annotated[float, "seconds for one completion with all its tests"] = 10.0
    partial: Annotated[bool, "the share of tests that pass counts"] = False
    unsafe_local: Annotated[bool, "run without a sandbox where this machine has none"] = False
    service: Annotated[str | None, "url of a SandboxFusion-like server to run it on"] = None
    key_env: Annotated[str | None, "environment variable with the server's API key"] = None


class CodeReward:
    """A Reward. Opens a sandbox, and raises RewardError where there is none."""

    name = "code"
    independent = waits = True

    def __init__(self, options: Options, sandbox: Sandbox | None = None) -> None:
        self._options = options
        self.service: Service | None = None
        self._sandbox: Sandbox | FusionSandbox
        if options.service is not None:
            from klimb.rewards.sandbox.fusion import FusionSandbox

            self._sandbox = FusionSandbox(options.service, options.timeout, options.key_env)
            self.service = self._sandbox.service
        else:
            self._sandbox = sandbox or open_sandbox(options.timeout, unsafe_local=options.unsafe_local)
        self.tier = self._sandbox.tier
        self._threads = ThreadPoolExecutor(AT_ONCE if self.service else _cores(), thread_name_prefix="reward code")

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        tests, entry = self._options.tests, self._options.entry_point
        for name in filter(None, (tests, entry)):
            if name not in columns:
                raise RewardError(
                    f"the data has no column {name!r}", where="reward code", fix=did_you_mean(name, columns)
                )
        entries = columns[entry] if entry else [None] * len(completions)
        verdicts = list(self._threads.map(self.verdict, prompts, completions, columns[tests], entries))
        counts = Counter(dict.fromkeys(get_args(Kind), 0))
        counts.update(verdict.kind for verdict in verdicts)
        failures = [Failure(row, verdict.why) for row, verdict in enumerate(verdicts) if verdict.kind == "error"]
        return Scores([self._score(verdict) for verdict in verdicts], failures, counts=dict(counts))

    def verdict(self, prompt: Text, completion: Text, tests: Any, entry: Any) -> Verdict:
        """Of one row."""
        code, partial = code_of(plain_text(completion)), self._options.partial
        if tests is None or (self._options.entry_point and entry is None):
            return Verdict("abstain", why="the row has no tests")
        if isinstance(tests, str):
            asked = plain_text(prompt)
            return self._sandbox.check(
                code, tests, prompts=(asked, code_of(asked)), entry=str(entry or ""), partial=partial
            )
        if not isinstance(tests, list) or not tests or not all(_is_pair(pair) for pair in tests):
            return Verdict(
                "error", why=f"column {self._options.tests!r} is neither a text nor a list of input and output"
            )
        return self._sandbox.check_program(code, [(pair["input"], pair["output"]) for pair in tests], partial=partial)

    def _score(self, verdict: Verdict) -> float | None:
        if verdict.kind in ("abstain", "error"):
            return None
        if self._options.partial and verdict.passed:
            return verdict.passed / (verdict.passed + verdict.failed)
        return float(verdict.kind == "ok")

    def close(self) -> None:
        self._sandbox.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def parse_code(options: dict[str, Any]) -> CodeReward:
    """The reward `code` with these options. Raises RewardError."""
    where = "reward code"
    for name, value in options.items():
        if name not in Options._fields:
            raise RewardError(f"unknown option {name!r}", where=where, fix=did_you_mean(name, Options._fields))
        if name in ("partial", "unsafe_local") and not isinstance(value, bool):
            raise RewardError(f"{name} is {value!r}", where=where, fix="write true or false")
        if name == "key_env" and not (isinstance(value, str) and value.isidentifier() and value.isupper()):
            raise RewardError(
                "key_env is not the name of an environment variable", where=where, fix="write key_env: MY_API_KEY"
            )
        if name in ("tests", "entry_point") and not (isinstance(value, str) and value):
            raise RewardError(f"{name} is {value!r}", where=where, fix="name a column of the data")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "timeout" and not (number and 0 < value <= 3600):
            raise RewardError(
                f"timeout is {value!r}", where=where, fix="give the seconds of one completion, up to 3600"
            )
    if "key_env" in options and "service" not in options:
        raise RewardError("a key without a service", where=where, fix="leave key_env out")
    if "service" in options and options.get("unsafe_local"):
        raise RewardError("service and unsafe_local", where=where, why="the code runs elsewhere", fix="leave one out")
    return CodeReward(Options(**options))


def sandbox_tier(reward: Reward) -> str | None:
    """The tier that `reward`, or any part of it, runs code in."""
    return next((source.tier for source in sources(reward) if isinstance(source, CodeReward)), None)


def code_of(text: str) -> str:
    """The last closed fenced block, else one that was opened and never closed, else all of `text`."""
    parts = text.split("```")
    if len(parts) == 1:
        return text
    closed = parts[1:-1:2]
    block = closed[-1] if closed else parts[-1]
    language, newline, code = block.partition("\n")
    return code if newline and " " not in language.strip() else block


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, dict) and all(isinstance(pair.get(key), str) for key in ("input", "output"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
