"""Programs that run on a server which speaks SandboxFusion's ``POST /run_code`` (github.com/bytedance/SandboxFusion).

Asked with {"code", "language": "python", "stdin", "run_timeout"}, it answers {"status": "Success" | "Failed" |
"SandboxError", "message", "run_result": {"status": "Finished" | "TimeLimitExceeded" | "Error", "stdout", …}, …}.

Only lists of input and output can be tested there. A text that defines ``check`` would run in one process with the
candidate, which could read the expected answers and end with any verdict it likes.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

from klimb.rewards.calling import CallFailed
from klimb.rewards.sandbox.run import MAX_CODE, Verdict, lines_of
from klimb.rewards.service import Down, Service

QUEUE = 20.0
"""Seconds that a program may wait before it runs."""


class FusionSandbox:
    """What a `Sandbox` offers, by a server. `timeout` bounds the run time of one completion, in seconds."""

    tier = "service"

    def __init__(self, url: str, timeout: float, key: str | None = None) -> None:
        self.timeout = timeout
        self.service = Service(f"{url.rstrip('/')}/run_code", timeout=timeout + QUEUE, key=key, where="reward code")

    def check(
        self, code: str, test: str, *, prompts: Sequence[str] = (), entry: str = "", partial: bool = False
    ) -> Verdict:
        return Verdict("error", why="a service runs programs: give tests as a list of input and output")

    def check_program(self, code: str, pairs: Sequence[tuple[str, str]], *, partial: bool = False) -> Verdict:
        """Run `code` once for each (input, expected output); spaces at the ends of lines do not count."""
        if len(code) > MAX_CODE:
            return Verdict("wrong", why=f"the code has {len(code)} characters, more than {MAX_CODE}")
        left, passed, failed, why = self.timeout, 0, 0, ""
        for place, (given, expected) in enumerate(pairs):
            began = time.monotonic()
            try:
                said = self.service.persist(functools.partial(self._run, code, given, left))
            except CallFailed as error:
                return Verdict("error", why=f"the service {error.reason}")
            took = said.get("execution_time")
            if not isinstance(took, int | float) or not 0 <= took < math.inf:
                took = time.monotonic() - began
            left -= took
            if said["status"] == "TimeLimitExceeded" or left <= 0:
                return Verdict("timeout", why=f"no end within {self.timeout:g} s, at test {place}")
            same = lines_of(said["stdout"]) == lines_of(expected)
            passed, failed = passed + same, failed + (not same)
            if not same:
                why = why or f"test {place}: another output"
                if not partial:
                    break
        return Verdict("ok" if passed and not failed else "wrong", passed, failed, why)

    def _run(self, code: str, given: str, left: float, last: bool) -> dict[str, Any]:
        """The run's result. An error of the service's is tried again, unless this is the last try."""
        asked = {"code": code, "language": "python", "stdin": given, "run_timeout": left}
        try:
            reply = self.service.ask(asked, left + QUEUE)
            result = reply.get("run_result") if isinstance(reply, dict) else None
            if not isinstance(result, dict) or reply.get("status") not in ("Success", "Failed"):
                said = str(reply.get("message") or reply.get("status"))[:200] if isinstance(reply, dict) else ""
                raise CallFailed("raised", f"gave no result: {said}" if said else "gave no result")
            if not isinstance(result.get("stdout"), str) or result.get("status") not in (
                "Finished",
                "TimeLimitExceeded",
            ):
                raise CallFailed("raised", "gave a result that is none")
            return result
        except CallFailed as failed:
            if last or failed.kind == "timeout":
                raise
            raise Down(failed.reason) from failed

    def close(self) -> None:
        self.service.close()
