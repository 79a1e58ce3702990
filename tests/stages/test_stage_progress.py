"""What is seen while a stage runs: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from world import World

from klimb import cli
from klimb.stages import progress

CURSOR_UP, COLOUR = re.compile(r"\x1b\[\d*A|\r"), re.compile(r"\x1b\[[0-9;]*[1-9][0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a second is to be seen moving; and nothing of this process's own terminal is to matter."""
    monkeypatch.setattr(progress, "_REFRESHES", 200)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")


def grpo(world: World, *more: str, err: io.StringIO) -> str:
    """Runs the command with `err` as its standard error; its standard output."""
    settings = ["reward", "count"], ["steps", "12"], ["prompts_per_step", "6"], ["samples_per_prompt", "8"]
    given = [f"{key}={world.reward(value) if key == 'reward' else value}" for key, value in settings]
    argv = ["klimb", "grpo", f"model={world.model}", f"data={world.prompts}", *given, "max_tokens=4", "threads=1"]
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [*argv, "device=cpu", *more]), contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err), contextlib.suppress(SystemExit),
    ):  # fmt: skip
        cli.main()
    return out.getvalue()


def test_a_terminal_sees_one_live_line(world: World, here: Path) -> None:
    measure = (f"measure.data={world.prompts}", f"measure.gold={world.reward('count')}", "measure.max_tokens=4")
    terminal = Terminal()
    out = grpo(world, *measure, err=terminal)
    seen = terminal.getvalue()
    assert CURSOR_UP.search(seen)
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", seen)]
    moving = [line for line in drawn if line.startswith("grpo ") and "remaining" in line]
    steps = {found[1] for line in moving if (found := re.search(r"step (\d+)/12 ", line))}
    assert len(steps) > 3
    assert any(
        re.search(r"[\d,]+ tokens/s  reward/mean 0\.\d+  kl \S+  loss \S+ +0:00:0\d remaining", x) for x in moving
    )
    assert any(line.startswith("grpo: evaluate ") for line in drawn)
    plain = [line for line in drawn if line.startswith("  step ")]
    assert [line.split("  ")[1] for line in plain] == ["step 12/12"]  # what stays on the screen
    assert out.startswith("method     grpo\n")  # results are results, also beside a live line
    assert "remaining" not in out
    assert seen.rstrip().endswith("\x1b[2K") or "remaining" not in drawn[-1]  # it is gone in the end


@pytest.mark.parametrize(("variable", "value"), [("TERM", "dumb"), (None, None)])
def test_elsewhere_lines_are_plain(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, value: str | None
) -> None:
    """A terminal that cannot move its cursor, and what is no terminal: a pipe, a file, a log."""
    if variable is not None and value is not None:
        monkeypatch.setenv(variable, value)
    err = io.StringIO() if variable is None else Terminal()
    grpo(world, err=err)
    assert "\x1b" not in err.getvalue()
    assert "\r" not in err.getvalue()
    assert "  step 12/12  loss " in err.getvalue()


def test_no_color_takes_the_colour_alone(world: World, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coloured, plain = Terminal(), Terminal()
    grpo(world, err=coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    grpo(world, "seed=1", err=plain)
    assert COLOUR.search(coloured.getvalue())
    assert "remaining" in plain.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3\dm|\x1b\[[0-9;]*38;", plain.getvalue())


def test_programs_and_further_ranks_see_none(world: World, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    grpo(world, "--json", err=err)
    assert err.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    live = progress.live_line("sft")
    assert live is not None
    live.close()
    monkeypatch.setattr(progress, "rank", lambda: 1)
    assert progress.live_line("sft") is None


def test_a_narrow_terminal_keeps_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "64")
    monkeypatch.setattr(sys, "stderr", terminal)
    live = progress.Live("grpo")
    live.begin("grpo", total=150)
    live.step(7, 12345.0, "reward/mean 0.09375  kl 0.001807  loss 2.498e-06")
    terminal.truncate(0)
    live._progress.refresh()
    live.close()
    [line, *_] = [x for x in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).splitlines() if "grpo" in x]
    assert re.search(r"grpo .* step 7/150  12.*… 0:00:00 remaining -:--:--", line)


def test_the_rate_is_that_of_now_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    live = progress.Live("grpo")
    try:
        live.begin("grpo", total=5)
        assert live.text((0, 5)) == "step 0/5"
        live.count(30)
        now[0] += 0.4  # too early to say
        assert live.text((0, 5)) == "step 0/5"
        now[0] += 0.6
        live.count(30)
        assert live.text((0, 5)) == "step 0/5  60 tokens/s"
        live.step(1, 1234.5, "loss 0.5")
        assert live.text((1, 5)) == "step 1/5  1,234 tokens/s  loss 0.5"
        live.begin("grpo: evaluate")
        assert live.text(None) == ""
    finally:
        live.close()


def test_preparing_data_is_seen_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    live = progress.Live("sft")
    preparing = progress.Preparing("sft: data", live, lambda line: None)
    preparing(12345, 0.5)
    live._progress.refresh()
    live.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"sft: data ━+\S* +12,345 rows ", drawn)
    assert "step" not in drawn


def test_preparing_data_elsewhere_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    preparing = progress.Preparing("data", None, said.append)
    for rows in range(1000, 30001, 1000):
        now[0] += 1.0
        preparing(rows, rows / 40000 if rows < 20000 else None)
    assert said == ["  data: 11,000 rows prepared (28%)", "  data: 22,000 rows prepared"]
