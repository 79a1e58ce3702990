"""Constitutional AI, the supervised part: a model answers, criticises its answer by a principle, and writes it anew.

Bai et al. 2022, arXiv 2212.08073, section 3.1: a principle is drawn for every round; what is left after the last one is
a demonstration for `klimb sft`. The second part, comparisons by principle, is `klimb label principles=…`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from klimb.data.load import load_prompts
from klimb.data.template import RenderError
from klimb.errors import DataError
from klimb.rewards.judge.principles import Principle, load_principles, principle_for
from klimb.rewards.judge.question import shown
from klimb.rollout.engine import Request, generate
from klimb.rollout.sampling import SamplingParams
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import RunConfig, Session, stream_seed
from klimb.stages.evaluate import local_engine
from klimb.stages.given import Data
from klimb.stages.memory import of_measuring
from klimb.stages.models import Loaded, load_policy, prompt_room
from klimb.stages.sample import write_rows
from klimb.types import Prompt, Text


class ReviseConfig(RunConfig):
    """What was cut off, said nothing, or no longer fits into the model's context is left out, and counted."""

    data: Data = Field(description="prompts")
    principles: str | None = Field(None, description="file of principles; default: klimb's")
    rounds: int = Field(1, ge=1, description="critiques and revisions of an answer, each by another draw")
    max_tokens: int = Field(256, ge=1, description="of an answer, and of a critique")
    temperature: float = Field(1.0, ge=0)

    def work(self, context: int) -> Work:
        return of_measuring(self, context)


@dataclass
class Draft:
    """An answer on its way. `text` is what stands now."""

    prompt: Prompt
    text: Text
    history: list[dict[str, str]] = field(default_factory=list)
    """The principle, the critique and the revision of each round."""


class Writer:
    """The model, asked for one text a draft."""

    def __init__(self, config: ReviseConfig, session: Session, loaded: Loaded, prompts: Sequence[Prompt]) -> None:
        self._config, self._loaded = config, loaded
        self.params = SamplingParams(config.max_tokens, loaded.stop_tokens(prompts), config.temperature)
        say, on_tokens = session.say, session.on_tokens
        self._engine = local_engine(loaded.policy, loaded, prompts, on_tokens=on_tokens, say=say)
        self._between_groups = session.between_groups
        self._room = prompt_room(loaded.backbone.context, config.max_tokens)
        self.lost = {"cut off": 0, "empty": 0, "too long": 0}

    def write(self, drafts: Sequence[Draft], asked: Sequence[Text], purpose: str) -> list[tuple[Draft, Text]]:
        """What the model says to each text, of those that it finished."""
        requests, waiting = [], []
        seed = stream_seed(self._config.seed, purpose)
        for draft, text in zip(drafts, asked, strict=True):
            try:
                tokens = self._loaded.renderer.prompt(text)
            except RenderError as error:
                raise DataError("what the model would be asked cannot be rendered", where=purpose, why=error) from None
            if len(tokens) > self._room:
                self.lost["too long"] += 1
                continue
            requests.append(Request(Prompt(draft.prompt.id, tokens, text), 1, self.params, seed))
            waiting.append(draft)
        written = []
        groups = generate(self._engine, requests, self._between_groups) if requests else []
        for draft, group in zip(waiting, groups, strict=True):
            [sample] = group.samples
            if sample.finish != "stop" or not shown(sample.text).strip():
                self.lost["cut off" if sample.finish != "stop" else "empty"] += 1
            else:
                written.append((draft, sample.text))
        return written

    def told(self) -> str:
        return ", ".join(f"{count} {why}" for why, count in self.lost.items())


def train(config: ReviseConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    """Named as in the other stages: it is what the stage does. Nothing is trained."""
    session = Session.begin(config, run, interrupt, say)
    principles = load_principles(config.principles)
    loaded = load_policy(session, config.model, None, config.seed)
    data = session.read(
        load_prompts, config.data, config, loaded.renderer, prompt_room(loaded.backbone.context, config.max_tokens)
    )
    writer = Writer(config, session, loaded, data.items)
    every = [Request(prompt, 1, writer.params, config.seed) for prompt in data.items]
    with session.sampling("revise", every) as wanted:
        drafts = [Draft(request.prompt, "") for request in wanted]
        for draft, text in (found := writer.write(drafts, [draft.prompt.text for draft in drafts], "answer")):
            draft.text = text
        drafts = [draft for draft, _ in found]
        first = {draft.prompt.id: draft.text for draft in drafts}
        for number in range(config.rounds):
            drafts = revised(writer, drafts, principles, config.seed, number)
    rows = list(demonstrations(drafts, first))
    if not rows:
        raise DataError("no revision was finished", where=f"model={config.model}", why=writer.told(),
                        fix="raise max_tokens, or use a model that follows instructions")  # fmt: skip
    say(f"{len(rows):,} demonstrations out of {len(wanted):,} prompts; left out: {writer.told()}")
    return {"demonstrations": write_rows(run.path / "demonstrations.jsonl", rows), "kept": len(rows),
            "left_out": writer.lost, "model": config.model, "evaluation": None}  # fmt: skip


def revised(
    writer: Writer, drafts: Sequence[Draft], principles: list[Principle], seed: int, number: int
) -> list[Draft]:
    """A round: each draft is criticised by a principle of its own, and written anew."""
    drawn = {draft.prompt.id: principle_for(principles, seed, draft.prompt.id, str(number)) for draft in drafts}
    asked = [followed(draft.prompt.text, [draft.text], drawn[draft.prompt.id].criticise) for draft in drafts]
    critiques = writer.write(drafts, asked, f"critique {number}")
    asked = [
        followed(draft.prompt.text, [draft.text, drawn[draft.prompt.id].criticise, critique],
                 drawn[draft.prompt.id].revise) for draft, critique in critiques
    ]  # fmt: skip
    critique_of = {draft.prompt.id: critique for draft, critique in critiques}
    result = writer.write([draft for draft, _ in critiques], asked, f"revision {number}")
    for draft, text in result:
        critique = shown(critique_of[draft.prompt.id])
        draft.history.append({"principle": drawn[draft.prompt.id].name, "critique": critique, "revision": shown(text)})
        draft.text = text
    return [draft for draft, _ in result]


def followed(prompt: Text, turns: Sequence[Text], request: str) -> Text:
    """A conversation that goes on: prompt, the model's and the user's turns in alternation, and what is asked last."""
    if isinstance(prompt, str):
        return "\n\n".join([prompt, *map(shown, turns), request]) + "\n\n"
    roles = ("assistant", "user")
    said = [{"role": roles[place % 2], "content": shown(turn)} for place, turn in enumerate(turns)]
    return [*prompt, *said, {"role": "user", "content": request}]


def demonstrations(drafts: Sequence[Draft], first: dict[str, Text]) -> Iterator[dict[str, Any]]:
    """Rows for `klimb sft`; where they come from stands in further columns, which it leaves alone."""
    for draft in drafts:
        yield {"prompt": draft.prompt.text, "completion": draft.text, "first_answer": shown(first[draft.prompt.id]),
               "principles": [entry["principle"] for entry in draft.history],
               "critiques": [entry["critique"] for entry in draft.history]}  # fmt: skip
