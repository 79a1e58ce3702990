"""klimb's side: its stages as they are, with a run directory that waits for the driver between two steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jobs import as_text, drift, given_completion, job_of, reward
from torch import Tensor
from work import LEARNING_RATE
from worker import Channel, Finished, Options, serve

from klimb.batch import BatchTotals, TokenBatch, pad_tokens
from klimb.metrics import Metrics
from klimb.models.faces import Policy, PolicyOutputs, RewardModel, policy_logps
from klimb.rollout.engine import Request
from klimb.rollout.local import LocalEngine
from klimb.runtime.learner import Learner, Loss
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages import preference, rl, sft
from klimb.stages import reward as reward_stage
from klimb.stages.common import TrainConfig
from klimb.stages.evaluate import batch_of
from klimb.types import Group, Sample, Segment

Train = Callable[[Any, Run, Interrupt, Any], dict[str, Any]]


def stage_of(options: Options) -> tuple[Train, TrainConfig]:
    job, beta, gate = job_of(options), options["beta"], options["task"] == "gate"
    rows = job.gate_rows if gate else job.rows
    shared: dict[str, Any] = {
        "model": f"{options['folder']}/model", "data": f"{options['folder']}/rows.jsonl", "steps": 1_000_000,
        "optimizer": {"lr": LEARNING_RATE}, "dtype": {"fp32": "float32", "bf16": "bfloat16"}[options["dtype"]],
        "threads": options["threads"], "checkpoint_every": 0, "device": options["device"],
        "token_budget": options["token_budget"],
    }  # fmt: skip
    if gate and beta:
        shared["reference"] = f"{options['folder']}/reference"
    if job.has_rollout:
        return rl.train, rl.RlConfig(
            **shared, algorithm=algorithm(job.algorithm, beta), reward=reward, prompts_per_step=rows,
            samples_per_prompt=job.samples, max_tokens=job.max_tokens,
        )  # fmt: skip
    shared["batch_size"] = rows
    if job.scores:
        return reward_stage.train, reward_stage.RewardConfig(**shared)
    if job.kind == "pairs":
        return preference.train, preference.PreferenceConfig(**shared, loss={"dpo": beta})
    return sft.train, sft.SftConfig(**shared)


def algorithm(name: str, beta: float) -> dict[str, Any]:
    """TRL's: its RLOO clips the ratio of whole completions, and its estimators of the KL are k3 and k1."""
    if name == "grpo":
        return {"name": name, "kl": {"where": "loss", "estimator": "k3", "beta": beta} if beta else "none"}
    kl = {"where": "reward", "estimator": "k1", "beta": beta} if beta else "none"
    return {"name": name, "surrogate": {"product_clip": [0.2, 0.2]}, "kl": kl}


def take_steps(kind: type[Run], options: Options, **attributes: Any) -> None:
    """The stage in a run directory of its own."""
    train, config = stage_of(options)
    folder = Path(tempfile.mkdtemp(dir=options["folder"]))
    with kind.open(folder / "run", config, {}, name=options["job"], say=lambda line: None) as run:
        for name, value in attributes.items():
            setattr(run, name, value)
        train(config, run, Interrupt(), lambda line: None)


class PacedRun(Run):
    """`truncate` is what a stage calls when all is loaded, `log` what it calls when a step is done."""

    channel: Channel
    counts: dict[str, int]

    def truncate(self, step: int) -> None:
        super().truncate(step)
        self.channel.loaded()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().log(step, metrics)
        self.channel.step(rollout=metrics.get("time/rollout", 0.0), **self.counts)


def time_steps(options: Options, channel: Channel) -> None:
    counts: dict[str, int] = {}
    update, scores = Learner.step, job_of(options).scores

    def counted(learner: Learner, batch: TokenBatch, loss: Loss, totals: BatchTotals | None = None) -> Metrics:
        counts["flat"] = sum(len(row) for rows in batch.rows for row in rows)
        counts["tokens"] = counts["flat"] if scores else batch.totals.tokens
        return update(learner, batch, loss, totals)

    Learner.step = counted
    take_steps(PacedRun, options, channel=channel, counts=counts)


# The numbers of the fixed batch -------------------------------------------------------------------------------------


class GivenSamples(LocalEngine):
    """An engine that is told what the policy sampled, and asks it how likely that was."""

    vocabulary: int
    longest: int

    def stream(self) -> Iterator[tuple[Request, Sample]]:
        while self.queue:
            request, index = self.queue.popleft()
            tokens = given_completion(str(request.prompt.text), index, self.vocabulary, self.longest)
            sample = Sample(request.prompt.id, index, [Segment(tokens)], "length", as_text(tokens))
            logps = policy_logps(self.policy, batch_of([Group(request.prompt, [sample])]), budget=1).logps
            sample.segments = [Segment(tokens, True, logps[0].tolist(), [self.version] * len(tokens))]
            yield request, sample


def gate(options: Options, channel: Channel) -> None:
    """Loss, gradient norm and what the model says of each row, at the first update of the stage itself."""
    found: dict[str, Any] = {}
    outputs: list[Tensor | PolicyOutputs] = []

    def observe(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, Policy | RewardModel):
            outputs.append(output)

    def measure(learner: Learner, batch: TokenBatch, loss: Loss, totals: BatchTotals | None = None) -> Metrics:
        if "behavior_logps" in batch.columns:
            drifts = pad_tokens([drift(row.completion) for (row,) in batch.rows], batch.mask)
            batch = batch.with_columns(old_logps=batch["behavior_logps"] + drifts)
        value, _ = loss(batch.to(learner.device), batch.totals)
        value.backward()
        gradients = [p.grad for p in learner.working.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        found.update(loss=float(value), grad_norm=float(norm), rows=numbers_by_row(batch, outputs[-1]))
        raise Finished

    def engine(policy: Policy, loaded: Any, prompts: Sequence[Any], *_: Any) -> GivenSamples:
        made = GivenSamples(policy, as_text)
        made.vocabulary, made.longest = len(loaded.renderer.tokenizer), job_of(options).max_tokens
        return made

    Learner.step = measure
    rl.local_engine = engine
    torch.nn.modules.module.register_module_forward_hook(observe)
    try:
        take_steps(Run, options)
    except Finished:
        channel.say(found)


def numbers_by_row(batch: TokenBatch, output: Tensor | PolicyOutputs) -> list[Any]:
    """[tokens, log-probs of its marked tokens or its score] of each row."""
    tokens = [[*row.prompt, *row.completion] for (row,) in batch.rows]
    if isinstance(output, PolicyOutputs):
        numbers = [line[mask].tolist() for line, mask in zip(output.logps.cpu(), batch.mask, strict=True)]
    else:
        numbers = [[score] for score in output.tolist()]
    return list(zip(tokens, numbers, strict=True))


if __name__ == "__main__":
    serve(steps=time_steps, gate=gate)
