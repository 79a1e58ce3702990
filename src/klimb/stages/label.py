"""A judge as an annotator: completions in, preferences out, in the same form as people's and marked as its own.

::

    klimb label model=NAME judge.url=https://host/v1 judge.key_env=MY_KEY data=answers.jsonl judge.rubric="…"
    klimb label model=DIR data=answers.jsonl principles=principles.yaml       a model on this machine, by principles

Rows are `prompt, completions`; or `prompt, completion`, where those of one prompt belong together, as `klimb sample`
writes them (empty ones are left out, and counted); or comparisons of people's (`chosen, rejected`), on which the
judge's agreement with them is measured.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from klimb.data.checks import CHECKS
from klimb.data.formats import Problem, Row, listed, read_rows
from klimb.data.kinds import refuse_bad, with_prompt
from klimb.data.source import BadRow
from klimb.errors import DataError, Interrupted, RewardError
from klimb.models.outline import Shape
from klimb.rewards.judge.agreement import agreement
from klimb.rewards.judge.judge import Judge
from klimb.rewards.judge.principles import Principle, load_principles, principle_for
from klimb.rewards.judge.question import Question, Verdict, shown
from klimb.rewards.judge.settings import JudgeConfig, JudgeSettings
from klimb.runtime.plan import Learning, Work
from klimb.runtime.ranks import rank, share
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import RunConfig, Session
from klimb.stages.given import Data
from klimb.stages.memory import TYPICAL
from klimb.stages.sample import is_empty, write_rows
from klimb.types import Text

BATCH = 64
"""Pairs that are asked about between two looks at the canaries, and at Ctrl-C."""
TRIED = 4
"""Pairs of a dry run: they are paid for."""


class LabelConfig(RunConfig):
    """`model` is the judge. Completions of a prompt are compared two by two, 0 with 1, 2 with 3, …; the last of an odd
    number with the first."""

    data: Data
    judge: JudgeSettings = JudgeSettings()
    principles: str | None = Field(
        None, description="file of principles, one drawn for each pair in place of judge.rubric; `default`: klimb's"
    )
    failure_limit: float = Field(0.05, ge=0, le=1, description="share of pairs that may fail")

    def work(self, context: int) -> Work:
        return Work(Learning(self.model), Shape(min(TYPICAL, context), 4), trains=False)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        for name in ("reference", "against"):
            if getattr(self.judge, name) is not None:
                yield f"judge.{name}: it belongs to a judge that is a reward; here two completions are compared"
        if self.principles is not None and "rubric" in self.judge.model_fields_set:
            yield "principles and judge.rubric both say what is better: give one of them"
        if "device" in self.judge.model_fields_set:
            yield "judge.device: give device"


class Pair(NamedTuple):
    """Two completions. people: 1.0 where people found the first better, 0.0 the second."""

    prompt: Text
    first: Text
    second: Text
    people: float | None = None


def train(config: LabelConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    """Named as in the other stages: it is what the stage does. Nothing is trained."""
    session = Session.begin(config, run, interrupt, say)
    run.truncate(-1)
    pairs, facts = read_pairs(config)
    if session.interrupt.rehearsal is not None:
        pairs = pairs[:TRIED]
    run.found("data", facts)
    if facts["empty"]:
        say(f"{facts['empty']:,} of {facts['rows']:,} rows are left out: their completions are empty")
    principles = load_principles(None if config.principles in (None, "default") else config.principles)
    given = config.judge.model_dump(exclude_unset=True) | ({} if config.judge.url else {"device": config.device})
    judge = Judge(JudgeConfig(**given, model=config.model), run.path)
    run.closing.callback(judge.close)
    say(f"{len(pairs):,} pairs, each in both orders, to {config.model}")
    named: list[Principle | None] = [None] * len(pairs)
    if config.principles is not None:
        named = [_drawn(principles, config.seed, pair) for pair in pairs]
    outcomes = [Verdict(*each) for each in share(_asked(config, session, judge, pairs, named) if rank() == 0 else None)]
    agreed = _agreement(pairs, outcomes)
    if agreed is not None:
        say("agreement with people: " + ", ".join(f"{name} {value:.3g}" for name, value in agreed.items()))
    written = _written(config, run, pairs, named, outcomes)
    say(f"{written['pairs']:,} preferences of {len(pairs):,} pairs: {written['preferences']}")
    return {**written, **share(judge.facts() if rank() == 0 else None), "agreement": agreed, "judge": config.model,
            "evaluation": None}  # fmt: skip


def _asked(
    config: LabelConfig, session: Session, judge: Judge, pairs: Sequence[Pair], named: Sequence[Principle | None]
) -> list[Verdict]:
    outcomes: list[Verdict] = []
    totals: Counter[str] = Counter()
    for start in range(0, len(pairs), BATCH):
        session.run.step = start // BATCH + 1
        questions = [
            _question(config, *each) for each in zip(pairs[start : start + BATCH], named[start : start + BATCH])
        ]
        found = judge.answered(questions)
        outcomes += found
        totals.update(judge.counts)
        for note in judge.notes():
            session.run.event("judge", note)
        session.run.log(session.run.step, {f"verdict/{ending}": count for ending, count in judge.counts.items()})
        failed = [outcome for outcome in outcomes if outcome.kind in ("timeout", "error")]
        if len(failed) > config.failure_limit * max(len(outcomes), BATCH) or len(failed) == len(pairs):
            raise RewardError(
                f"{len(failed)} of {len(outcomes)} pairs failed, where failure_limit={config.failure_limit:g}",
                where=f"judge {config.model}", why=f"the last one: {failed[-1].why}",
                fix="the same command goes on: verdicts so far are kept and cost nothing again",
            )  # fmt: skip
        if session.interrupt.requested:
            raise Interrupted(f"{len(outcomes)} of {len(pairs)} pairs are judged; the same command continues")
    session.say("verdicts: " + ", ".join(f"{count} {ending}" for ending, count in totals.items()))
    return outcomes


def _drawn(principles: list[Principle], seed: int, pair: Pair) -> Principle:
    """The same whichever of the two stands first."""
    return principle_for(principles, seed, shown(pair.prompt), *sorted(map(shown, (pair.first, pair.second))))


def _question(config: LabelConfig, pair: Pair, principle: Principle | None) -> Question:
    rubric = principle.compare if principle is not None else config.judge.rubric
    return Question(shown(pair.prompt), (shown(pair.first), shown(pair.second)), rubric)


def _written(
    config: LabelConfig, run: Run, pairs: Sequence[Pair], named: Sequence[Principle | None],
    outcomes: Sequence[Verdict],
) -> dict[str, Any]:  # fmt: skip
    """preferences.jsonl, and undecided.jsonl with what has no better one: ties, abstentions and failures."""
    preferred, undecided = [], []
    for pair, principle, outcome in zip(pairs, named, outcomes, strict=True):
        marked: dict[str, Any] = {"annotator": f"ai:{config.model}"}
        marked |= {"principle": principle.name} if principle is not None else {}
        if outcome.value in (0.0, 1.0):
            chosen, rejected = (pair.first, pair.second) if outcome.value == 1.0 else (pair.second, pair.first)
            preferred.append({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected, **marked})
        else:
            verdict = "tie" if outcome.kind == "ok" else outcome.kind
            texts = {"prompt": pair.prompt, "completions": [pair.first, pair.second]}
            undecided.append({**texts, "verdict": verdict, "why": outcome.why, **marked})
    ends = Counter(dict.fromkeys(("tie", "abstain", "timeout", "error"), 0))
    ends.update(row["verdict"] for row in undecided)
    return {
        "preferences": write_rows(run.path / "preferences.jsonl", preferred), "pairs": len(preferred),
        "undecided": write_rows(run.path / "undecided.jsonl", undecided), "compared": len(pairs), "endings": dict(ends),
    }  # fmt: skip


def _agreement(pairs: Sequence[Pair], outcomes: Sequence[Verdict]) -> dict[str, Any] | None:
    """With people, on the pairs that they and the judge compared."""
    names = {1.0: "a", 0.0: "b", 0.5: "tie"}
    both = [(names[pair.people], names[outcome.value]) for pair, outcome in zip(pairs, outcomes)
            if pair.people is not None and outcome.value is not None]  # fmt: skip
    return agreement(*map(list, zip(*both))) if both else None


# Rows -----------------------------------------------------------------------------------------------------------------


def read_pairs(config: LabelConfig) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of the data, and how many rows they came from. Raises BadRows, DataError."""
    rows, problems = read_rows(config.data, config.columns)
    pairs: list[Pair] = []
    by_prompt: dict[str, tuple[Text, list[Text]]] = {}
    empty = 0
    for row in rows:
        if "prompt" in row.values and is_empty(row.values.get("completion")):
            empty += 1
            continue
        try:
            pairs += _pairs_of(row, by_prompt)
        except BadRow as error:
            problems.append(Problem.of(row.where, error))
    for prompt, completions in by_prompt.values():
        pairs += _two_by_two(prompt, completions)
    name = config.data if isinstance(config.data, str) else "data"
    refuse_bad(name, problems, len(pairs), config.on_bad)
    different = [pair for pair in pairs if pair.first != pair.second]
    if not different:
        raise DataError("nothing to compare", where=name, why="no prompt has two different completions",
                        fix="give prompts with two or more, as of klimb sample samples_per_prompt=2")  # fmt: skip
    same = len(pairs) - len(different)
    return different, {"rows": len(rows), "dropped": len(problems), "empty": empty, "the same twice": same}


def _pairs_of(row: Row, by_prompt: dict[str, tuple[Text, list[Text]]]) -> list[Pair]:
    """Of a row that is complete in itself; a single completion waits in `by_prompt` for the others."""
    values = row.values
    if "chosen" in values and "rejected" in values:
        values = with_prompt(values)
        prompt, chosen, rejected = _checked(values, "prompt", "chosen", "rejected")
        # Where people's choice stands must tell nothing: neither first nor second, but by its content.
        if _digest(chosen) < _digest(rejected):
            return [Pair(prompt, chosen, rejected, 1.0)]
        return [Pair(prompt, rejected, chosen, 0.0)]
    for name in ("prompt", "completions" if "completions" in values else "completion"):
        if values.get(name) is None:
            raise BadRow(
                f"has no column {name} (it has: {listed(values)}): needed are prompt and completions, prompt and "
                "completion, or chosen and rejected"
            )
    if "completions" not in values:
        prompt, completion = _checked(values, "prompt", "completion")
        by_prompt.setdefault(_digest(prompt), (prompt, []))[1].append(completion)
        return []
    if not isinstance(values["completions"], list | tuple) or len(values["completions"]) < 2:
        raise BadRow("completions is no list of two or more")
    numbered = {f"completions[{place}]": text for place, text in enumerate(values["completions"])}
    prompt, *texts = _checked({"prompt": values["prompt"], **numbered}, "prompt", *numbered)
    return _two_by_two(prompt, texts)


def _checked(values: Mapping[str, Any], *names: str) -> list[Text]:
    texts: list[Text] = [CHECKS[name.partition("s[")[0]](values[name], name) for name in names]
    if len({isinstance(text, str) for text in texts}) > 1:
        raise BadRow(f"mixes strings and messages in {', '.join(names)}")
    return texts


def _two_by_two(prompt: Text, completions: Sequence[Text]) -> list[Pair]:
    odd = [completions[0]] if len(completions) % 2 and len(completions) > 1 else []
    ordered = [*completions, *odd]
    return [Pair(prompt, *pair) for pair in zip(ordered[0::2], ordered[1::2])]


def _digest(text: Text) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()
