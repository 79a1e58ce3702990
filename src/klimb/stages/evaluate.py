"""Measuring a policy: proxy and gold with intervals, the KL it paid, and what best-of-n would have given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from klimb.batch import TokenBatch, sample_rows
from klimb.config import StageConfig
from klimb.data.load import load_prompts
from klimb.data.render import Renderer
from klimb.models.faces import Policy, sequence_kl
from klimb.models.packing import Budget
from klimb.models.place import load_tokenizer
from klimb.rewards.code import sandbox_tier
from klimb.rewards.combine import sources
from klimb.rewards.judge.reward import keep_beside
from klimb.rewards.model import ModelReward
from klimb.rewards.normalise import Normalised
from klimb.rewards.protocol import Reward
from klimb.rewards.ranks import asked_once
from klimb.rewards.scorer import Scorer
from klimb.rewards.spec import parse_reward
from klimb.rollout.engine import Request, generate
from klimb.rollout.local import LocalEngine
from klimb.rollout.mixture import Mixture
from klimb.rollout.sampling import SamplingParams
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, stream_seed
from klimb.stages.given import Data, Given
from klimb.stages.memory import of_measuring
from klimb.stages.models import Loaded, load_policy, load_reference, load_reward_model, prompt_room
from klimb.stages.task import WithTask
from klimb.types import Group, Prompt, Sample
from klimb.watch.statistics import best_of_n, best_of_n_kl, mean_interval

_SHOWN_PROMPTS = 6
_SHOWN_SAMPLES = 2


class Measurement(StageConfig):
    """How a policy is measured: what it is asked, how often, and who judges the answers."""

    data: Data = Field(description="prompts")
    columns: dict[str, str] = Field({}, description="names of its columns: {prompt: question}")
    reward: Given = Field(None, description="the proxy: what training climbs")
    gold: Given = Field(None, description="the held-out judge of quality that training never sees")
    samples_per_prompt: int = Field(16, ge=1)
    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0, description="0: greedy")
    by: str | None = Field(None, description="column of the prompts to report the gold by")


class EvaluateConfig(WithTask):
    """Measure a model; `reference` is what its KL is taken to."""

    measure: Measurement
    reference: str | None = None
    best_of: list[int] = Field([], description="n of best-of-n, by the proxy; needs that many samples_per_prompt")
    report_n: int | None = Field(None, ge=1, description="the n that stands in the table; default: the last")

    def work(self, context: int) -> Work:
        return of_measuring(self, context)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.columns:
            yield "columns: what is asked is measure.data; give measure.columns"
        if self.best_of and self.measure.reward is None:
            yield "best_of: a proxy has to say which sample is best; give measure.reward"
        if self.best_of and max(*self.best_of, self.report_n or 0) > self.measure.samples_per_prompt:
            yield f"best_of: there are only measure.samples_per_prompt={self.measure.samples_per_prompt} to choose from"
        if self.report_n is not None and not self.best_of:
            yield "report_n: it belongs to best_of, which is empty"


@dataclass
class Judges:
    """Prompts and rewards of a measurement, loaded once."""

    config: Measurement
    session: Session
    loaded: Loaded
    prompts: Sequence[Prompt]
    proxy: Reward | None
    gold: Reward | None
    seed: int
    budget: Budget

    @staticmethod
    def for_measurement(config: Measurement | None, session: Session, loaded: Loaded, seed: int) -> Judges | None:
        if config is None:
            return None
        room = prompt_room(loaded.backbone.context, config.max_tokens)
        prompts = load_prompts(config.data, loaded.renderer, max_length=room, columns=config.columns).items
        if shared := session.overlap("measure.data", prompts):
            session.run.found("measure.data", shared)
        proxy = None if config.reward is None else open_reward(config.reward, session, loaded.renderer)
        gold = None if config.gold is None else open_reward(config.gold, session, loaded.renderer)
        return Judges(config, session, loaded, prompts, proxy, gold, seed, session.scoring)

    def sample(self, policy: Policy, purpose: str) -> list[Group]:
        """Groups of the measurement's prompts with proxy (`score`) and, as a component, gold."""
        params = SamplingParams(self.config.max_tokens, self.loaded.stop_tokens(self.prompts), self.config.temperature)
        engine = local_engine(policy, self.loaded, self.prompts, on_tokens=self.session.on_tokens, say=self.session.say)
        seed = stream_seed(self.seed, purpose)
        wanted = [Request(p, self.config.samples_per_prompt, params, seed) for p in self.prompts]
        with self.session.sampling(purpose, wanted) as requests:
            groups = generate(engine, requests, self.session.between_groups)
            if self.proxy is not None:
                Scorer(self.proxy, min_scored=1, on_event=self._event).score(groups)
            if self.gold is not None:
                add_gold(self.gold, groups, self._event)
        return groups

    def evaluate(self, policy: Policy, reference: Policy, purpose: str) -> dict[str, Any]:
        """The block "evaluation" of a result."""
        return self.summarise(self.sample(policy, purpose), policy, reference)

    def summarise(self, groups: Sequence[Group], policy: Policy, reference: Policy) -> dict[str, Any]:
        samples = [s for g in groups for s in g.samples]
        summary: dict[str, Any] = {
            "n": len(samples),
            "prompts": len(groups),
            "length": sum(len(s.tokens) for s in samples) / len(samples),
            "finished": sum(s.finish == "stop" for s in samples) / len(samples),
            "kl": 0.0 if policy is reference else float(sequence_kl(
                policy, reference, batch_of(groups), budget=self.budget, temperature=self.config.temperature or 1.0
            ).mean()),
        }  # fmt: skip
        if self.proxy is not None:
            summary |= _interval("proxy", [[s.score for s in g.samples] for g in groups])
        if self.gold is not None:
            summary |= _interval("gold", [[s.rewards["gold"] for s in g.samples] for g in groups])
            if self.config.by is not None:
                summary["by"] = self._by_column(groups, self.config.by)
        summary["replies"] = [_reply(g, s) for g in groups[:_SHOWN_PROMPTS] for s in g.samples[:_SHOWN_SAMPLES]]
        return summary

    def _by_column(self, groups: Sequence[Group], column: str) -> dict[str, dict[str, float]]:
        """Gold, with its interval, for each value of a column of the prompts."""
        parts: dict[str, list[Group]] = {}
        for group in groups:
            parts.setdefault(str(group.prompt.columns.get(column)), []).append(group)
        return {
            value: {**_interval("gold", [[s.rewards["gold"] for s in g.samples] for g in part]), "prompts": len(part)}
            for value, part in sorted(parts.items())
        }

    def _event(self, event: dict[str, Any]) -> None:
        self.session.run.event(**event)


def _interval(name: str, groups: Sequence[Sequence[float | None]]) -> dict[str, float]:
    interval = mean_interval([[v for v in group if v is not None] for group in groups])
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def add_gold(gold: Reward, groups: Sequence[Group], on_event: Any) -> None:
    """Score with the gold judge beside the proxy: its values go to `rewards["gold"]` and nowhere else."""
    kept = [(s, s.score, s.rewards, s.step_rewards) for g in groups for s in g.samples]
    Scorer(gold, min_scored=1, on_event=on_event).score(groups)
    for sample, score, rewards, steps in kept:
        sample.rewards = {**rewards, "gold": sample.score}
        sample.score, sample.step_rewards = score, steps


def open_reward(
    spec: Any, session: Session, renderer: Renderer | None = None, running: list[Normalised] | None = None
) -> Reward:
    """Whatever a recipe says after `reward:`; a directory is a trained reward model. It is closed with the run.

    renderer: of the policy whose samples are scored; None where texts are. running: takes the parts that follow the
    training; None where the scores are not trained on.
    """

    def load(directory: str, dense: bool = False) -> Reward:
        tokenizer = load_tokenizer(directory)
        model = load_reward_model(session, directory)
        same = renderer is not None and renderer.tokenizer.get_vocab().items() <= tokenizer.get_vocab().items()
        return ModelReward(
            model, Renderer(tokenizer), directory, same_tokenizer=same, dense=dense, budget=Budget(8192, session.say)
        )

    reward = parse_reward(spec, model_loader=load, running=running)
    session.run.closing.callback(reward.close)
    for service in filter(None, (getattr(source, "service", None) for source in sources(reward))):
        service.tell, service.leaving = session.run.report, lambda: session.interrupt.requested
    keep_beside(reward, session.run.path)
    if (tier := sandbox_tier(reward)) and (begun := session.run.decide("sandbox", lambda: tier)) != tier:
        session.run.report(f"sandbox: begun in {begun}, it goes on in {tier}")
    return asked_once(reward)


def local_engine(
    policy: Policy | Mixture, loaded: Loaded, prompts: Sequence[Prompt], max_rows: int = 128,
    on_tokens: Callable[[int], None] | None = None, say: Callable[[str], None] = lambda line: None,
) -> LocalEngine:  # fmt: skip
    like = prompts[0].text if prompts else ""
    return LocalEngine(
        policy, lambda tokens: loaded.renderer.decode(tokens, like), max_rows=max_rows, on_tokens=on_tokens, say=say
    )


def batch_of(groups: Sequence[Group]) -> TokenBatch:
    """Finished samples as they were sampled."""
    pairs = [(place, group, sample) for place, group in enumerate(groups) for sample in group.samples]
    return TokenBatch.from_rows(
        [sample_rows(group.prompt.tokens, sample) for _, group, sample in pairs],
        [place for place, _, _ in pairs],
        [sample.id for _, _, sample in pairs],
    )


def answer_score(loaded: Loaded, prompts: Sequence[Prompt], until: Any, seed: int, step: int) -> float:
    """Mean score of one sampled answer a prompt, for stopping."""
    params = SamplingParams(until.max_tokens, loaded.stop_tokens(prompts))
    engine = local_engine(loaded.policy, loaded, prompts)
    groups = generate(engine, [Request(p, 1, params, stream_seed(seed, "until", step)) for p in prompts])
    reward = asked_once(parse_reward(until.reward))
    try:
        Scorer(reward, min_scored=1).score(groups)
    finally:
        reward.close()
    scores = [s.score for g in groups for s in g.samples if s.score is not None]
    return math.fsum(scores) / len(scores)


def to_choose_from(groups: Sequence[Group], n: int) -> list[Group]:
    """Their scored samples, of the groups that have n of them; of the others nothing is known of best-of-n."""
    scored = [Group(g.prompt, [s for s in g.samples if s.score is not None]) for g in groups]
    return [group for group in scored if len(group.samples) >= n]


def best_of_curve(groups: Sequence[Group], ns: Sequence[int]) -> list[dict[str, Any]]:
    """Best-of-n by the proxy, unbiased for each prompt and averaged; KL is an upper bound."""
    curve = []
    for n in ns:
        row: dict[str, Any] = {"n": n, "kl": best_of_n_kl(n)}
        for name in ("proxy", "gold"):
            per_prompt = []
            for group in to_choose_from(groups, n):
                scores = [s.score for s in group.samples]
                values = scores if name == "proxy" else [s.rewards.get("gold") for s in group.samples]
                if all(v is not None for v in values):
                    per_prompt.append(best_of_n(scores, values, n))  # type: ignore[arg-type]
            if per_prompt:
                row[name] = math.fsum(per_prompt) / len(per_prompt)
        curve.append(row)
    return curve


def best_of_row(groups: Sequence[Group], n: int) -> dict[str, float]:
    """Best-of-n for the table, with intervals from disjoint blocks of each prompt's pool (10, or as many as hold n)."""
    chosen = to_choose_from(groups, n)
    row: dict[str, float] = {"kl": best_of_n_kl(n)} if chosen else {}  # of none the policy itself is told
    per_prompt: dict[str, list[list[float]]] = {"proxy": [], "gold": []}
    for group in chosen:
        blocks = min(10, len(group.samples) // n)
        parts = [Group(group.prompt, group.samples[block::blocks]) for block in range(blocks)]
        curves = [best_of_curve([part], [n])[0] for part in parts]
        for name, values in per_prompt.items():
            values.append([curve[name] for curve in curves if name in curve])
    for name, values in per_prompt.items():
        if any(values):
            row |= _interval(name, values)
    return row


def best_replies(groups: Sequence[Group], n: int) -> list[dict[str, Any]]:
    """The best by the proxy among the first n samples of the first prompts."""
    shown = []
    for group in groups[:_SHOWN_PROMPTS]:
        best = max(group.samples[:n], key=lambda s: -math.inf if s.score is None else s.score)
        shown.append(_reply(group, best))
    return shown


def _reply(group: Group, sample: Sample) -> dict[str, Any]:
    gold = sample.rewards.get("gold")
    return {"prompt": group.prompt.text, "completion": sample.text, "proxy": sample.score, "gold": gold}


def train(config: EvaluateConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    """Named as in the other stages: it is what the stage does. Nothing is trained."""
    session = Session.begin(config, run, interrupt, say)
    loaded = load_policy(session, config.model, None, config.seed)
    reference = load_reference(session, loaded, config.reference) if config.reference else loaded.policy
    judges = Judges.for_measurement(config.measure, session, loaded, config.seed)
    assert judges is not None
    groups = judges.sample(loaded.policy, "evaluate")
    result: dict[str, Any] = {"model": config.model, "evaluation": judges.summarise(groups, loaded.policy, reference)}
    if config.best_of:
        result["curve"] = best_of_curve(groups, config.best_of)
        n = config.report_n or config.best_of[-1]
        for count in sorted({*config.best_of, n}):
            if short := len(groups) - len(to_choose_from(groups, count)):
                message = f"best of {count}: {short} of {len(groups)} prompts are left out, with fewer scored samples"
                run.event("best_of", message, n=count, left_out=short)
                say(message)
        if n > 1:  # best-of-1 is the policy itself
            result["evaluation"] |= best_of_row(groups, n) | {"replies": best_replies(to_choose_from(groups, n), n)}
    return result
