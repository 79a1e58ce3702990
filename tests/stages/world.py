"""A world so small that every stage takes a second: fourteen words, a model of a few thousand parameters.

Prompts ask "a ?" … "f ?". A reply is worth the share of its words that are "yes".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from klimb.lab.scratch import make_model, word_tokenizer

LETTERS = ("a", "b", "c", "d", "e", "f")
WORDS = ("?", *LETTERS, "yes", "no", "it", "is", "so", ".")
CONTEXT = 24

REWARDS = '''
import random

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
        folder / "base", tokenizer=word_tokenizer(WORDS), architecture="gpt2", hidden=16, layers=1, heads=2, mlp=32,
        context=CONTEXT, seed=0,
    )  # fmt: skip
    demonstrations = [
        {"prompt": f"{letter} ?", "completion": f"it is {letter} {word} ."} for letter in LETTERS for word in ("so", "no")
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
        write(folder / "demonstrations.jsonl", [*demonstrations[::2], *({"prompt": f"{a} {a} ?", "completion": a} for a in "ab")]),
        write(folder / "prompts.jsonl", [{"prompt": f"{letter} ?", "answer": letter} for letter in LETTERS]),
        write(folder / "preferences.jsonl", preferences),
        str(rewards),
    )


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
