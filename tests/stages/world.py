"""A world so small that every stage takes a second: fourteen words, a model of a few thousand parameters.

Prompts ask "a ?" … "f ?". A reply is worth the share of its words that are "yes".
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from klimb import cli
from klimb.lab.scratch import make_model, word_tokenizer
from klimb.stages.registry import run_stage, stage_config

LETTERS = ("a", "b", "c", "d", "e", "f")
WORDS = ("?", *LETTERS, "yes", "no", "it", "is", "so", ".")
CONTEXT = 24

REWARDS = '''
import random
import time

def count(completions, **_):
    """The share of "yes" among the words, 0 of nothing."""
    return [c.split().count("yes") / max(len(c.split()), 1) for c in completions]

STREAM = random.Random(0)

def shuffled(completions, **_):
    """The same numbers, dealt out at random: nothing can be learnt from them."""
    scores = count(completions)
    STREAM.shuffle(scores)
    return scores

def some(prompts, completions, **_):
    """No score where a reply begins with "no", none for any reply to "b ?" but the first."""
    scores = count(completions)
    seen = set()
    for row, (prompt, reply) in enumerate(zip(prompts, completions)):
        if reply.startswith("no") or (prompt == "b ?" and prompt in seen):
            scores[row] = None
        seen.add(prompt)
    return scores

def shaky(completions, **_):
    """No number where a reply begins with "so"."""
    return [float("nan") if c.startswith("so") else score for c, score in zip(completions, count(completions))]

def slow(completions, **_):
    time.sleep(0.03)
    return count(completions)

def settled(completions, **_):
    """Of a beginning, behind which "so" stands: 1 without a "no"; of a whole: 1 where it ends with "yes"."""
    return [float("no" not in c.split() if c.endswith(" so ") else c.endswith("yes")) for c in completions]

def rare(completions, **_):
    """1 where a reply has at least two "yes", so that most groups of an untrained model are all zero."""
    return [float(c.split().count("yes") >= 2) for c in completions]
'''


class World(NamedTuple):
    """Paths as a command line takes them."""

    folder: Path
    model: str
    demonstrations: str
    prompts: str
    preferences: str
    rewards: str

    def reward(self, name: str) -> str:
        return f"{self.rewards}:{name}"


def make_world(folder: Path) -> World:
    model = make_model(
        folder / "base",
        tokenizer=word_tokenizer(WORDS),
        architecture="gpt2",
        hidden=16,
        layers=1,
        heads=2,
        mlp=32,
        context=CONTEXT,
        seed=0,
    )
    demonstrations = [
        {"prompt": f"{letter} ?", "completion": f"it is {letter} {word} ."}
        for letter in LETTERS
        for word in ("so", "no")
    ]
    preferences = [
        {"prompt": f"{letter} ?", "chosen": f"yes {word}", "rejected": f"no {word}"}
        for letter in LETTERS
        for word in ("it", "is", "so")
    ]
    rewards = folder / "rewards.py"
    rewards.write_text(REWARDS)
    return World(
        folder,
        str(model),
        # One reply a prompt, and so a loss that can come down to nothing.
        write(
            folder / "demonstrations.jsonl",
            [*demonstrations[::2], *({"prompt": f"{a} {a} ?", "completion": a} for a in "ab")],
        ),
        write(folder / "prompts.jsonl", [{"prompt": f"{letter} ?", "answer": letter} for letter in LETTERS]),
        write(folder / "preferences.jsonl", preferences),
        str(rewards),
    )


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Played(NamedTuple):
    """What a stage left behind."""

    result: dict[str, Any]
    path: Path
    rows: list[dict[str, Any]]
    """Of metrics.jsonl."""
    said: list[str]

    @property
    def model(self) -> str:
        return str(self.result["model"])

    @property
    def events(self) -> list[dict[str, Any]]:
        return lines(self.path / "events.jsonl")


FAST: dict[str, Any] = {"lr": 1e-2, "betas": [0.9, 0.99]}
SMALL_RL: dict[str, Any] = {"prompts_per_step": 6, "samples_per_prompt": 8, "max_tokens": 4, "optimizer": FAST}


def play(stage: str, out: Path, **values: Any) -> Played:
    """Run one stage in this process."""
    said: list[str] = []
    untrained = ("sample", "evaluate", "evaluate_reward", "average", "label", "revise")
    own = {} if stage in untrained else {"optimizer": FAST}
    config = stage_config(stage, {**own, "device": "cpu", "threads": 1, **values})
    result = run_stage(stage, config, name=stage, out=out, say=said.append)
    return Played(result, out, lines(out / "metrics.jsonl"), said)


class Said(NamedTuple):
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


def klimb(*arguments: str) -> Said:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["klimb", *arguments])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as left:
            code = left.code
    return Said(int(code or 0), out.getvalue(), err.getvalue())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tuned_adapter(world: World, out: Path, lora: dict[str, Any]) -> Played:
    """SFT of an adapter that has learnt something."""
    done = play("sft", out, model=world.model, data=world.demonstrations, steps=30, batch_size=8, lora=lora)
    assert done.rows[-1]["loss"] < done.rows[0]["loss"] - 1
    return done
