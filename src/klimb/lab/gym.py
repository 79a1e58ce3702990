"""Tasks of reasoning-gym as a world: questions to train on, others to measure on, and the scorer.

::

    world: {name: gym, task: chain_sum, train: 2000, test: 200, max_terms: 3}
    stages:
      grpo: {stage: rl, data: "${world.prompts}", reward: "${world.reward}",
             measure: {data: "${world.test}", gold: "${world.reward}"}, …}

Another seed gives no held-out questions: of number_sequence's 61 % were in the training set. Whether a question is for
the test is decided by a hash of its text, and each occurs once. Before anything is written the task is tried out: one
whose scorer a constant answer satisfies or its own answers do not, or that differs from run to run, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from klimb.errors import DataError, did_you_mean
from klimb.rewards.verifiers.gym import Scorer, needs_reasoning_gym, score, scorer

JUNK = ("", "0", "1", "2", "True", "False", "Yes", "No", "[]", "zzz")
CONSTANT = 0.3
"""Mean score that a constant answer may have. circuit_logic gives "0" 0.65, ransom_note 0.45, most tasks nothing."""
TRIED = 40
"""Questions that the junk is tried on."""
PATIENCE = 10
"""Items that are made for each that is wanted, at most: small tasks repeat themselves."""


def prepare(out: Path, *, seed: int, task: str, train: int = 2000, test: int = 200, **options: Any) -> dict[str, Any]:
    """Writes prompts, test and demonstrations into `out`; `options` are those of the task's config.

    Returns the paths "prompts", "test" and "demonstrations" (the training questions with answers), and "reward". Raises
    DataError for a task that is unknown or not to be trusted, RewardError where reasoning-gym is missing.
    """
    needs_reasoning_gym("world gym")
    if min(train, test) < 1:
        raise DataError(f"train is {train}, test is {test}", where="world gym", fix="ask for 1 or more of each")
    size = PATIENCE * (train + test)
    dataset, again = (_dataset(task, size=size, seed=seed, **options) for _ in range(2))
    if [dataset[place] for place in range(8)] != [again[place] for place in range(8)]:
        raise DataError(f"{task} does not give the same questions twice", where="world gym", fix="take another task")
    parts, told = _split(dataset, task, {"train": train, "test": test})
    refuse_constant(task, scorer(task), [json.loads(row["item"]) for row in parts["test"][:TRIED]])
    out.mkdir(parents=True, exist_ok=True)
    asked = {
        name: [{k: v for k, v in row.items() if k != "completion"} for row in rows] for name, rows in parts.items()
    }
    return {
        "prompts": _write(out / "prompts.jsonl", asked["train"]),
        "test": _write(out / "test.jsonl", asked["test"]),
        "demonstrations": _write(out / "demonstrations.jsonl", parts["train"]),
        "reward": {"gym": {}},
        "summary": f"{task}: {len(asked['train']):,} training and {len(asked['test']):,} to test, {told} left out",
    }


Parts = dict[str, list[dict[str, str]]]


def _split(dataset: Any, task: str, wanted: Mapping[str, int]) -> tuple[Parts, str]:
    """Rows of both parts, and what was left out. Raises DataError where most questions have no answer."""
    parts: Parts = {name: [] for name in wanted}
    share, seen, repeated, unknown = wanted["test"] / sum(wanted.values()), set(), 0, 0
    for item in _items(dataset, PATIENCE * sum(wanted.values())):
        question, found = " ".join(item["question"].lower().split()), sum(map(len, parts.values()))
        part = part_of(question, share)
        if found == sum(wanted.values()) or unknown >= max(TRIED, found):
            break
        if len(parts[part]) == wanted[part]:
            continue
        if question in seen:
            repeated += 1
        elif item["answer"] is None or score(scorer(task), str(item["answer"]), item) < 1.0:
            unknown += 1
        else:
            answer = {"completion": str(item["answer"])}
            parts[part].append({"prompt": item["question"], **answer, "item": json.dumps(item)})
        seen.add(question)
    found = sum(map(len, parts.values()))
    if unknown > found or not all(parts.values()):
        why = (
            f"of {found + unknown} questions {unknown} have no answer that its scorer, given the item as JSON, accepts"
        )
        raise DataError(
            f"{task} cannot be used", where="world gym", why=why, fix="take another task, or more questions"
        )
    return parts, f"{repeated:,} repeated and {unknown:,} without an answer"


def refuse_constant(task: str, function: Scorer, items: list[dict[str, Any]]) -> None:
    """Raises DataError where one and the same answer earns too much."""
    answers = (*JUNK, str(items[0]["answer"]))
    earned = {answer: sum(score(function, answer, item) for item in items) / len(items) for answer in answers}
    best = max(earned, key=lambda answer: earned[answer])
    if earned[best] > CONSTANT:
        why = f"the answer {best!r} earns {earned[best]:.2f} on average over {len(items)} questions, whatever is asked"
        raise DataError(f"{task} is refused", where="world gym", why=why, fix="take another task, or make it harder")


def part_of(question: str, share: float) -> str:
    digest = hashlib.sha256(question.encode()).digest()
    return "test" if int.from_bytes(digest[:4]) < share * 2**32 else "train"


def _dataset(task: str, **options: Any) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise DataError(f"reasoning-gym has no task {task!r}", where="world gym", fix=did_you_mean(task, DATASETS))
    try:
        return reasoning_gym.create_dataset(task, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise DataError(f"the options of {task} do not fit", where="world gym", why=error) from error


def _items(dataset: Any, size: int) -> Iterator[dict[str, Any]]:
    """As they come back from the file."""
    for place in range(size):
        yield json.loads(json.dumps(dataset[place], default=str))


def _write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
