"""Progress on a terminal: one live line below what was said. Elsewhere there is none, and plain lines tell the same."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from klimb.runtime.ranks import rank

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

_REFRESHES = 1
"""Redraws a second, by a thread of rich's, 1.5 ms each; what is counted in between costs one addition."""
_PATIENCE = 10.0
"""Seconds between lines about a preparation, where no live line moves."""
_SETTLED = 0.5
"""Seconds from which on the rate of what is going on says more than that of the last step."""


def live_line(name: str) -> Live | None:
    """The live line of a stage where somebody can see it move: on a terminal, drawn by rank 0."""
    if rank() != 0 or not sys.stderr.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return None
    return Live(name)


class Live:
    """`NAME ━━━━  step k/N  tokens/s  figures  elapsed  remaining`, on standard error, gone when it is closed.

    What others print to standard error meanwhile comes to stand above it. NO_COLOR takes its colour, not its place.
    """

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
        from rich.text import Text

        class Figures(ProgressColumn):
            def render(column, task: Task) -> Text:
                steps = (int(task.completed), int(task.total)) if task.total and self._counts_steps else None
                return Text(self.text(steps), no_wrap=True, overflow="ellipsis")  # what a narrow terminal goes without

        self.name = name
        self.tokens = 0
        """Sampled since `phase` was called."""
        self._phase_began = time.perf_counter()
        self._rate: float | None = None
        self._figures = ""
        self._counts_steps = True
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(16), Figures(),
            TimeElapsedColumn(), TextColumn("remaining"), Remaining(),
            console=console, refresh_per_second=_REFRESHES, transient=True, redirect_stdout=False,
        )  # fmt: skip
        self._progress.start()
        console.show_cursor(True)  # a process that is killed could not give it back

    def begin(self, what: str, *, done: int = 0, total: int | None = None, steps: bool = True) -> None:
        """What the line is about from now on: steps of a known number, other work, or one of unknown length (None)."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._counts_steps = steps
        self._rate, self._figures = None, ""
        self.phase()
        self._progress.add_task(what, completed=done, total=total)

    def phase(self) -> None:
        """Something new begins within the step; tokens are counted anew."""
        self.tokens, self._phase_began = 0, time.perf_counter()

    def count(self, tokens: int) -> None:
        """For an engine's `on_tokens`."""
        self.tokens += tokens

    def step(self, step: float, rate: float | None, figures: str) -> None:
        """A step is done: tokens a second of its rollout (else of its training), and what it measured."""
        self._rate, self._figures = rate, figures
        self.phase()
        for task in self._progress.task_ids:
            self._progress.update(task, completed=step)

    def text(self, steps: Any) -> str:
        """What stands between the bar and the times. `steps`: (done, total), or nothing where they are not counted."""
        seconds = time.perf_counter() - self._phase_began
        rate = self.tokens / seconds if self.tokens and seconds > _SETTLED else self._rate
        parts = [f"step {steps[0]}/{steps[1]}" if steps else "", f"{rate:,.0f} tokens/s" if rate else "", self._figures]
        return "  ".join(part for part in parts if part)

    def close(self) -> None:
        self._progress.stop()


class Preparing:
    """How far the preparation of a source is, for `progress` of `klimb.data.load`: the live line, else a line now and
    then. Where it is done within a moment, nothing is said."""

    def __init__(self, what: str, live: Live | None, say: Callable[[str], None]) -> None:
        self._what, self._live, self._say = what, live, say
        self._told = time.monotonic()
        self._begun = False

    def __call__(self, rows: int, fraction: float | None) -> None:
        if self._live is not None:
            if not self._begun:
                self._live.begin(self._what, total=1 if fraction is not None else None, steps=False)
                self._begun = True
            self._live.step(fraction or 0.0, None, f"{rows:,} rows")
        elif time.monotonic() - self._told > _PATIENCE:
            self._told = time.monotonic()
            share = f" ({fraction:.0%})" if fraction is not None else ""
            self._say(f"  {self._what}: {rows:,} rows prepared{share}")


# From Python ----------------------------------------------------------------------------------------------------------


def notebook() -> InPlace | None:
    """Where a notebook runs this, its cell."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return InPlace() if hasattr(shell, "kernel") else None


class InPlace:
    """One line below a notebook's cell: what is said takes the place of what was said before, under the name of the
    stage that it is about."""

    def __init__(self) -> None:
        self._update: Callable[..., None] | None = None
        self._stage = ""

    def __call__(self, line: str) -> None:
        if line.startswith("─"):
            self._stage = line.strip("─ ")
            return
        shown = {"text/plain": f"{self._stage}: {line.strip()}".splitlines()[0][:200]}
        if self._update is not None:
            self._update(shown, raw=True)
        else:
            from IPython.display import display  # whoever calls this runs in it

            self._update = display(shown, raw=True, display_id=True).update
