"""The jobs: what one step of each consists of, and the rows that both sides read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from klimb.data.sampler import Sampler

STOP_PROBABILITY = 0.0105  # a completion ends after 72 tokens on average, cut at 128: lengths 1–128, mean about 70
PACKED_LENGTH = 1024
"""TRL's default length of a packed row; ten of them hold what 64 examples do."""


class Job(NamedTuple):
    """rows: of the file, in a step. beta: TRL's default, None where the job has no reference.

    micro_batches: tried for TRL, in what it counts (completions, examples, pairs, packed rows); `whole` of them
    make a step. prompt_tokens: fewest and most. token_budget: klimb's micro-batch, in flat tokens of fp32 on M.
    """

    kind: Literal["prompts", "examples", "pairs"]
    rows: int
    whole: int
    micro_batches: tuple[int, ...]
    beta: float | None = None
    scores: bool = False
    """The model is a classifier with one output."""
    algorithm: str = ""
    samples: int = 8
    prompt_tokens: tuple[int, int] = (75, 95)
    max_tokens: int = 128
    stop: float = STOP_PROBABILITY
    """0: completions of `max_tokens` each."""
    token_budget: int = 768

    @property
    def has_rollout(self) -> bool:
        return self.kind == "prompts"

    @property
    def gate_rows(self) -> int:
        """Of the file, in the batch that has to give the same numbers: 16 sequences, which fit for every size."""
        return {"prompts": 16 // self.samples, "examples": 16, "pairs": 8}[self.kind]

    def budget(self, dtype: str, size: str) -> int:
        """Flat tokens of a micro-batch: in bf16 as many bytes of activations, so twice the tokens; of S, whose tokens
        keep a quarter of M's, four times as many."""
        return self.token_budget * (2 if dtype == "bf16" else 1) * (4 if size == "S" else 1)

    @property
    def context(self) -> int:
        """Longest sequence, with the token that begins a text."""
        return max(256, self.prompt_tokens[1] + 1 + self.max_tokens)


JOBS = {
    "grpo": Job("prompts", 8, 64, (8, 16, 32, 64), beta=0.0, algorithm="grpo"),
    "grpo-long": Job("prompts", 2, 32, (8, 16, 32), beta=0.0, algorithm="grpo", samples=16,
                     prompt_tokens=(1023, 1023), max_tokens=64, stop=0.0, token_budget=2048),
    "rloo": Job("prompts", 8, 64, (8, 16, 32, 64), beta=0.05, algorithm="rloo"),
    "sft": Job("examples", 64, 64, (8, 16, 32, 64)),
    "sft-packed": Job("examples", 64, 10, (1, 2, 5)),
    "reward": Job("pairs", 32, 32, (4, 8, 16, 32), scores=True),
    "dpo": Job("pairs", 32, 32, (4, 8, 16, 32), beta=0.1),
}  # fmt: skip


def job_of(options: Mapping[str, Any]) -> Job:
    """The job that a side was asked for, with what `change` says in the place of its own figures."""
    return JOBS[options["job"]]._replace(**options.get("change", {}))


def write_rows(file: Path, job: Job, words: Sequence[str], steps: int) -> None:
    """Other rows for every step. The completions of examples and pairs are as long as those that are sampled."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    def completion() -> str:
        """Its end token comes on top. The space sets it off from the prompt, which TRL puts before it as it is."""
        length = 1 + int(math.log(1 - draw.random()) / math.log(1 - job.stop))
        return " " + text(max(1, min(length, job.max_tokens) - 1))

    columns = {"prompts": (), "examples": ("completion",), "pairs": ("chosen", "rejected")}[job.kind]
    rows = [
        {"prompt": text(draw.randint(*job.prompt_tokens)), **{column: completion() for column in columns}}
        for _ in range(job.rows * steps)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(file: Path) -> list[dict[str, str]]:
    """In the order in which klimb draws them in its first epoch, for TRL to take them one after another."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [rows[i] for i in Sampler(len(rows), len(rows), seed=0).next_batch()]


def given_completion(prompt: str, index: int, vocabulary: int, longest: int) -> list[int]:
    """Sample `index` of a prompt, where both sides are to learn from the same samples: words, without an end."""
    draw = random.Random(f"{prompt}/{index}")
    return [draw.randrange(vocabulary - 3) for _ in range(draw.randint(3, longest))]


def drift(completion: Sequence[int]) -> list[float]:
    """How much likelier each token was when it was sampled, in nats: about 2 for a whole completion.

    Without a drift the loss of a policy is a sum of advantages, which is zero but for rounding, and nothing is clipped.
    With this one GRPO clips a third of the tokens and RLOO most completions that it would push further down, which
    leaves a loss well above the rounding of its terms.
    """
    draw = random.Random(str(list(completion)))
    return [2 / len(completion) + draw.gauss(0, 0.2) for _ in completion]


def as_text(words: Sequence[int]) -> str:
    return " ".join(f"w{word}" for word in words)


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of even-numbered words: next to no work."""
    scores = []
    for completion in completions:
        words = [word for word in completion.split() if word.startswith("w")]
        scores.append(sum(int(word[1:]) % 2 == 0 for word in words) / max(len(words), 1))
    return scores
