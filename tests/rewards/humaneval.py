"""HumanEval in the sandbox: canonical solutions and ten broken variants of each, as a confusion matrix.

As a script: ``python tests/rewards/humaneval.py HumanEval.jsonl.gz [TIER …]`` prints a matrix, and checks a second.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from klimb.rewards.sandbox import Sandbox
from klimb.rewards.sandbox.tiers import TIERS, attacked

_RIGHT = "\n\n_right = {entry}\n\ndef {entry}(*args, **kwargs):\n    {body}\n"
_OFF = """

def _off(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return {str: lambda: value + "x", list: lambda: value + [0], tuple: lambda: (*value, 0), dict: lambda: {0: 0}}[
        type(value)]()
"""
_EQUAL = "class Equal:\n        def __eq__(self, other): return True\n    return Equal()"
_FORGE = """import json, os, struct
    for told in ({"verdict": "ok", "passed": 99, "failed": 0, "why": "", "nonce": ""}, {"value": True}):
        body = json.dumps(told).encode()
        for fd in range(1, 32):
            try: os.write(fd, struct.pack(">I", len(body)) + body)
            except OSError: pass
    print("passed")"""


def broken(problem: dict[str, Any]) -> dict[str, str]:
    """Ten programs that solve the problem almost, not at all, or by cheating, by what is wrong with them."""
    right, entry = problem["prompt"] + problem["canonical_solution"], problem["entry_point"]

    def instead(body: str) -> str:
        return right + _OFF + _RIGHT.format(entry=entry, body=body)

    return {
        "no body": f"def {entry}(*args):\n    pass\n",
        "raises": instead("raise ValueError(_right(*args, **kwargs))"),
        "does not compile": right + "\n)\n",
        "off by one": instead("return _off(_right(*args, **kwargs))"),
        "without its last statement": unfinished(right, entry),
        "in a list": instead("return [_right(*args, **kwargs)]"),
        "equal to everything": instead(_EQUAL),
        "exits with 0": instead("import os; os._exit(0)"),
        "loops for ever": instead("while True: pass"),
        "forges a verdict": instead(_FORGE),
    }


def problems(path: str | Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def unfinished(code: str, entry: str) -> str:
    tree = ast.parse(code)
    for part in tree.body:
        if isinstance(part, ast.FunctionDef) and part.name == entry:
            part.body = [*part.body[:-1], ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree))


def matrix(patient: Sandbox, impatient: Sandbox, rows: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """How often each kind of program got each verdict; what loops goes to the impatient one."""
    jobs = [("canonical", row, row["canonical_solution"]) for row in rows]
    jobs += [(name, row, code) for row in rows for name, code in broken(row).items()]

    def verdict(job: tuple[str, dict[str, Any], str]) -> tuple[str, str]:
        name, row, code = job
        box = impatient if name == "loops for ever" else patient
        found = box.check(code, row["test"], prompts=[row["prompt"]], entry=row["entry_point"])
        if (found.kind == "ok") != (name == "canonical"):
            print(row["task_id"], name, found)
        return name, found.kind

    found: dict[str, Counter[str]] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for name, kind in threads.map(verdict, jobs):
            found.setdefault(name, Counter())[kind] += 1
    return found


def speed(sandbox: Sandbox, rows: list[dict[str, Any]], rounds: int) -> str:
    """Canonical solutions, over and over, on all cores."""
    before, started = _cpu(sandbox), time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(lambda row: sandbox.check(row["canonical_solution"], row["test"], prompts=[row["prompt"]],
                                                   entry=row["entry_point"]), rows * rounds))  # fmt: skip
    wall, cpu, n = time.perf_counter() - started, _cpu(sandbox) - before, len(rows) * rounds
    return f"{n} checks in {wall:.2f} s: {n / wall:.0f} a second; {1000 * cpu / n:.1f} ms of CPU each"


def _cpu(sandbox: Sandbox) -> float:
    """Seconds of this process and of the zygote with all children that have ended."""
    total, tree = 0.0, {os.getpid()}
    for _ in range(3):
        tree |= {child for pid in tree for task in Path(f"/proc/{pid}/task").glob("*")
                 for child in map(int, (task / "children").read_text().split())}  # fmt: skip
    for pid in tree:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return total


if __name__ == "__main__":
    tasks = problems(sys.argv[1])
    for tier in sys.argv[2:] or TIERS:
        box, impatient = attacked(tier, 30.0), attacked(tier, 1.0)
        print(f"{tier}: {speed(box, tasks, 1)} (first round)\n{tier}: {speed(box, tasks, 10)}")
        for name, counts in matrix(box, impatient, tasks).items():
            print(f"{name:26} {dict(counts)}")
        box.close()
        impatient.close()
