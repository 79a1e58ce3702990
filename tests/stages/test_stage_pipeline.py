"""A recipe whose world or stages change under the same directory: what is made anew, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from world import World, klimb, lines

from klimb.config import dump_config
from klimb.stages.pipeline import prepare_world

MY_WORLD = """
from pathlib import Path

def prepare(out, *, seed, words=(), data=""):
    out.mkdir(parents=True, exist_ok=True)
    texts = [Path(each).read_text() if Path(each).is_file() else each for each in [data, *words]]
    (out / "asked.txt").write_text(" ".join(texts))
    with Path(__file__).with_suffix(".calls").open("a") as calls:
        print(seed, file=calls)
    return {"asked": str(out / "asked.txt")}
"""


def test_a_world_is_made_anew_when_what_it_is_made_of_changed(here: Path) -> None:
    code, data, word = here / "mine.py", here / "data.txt", here / "word.txt"
    code.write_text(MY_WORLD)
    data.write_text("one")
    word.write_text("two")
    spec: dict[str, Any] = {"name": f"{code}:prepare", "data": str(data), "words": ["word.txt", "plain"]}

    def made(seed: int = 0) -> tuple[str, int]:
        """What the world holds, and how often one was made so far."""
        world = prepare_world(spec, here / "world", seed, lambda line: None)
        return Path(world["asked"]).read_text(), len((here / "mine.calls").read_text().splitlines())

    assert made() == ("one two plain", 1)
    assert made() == ("one two plain", 1)
    data.write_text("three")
    assert made() == ("three two plain", 2)
    word.write_text("four")
    assert made() == ("three four plain", 3)
    code.write_text(MY_WORLD + "\n# mended\n")
    assert made() == ("three four plain", 4)
    assert made(seed=1) == ("three four plain", 5)
    assert made(seed=1) == ("three four plain", 5)
    data.touch()  # newer, but the same
    assert made(seed=1) == ("three four plain", 5)


def test_a_world_that_was_not_finished_is_not_believed(here: Path) -> None:
    """Changed, cut off while it is made anew, and changed back: half of its files are the other world's."""
    code, data = here / "mine.py", here / "data.txt"
    code.write_text(MY_WORLD.replace("    return", "    assert texts[0] != 'broken'\n    return"))
    spec = {"name": f"{code}:prepare", "data": str(data)}
    for text in ("whole", "broken", "whole"):
        data.write_text(text)
        try:
            world = prepare_world(spec, here / "world", 0, lambda line: None)
        except AssertionError:
            assert text == "broken"
    assert Path(world["asked"]).read_text() == "whole"


def recipe(world: World, **changes: dict[str, Any]) -> dict[str, Any]:
    """sft → dpo → look, and beside them a stage that uses nothing of theirs."""
    small = {"steps": 2, "batch_size": 4}
    stages: dict[str, dict[str, Any]] = {
        "sft": {"stage": "sft", "model": world.model, "data": world.demonstrations, **small},
        "judge": {"stage": "reward", "model": world.model, "data": world.preferences, **small},
        "dpo": {"stage": "preference", "model": "${sft.model}", "data": world.preferences, **small},
        "look": {
            "stage": "evaluate",
            "model": "${dpo.model}",
            "measure": {"data": world.prompts, "gold": "length", "max_tokens": 4, "samples_per_prompt": 2},
        },
    }
    for stage, settings in changes.items():
        stages[stage] |= settings
    return {"name": "story", "out": "out", "threads": 1, "device": "cpu", "stages": stages}


class Story:
    """The recipe as a file, and the directory it runs in."""

    def __init__(self, world: World, here: Path) -> None:
        self.world, self.file, self.out = world, here / "story.yaml", here / "out"

    def run(self, *flags: str, **changes: dict[str, Any]) -> Any:
        self.file.write_text(dump_config(recipe(self.world, **changes)))
        return klimb("run", str(self.file), *flags)

    def begun(self) -> dict[str, int]:
        """When each stage that is there now began: a run writes its config once."""
        return {path.parent.name: path.stat().st_mtime_ns for path in self.out.glob("*/config.yaml")}

    def anew(self, before: dict[str, int]) -> set[str]:
        return {stage for stage, time in self.begun().items() if before[stage] != time}


@pytest.fixture
def story(world: World, here: Path) -> Story:
    made = Story(world, here)
    assert made.run().code == 0
    return made


def test_a_changed_stage_is_refused_with_what_differs_and_what_would_help(story: Story) -> None:
    before = story.begun()
    refused = story.run(dpo={"steps": 3})
    assert refused.code == 1
    assert refused.err.splitlines()[-1] == (
        "klimb: out/dpo: holds a run of another config or input: steps: 2 → 3; --changed deletes and restarts dpo (and "
        "look, where the inputs then differ) and keeps the others; --fresh restarts all; or choose another out"
    )
    assert story.anew(before) == set()
    refused = story.run(look={"seed": 3})
    assert "; --changed deletes and restarts look and keeps the others; " in refused.err


def test_changed_stages_and_what_uses_them_are_made_anew_and_no_others(story: Story) -> None:
    before = story.begun()
    done = story.run("--changed", dpo={"steps": 3})
    assert done.code == 0, done.err
    assert story.anew(before) == {"dpo", "look"}
    assert "out/dpo: started anew, what it held is deleted: steps: 2 → 3" in done.err
    assert "out/look: started anew, what it held is deleted: model: its content changed" in done.err
    assert len(lines(story.out / "dpo" / "metrics.jsonl")) == 3
    before = story.begun()
    again = story.run("--changed", dpo={"steps": 3})  # nothing is left to change
    assert again.err.count("finished before, nothing has changed") == 4
    assert story.anew(before) == set()
    assert again.out == done.out
    # The same weights under another method's name: what uses them has nothing to do.
    assert story.run("--changed", dpo={"steps": 3, "method": "DPO"}).code == 0
    assert story.anew(before) == {"dpo"}


def test_fresh_starts_all_anew(story: Story) -> None:
    before = story.begun()
    assert story.run("--fresh", dpo={"steps": 3}).code == 0
    assert story.anew(before) == {"sft", "judge", "dpo", "look"}
    both = story.run("--fresh", "--changed")
    assert both.code == 1
    why = "one restarts all stages, the other some"
    assert both.err == f"klimb: command line: --fresh and --changed: {why}; leave one of them out\n"


def test_changed_data_of_a_world_reach_the_stages_that_use_them(world: World, here: Path) -> None:
    code, data = here / "mine.py", here / "data.jsonl"
    code.write_text(
        "def prepare(out, *, seed, data):\n"
        "    out.mkdir(parents=True, exist_ok=True)\n"
        "    (out / 'rows.jsonl').write_text(open(data).read())\n"
        "    return {'rows': str(out / 'rows.jsonl')}\n"
    )
    data.write_text(Path(world.demonstrations).read_text())
    made = recipe(world, sft={"data": "${world.rows}"})
    made["world"] = {"name": f"{code}:prepare", "data": str(data)}
    del made["stages"]["judge"]
    (here / "story.yaml").write_text(dump_config(made))
    assert klimb("run", "story.yaml").code == 0
    data.write_text("".join(Path(world.demonstrations).read_text().splitlines(keepends=True)[:4]))
    refused = klimb("run", "story.yaml")
    assert "out/sft: holds a run of another config or input: data: its content changed; --changed" in refused.err
    assert klimb("run", "story.yaml", "--changed").code == 0
    manifest = json.loads((here / "out" / "sft" / "manifest.json").read_text())
    assert manifest["inputs"]["data"]["source"] == "out/world/rows.jsonl"
    assert len((here / "out" / "world" / "rows.jsonl").read_text().splitlines()) == 4
