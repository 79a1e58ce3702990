"""What wraps klimb's functions by name has to find them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_lines_of_the_breakdown_add_up_to_the_step(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "breakdown.py", "--size", "S", "--steps", "1", "--threads", "1", "--json", str(figures)]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    spent = {line["line"]: line["ms"] for line in found["lines"]}
    assert sum(spent.values()) == pytest.approx(found["step_ms"], rel=1e-3)
    assert all(spent[line] > 0 for line in spent)
    assert spent["everything else"] < 0.2 * found["step_ms"]  # what is timed by nobody
