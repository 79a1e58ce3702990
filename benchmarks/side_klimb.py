"""klimb's side: the RL stage as it is, with a run directory that waits for the driver between two steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from work import LEARNING_RATE, MAX_TOKENS, PROMPTS, SAMPLES, fixed_batch, reward
from worker import Channel, serve

from klimb.batch import Row, TokenBatch, pad_tokens
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session
from klimb.stages.rl import RlConfig, prepare, rl_loss, train


class PacedRun(Run):
    """`truncate` is what the stage calls when all is loaded, `log` what it calls when a step is done."""

    channel: Channel
    started = 0.0

    def truncate(self, step: int) -> None:
        super().truncate(step)
        self.channel.loaded()
        self.started = time.perf_counter()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().log(step, metrics)
        seconds = time.perf_counter() - self.started
        self.channel.step(
            seconds=seconds, rollout=metrics["time/rollout"], tokens=metrics["tokens"], length=metrics["length/mean"]
        )
        self.started = time.perf_counter()


def config_of(options: dict[str, Any]) -> RlConfig:
    beta = options["beta"]
    return RlConfig(
        model=f"{options['folder']}/model", data=f"{options['folder']}/prompts.jsonl", reward=reward,
        algorithm={"name": "grpo", "kl": {"where": "loss", "estimator": "k3", "beta": beta} if beta else "none"},
        steps=1_000_000, prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES, max_tokens=MAX_TOKENS,
        optimizer={"lr": LEARNING_RATE}, dtype={"fp32": "float32", "bf16": "bfloat16"}[options["dtype"]],
        threads=options["threads"], checkpoint_every=0, device="cpu",
        token_budget=options["token_budget"],
    )  # fmt: skip


def open_run(config: RlConfig) -> PacedRun:
    return PacedRun.open(Path(tempfile.mkdtemp(prefix="klimb-")) / "run", config, {}, name="rl", say=lambda line: None)


def time_steps(options: dict[str, Any], channel: Channel) -> None:
    config = config_of(options)
    with open_run(config) as run:
        run.channel = channel
        train(config, run, Interrupt(), lambda line: None)


def gate(options: dict[str, Any]) -> dict[str, Any]:
    """Log-probs, loss and gradient norm of the fixed batch."""
    config = config_of(options)
    fixed = fixed_batch(options["size"])
    with open_run(config) as run:
        actors = prepare(config, Session.begin(config, run, Interrupt(), lambda line: None))
    rows = [[Row(p, c, [True] * len(c))] for p, c in zip(fixed.prompts, fixed.completions, strict=True)]
    batch = TokenBatch.from_rows(rows, [i // SAMPLES for i in range(len(rows))], [str(i) for i in range(len(rows))])
    batch = batch.with_columns(
        advantages=torch.tensor(fixed.advantages)[:, None].expand(batch.mask.shape),
        ref_logps=pad_tokens(fixed.ref_logps, batch.mask),
        behavior_logps=pad_tokens(fixed.ref_logps, batch.mask),
    )
    loss, _ = rl_loss(actors, batch, batch.totals, {}, None)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in actors.policy.trainable().values() if p.grad is not None])
    logps = actors.policy(batch).logps
    return {"loss": float(loss), "grad_norm": float(norm), "logps": logps[batch.mask].tolist()}


if __name__ == "__main__":
    serve(time_steps, gate)
