"""Every mistake gets one line that says what, where and how to mend it; no traceback, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_inputs import CASES, Bad, furnish, line
from world import World, klimb, write

ERRORS = Path(__file__).parents[2] / "docs" / "ERRORS.md"
ALL = [bad for cases in CASES.values() for bad in cases]


def contents(folder: Path) -> dict[str, bytes]:
    """What a person would miss. A lock is the process's own."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


@pytest.mark.parametrize(
    "bad", [pytest.param(bad, id=f"{chapter}: {bad.situation}") for chapter, cases in CASES.items() for bad in cases]
)
def test_one_clear_line(bad: Bad, world: World, here: Path) -> None:
    furnish(here, world)
    bad.prepare()
    before = contents(here)
    said = bad.say()
    assert said.code in (1, 2)
    assert said.out == ""
    assert said.err.startswith("klimb: ")
    assert said.err.count("\n") == 1, "more than one line"
    assert [name for name in bad.names if name not in said.err] == []
    after = contents(here)
    assert {name for name in before if after.get(name) != before[name]} == set()
    documented = ERRORS.read_text(encoding="utf-8").splitlines()
    row = line(bad, said.err) if not bad.foreign else f"| {bad.situation} | `"
    assert any(text.startswith(row) for text in documented), (
        "write docs/ERRORS.md anew: python tests/stages/bad_inputs.py"
    )


def test_the_documented_mistakes_are_these() -> None:
    rows = [
        text.split("|")[1].strip() for text in ERRORS.read_text(encoding="utf-8").splitlines() if text.startswith("| ")
    ]
    assert [row for row in rows if row] == [bad.situation for bad in ALL]


def test_several_bad_rows_are_listed_below_the_line(world: World, here: Path) -> None:
    write(here / "bad.jsonl", [{"prompt": "a ?", "completion": completion} for completion in ("b", "", "c", "")])
    said = klimb("sft", f"model={world.model}", "data=bad.jsonl", "--json")
    first, *others = said.err.splitlines()
    assert first == (
        "klimb: bad.jsonl: 2 of 4 rows cannot be used, the first: bad.jsonl:2: completion is empty; mend them or set "
        "on_bad=drop"
    )
    assert others == ["  bad.jsonl:2: completion is empty", "  bad.jsonl:4: completion is empty"]


def test_what_the_line_proposes_helps(world: World, here: Path) -> None:
    """`on_bad=drop`: the row goes, and the run says which one and why."""
    write(here / "bad.jsonl", [{"prompt": "a ?", "completion": "b"}, {"prompt": "b ?", "completion": ""}])
    said = klimb(
        "sft",
        f"model={world.model}",
        "data=bad.jsonl",
        "on_bad=drop",
        "steps=1",
        "batch_size=2",
        "threads=1",
        "out=run",
    )
    assert said.code == 0
    assert "1 of them dropped, the first: bad.jsonl:2: completion is empty" in said.err
    assert "bad.jsonl:2: completion is empty" in (here / "run" / "events.jsonl").read_text()


def test_a_failing_row_is_recorded_and_a_failing_share_stops_the_run(world: World, here: Path) -> None:
    reward = here / "fragile.py"
    reward.write_text("def score(completions):\n    return [1 / len(c.split()) for c in completions]\n")
    run = (
        "grpo",
        f"model={world.model}",
        f"data={world.prompts}",
        f"reward={reward}:score",
        "steps=3",
        "max_tokens=3",
        "prompts_per_step=6",
        "samples_per_prompt=8",
        "threads=1",
    )
    tolerant = klimb(*run, "failure_limit=0.9", "out=tolerant")
    assert tolerant.code == 0
    events = (here / "tolerant" / "events.jsonl").read_text()
    assert "ZeroDivisionError: division by zero (fragile.py:2)" in events
    assert "Traceback" in events  # for whoever has to mend the function
    strict = klimb(*run, "failure_limit=0", "out=strict")
    assert strict.code == 1
    assert "ZeroDivisionError" in strict.err.splitlines()[-1]
    assert "Traceback" not in strict.err
    assert (here / "strict" / "events.jsonl").exists()


def test_a_mistake_in_the_middle_of_a_recipe_keeps_what_came_before(world: World, here: Path) -> None:
    stage = f"  sft: {{stage: sft, model: '{world.model}', data: '{world.demonstrations}', steps: 2, batch_size: 4}}\n"
    own = "model: '${sft.model}', reward: 'mine.py:score', max_tokens: 4, steps: 1"
    bad = f"  rl: {{stage: rl, data: '{world.prompts}', {own}}}\n"
    (here / "two.yaml").write_text(f"name: two\nthreads: 1\ndevice: cpu\nstages:\n{stage}{bad}")
    said = klimb("run", "two.yaml", "out=run", "--json")
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "mine.py:score" in said.err
    (here / "mine.py").write_text("def score(completions):\n    return [float(len(c)) for c in completions]\n")
    said = klimb("run", "two.yaml", "out=run")
    assert said.code == 0
    assert "run/sft: finished before, nothing has changed" in said.err
