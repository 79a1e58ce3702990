"""Sampling: completions to a file, scored if wanted, and made into comparisons, demonstrations or labelled steps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from klimb.config import StageConfig
from klimb.data.judged import reply_to
from klimb.data.load import load_prompts
from klimb.errors import RewardError
from klimb.rewards.rules import plain_text
from klimb.rewards.scorer import Scorer
from klimb.rollout.engine import Request, generate
from klimb.rollout.sampling import SamplingParams
from klimb.runtime.durable import replace_file
from klimb.runtime.plan import Work
from klimb.runtime.ranks import rank
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, stream_seed
from klimb.stages.evaluate import local_engine, open_reward
from klimb.stages.given import Data, Given
from klimb.stages.memory import of_measuring
from klimb.stages.models import load_policy, prompt_room
from klimb.stages.task import WithTask
from klimb.types import Group, Sample, Text


class Keep(StageConfig):
    """Rejection sampling (RAFT, arXiv 2304.06767; best-of-n as demonstrations, arXiv 2307.09288, section 3.2.3)."""

    best: int = Field(1, ge=1, description="demonstrations of a prompt at most: the highest scored, each text once")
    at_least: float | None = Field(None, description="the score that a demonstration needs")


class SampleConfig(WithTask):
    """`pairs`: samples 0 and 1 of a prompt, 2 and 3, … are compared by their scores; ties are left out."""

    from_task: ClassVar = ("data", "columns", "reward", "max_tokens")

    data: Data
    samples_per_prompt: int = Field(1, ge=1)
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0)
    reward: Given = None
    pairs: bool = False
    keep: Keep | None = Field(None, description="write the best completions as demonstrations")
    separator: str | None = Field(
        None, min_length=1, description="what stands between two steps: write a label for each, to learn kind=process "
        "from; a step is right where `reward` gives what stands up to its end more than 0",
    )  # fmt: skip
    label_noise: float = Field(0.0, ge=0, lt=0.5, description="share of comparisons turned round, as by erring people")

    def work(self, context: int) -> Work:
        return of_measuring(self, context)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.pairs and (self.reward is None or self.samples_per_prompt < 2):
            yield "pairs: comparing needs a reward, and samples_per_prompt of 2 or more"
        if self.keep is not None and self.reward is None:
            yield "keep: a reward has to say which completions are the best; give one"
        if self.separator is not None and self.reward is None:
            yield "separator: a reward has to say which of them are right; give one"


def train(config: SampleConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    """Named as in the other stages: it is what the stage does. Nothing is trained."""
    session = Session.begin(config, run, interrupt, say)
    loaded = load_policy(session, config.model, None, config.seed)
    room = prompt_room(loaded.backbone.context, config.max_tokens)
    data = session.read(load_prompts, config.data, config, loaded.renderer, room)
    params = SamplingParams(
        config.max_tokens, loaded.stop_tokens(data.items), config.temperature, config.top_k, config.top_p,
        config.repetition_penalty,
    )  # fmt: skip
    seed = stream_seed(config.seed, "sample")
    engine = local_engine(loaded.policy, loaded, data.items, on_tokens=session.on_tokens, say=session.say)
    with session.sampling("sample", [Request(p, config.samples_per_prompt, params, seed) for p in data.items]) as asked:
        groups = generate(engine, asked, session.between_groups)
        if config.reward is not None:
            # What stands up to the end of a step was not sampled as a whole: it is scored as a text.
            reward = open_reward(config.reward, session, loaded.renderer if config.separator is None else None)
            scorer = Scorer(reward, min_scored=1, on_event=lambda event: run.event(**event))
            scorer.score(groups)
    result: dict[str, Any] = {"samples": write_rows(run.path / "samples.jsonl", _rows(groups))}
    if config.separator is not None:
        labelled = list(labelled_steps(groups, config.separator, scorer))
        right, count = (sum(map(of, (row["labels"] for row in labelled))) for of in (sum, len))
        say(f"{right:,} of {count:,} steps are right, in {len(labelled):,} completions")
        result |= {"steps": write_rows(run.path / "steps.jsonl", labelled), "steps_right": right / max(count, 1)}
    if config.pairs:
        pairs = list(comparisons(groups, config.label_noise, random.Random(stream_seed(config.seed, "labels"))))
        compared = sum(len(g.samples) // 2 for g in groups)
        say(f"{len(pairs):,} of {compared:,} pairs have a better one")
        result |= {
            "preferences": write_rows(run.path / "preferences.jsonl", pairs),
            "pairs": len(pairs),
            "left_out": compared - len(pairs),
        }
    if config.keep is not None:
        kept = list(demonstrations(groups, config.keep))
        if not kept:
            raise RewardError(
                "no completion is worth a demonstration", where="keep",
                why=f"none of {sum(len(g.samples) for g in groups):,} ended by itself with a score"
                + ("" if config.keep.at_least is None else f" of {config.keep.at_least:g} or more"),
                fix="draw more samples_per_prompt, lower keep.at_least, or start from a better model",
            )  # fmt: skip
        say(f"{len(kept):,} demonstrations kept, out of {sum(len(g.samples) for g in groups):,} completions")
        result |= {"demonstrations": write_rows(run.path / "demonstrations.jsonl", kept), "kept": len(kept)}
    return {**result, "model": config.model, "evaluation": None}


def demonstrations(groups: Sequence[Group], keep: Keep) -> Iterator[dict[str, Any]]:
    """The best scored completions of each prompt, no text twice. What was cut off shows no one how to end."""
    for group in groups:
        scored = [
            (s.score, s) for s in group.samples if s.score is not None and s.finish == "stop" and not is_empty(s.text)
        ]
        best = sorted(scored, key=lambda pair: -pair[0])  # stable: of equals the first drawn
        texts: list[Any] = []
        for score, sample in best:
            if (
                len(texts) < keep.best
                and sample.text not in texts
                and (keep.at_least is None or score >= keep.at_least)
            ):
                texts.append(sample.text)
                yield {"prompt": group.prompt.text, "completion": sample.text, "score": score}


def comparisons(groups: Sequence[Group], noise: float, stream: random.Random) -> Iterator[dict[str, Any]]:
    """Consecutive samples of a prompt, the better scored one chosen; a share `noise` of them the other way round."""
    for group in groups:
        for a, b in zip(group.samples[0::2], group.samples[1::2], strict=False):
            if a.score is None or b.score is None or a.score == b.score or is_empty(a.text) or is_empty(b.text):
                continue  # unscored, a tie, or nothing said: a comparison needs two texts
            chosen, rejected = (a, b) if (a.score > b.score) != (stream.random() < noise) else (b, a)
            yield {"prompt": group.prompt.text, "chosen": chosen.text, "rejected": rejected.text}


def is_empty(completion: Any) -> bool:
    """Did the model end at once? As a text, and as a message in a chat."""
    return completion in ("", [{"role": "assistant", "content": ""}])


def labelled_steps(groups: Sequence[Group], separator: str, scorer: Scorer) -> Iterator[dict[str, Any]]:
    """Rows for a model of steps: of each step, whether the reward of what stands up to its end is above 0.

    Behind a step that another follows stands the separator, so that the reward can tell a beginning from a whole.
    """
    solutions = [(g.prompt, steps) for g in groups for s in g.samples if (steps := split_steps(s.text, separator))]
    begun = []
    for prompt, steps in solutions:
        texts = [separator.join([*steps[:n], ""]) for n in range(1, len(steps))] + [separator.join(steps)]
        parts = [Sample(prompt.id, n, [], "stop", reply_to(prompt.text, text)) for n, text in enumerate(texts)]
        begun.append(Group(prompt, parts))
    scorer.score(begun)
    for (prompt, steps), group in zip(solutions, begun, strict=True):
        scores = [sample.score for sample in group.samples if sample.score is not None]
        if len(scores) == len(steps):
            yield {"prompt": prompt.text, "completions": steps, "labels": [score > 0 for score in scores]}


def split_steps(text: Text, separator: str) -> list[str]:
    """As a model of steps reads them: white space around a separator of words does not count, an empty step neither."""
    mark = separator.strip()
    parts = plain_text(text).split(mark or separator)
    return [part.strip() if mark else part for part in parts if part.strip()]


def _rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    for group in groups:
        for sample in group.samples:
            row = {"prompt": group.prompt.text, "completion": sample.text, "finish": sample.finish}
            yield row if sample.score is None else {**row, "score": sample.score}


def write_rows(path: Path, rows: Any) -> str:
    """A line of JSON for each; rank 0 writes them."""
    if rank() == 0:
        replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return str(path)
