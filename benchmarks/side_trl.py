"""TRL's side: its trainers, with a callback that waits for the driver before every step."""

from __future__ import annotations

import contextlib
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from jobs import PACKED_LENGTH, Job, as_text, drift, given_completion, job_of, read_rows, reward
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from work import LEARNING_RATE
from worker import Channel, Finished, Options, serve

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
disable_progress_bars()

TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # TRL multiplies the KL by the ratio unless told otherwise: another gradient than that of the paper's loss.
    "grpo": (GRPOTrainer, GRPOConfig,
             {"loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": False}),
    "rloo": (RLOOTrainer, RLOOConfig, {}),
    "sft": (SFTTrainer, SFTConfig, {}),
    "sft-packed": (SFTTrainer, SFTConfig, {"packing": True, "max_length": PACKED_LENGTH}),
    "reward": (RewardTrainer, RewardConfig, {"center_rewards_coefficient": 0.01}),  # klimb's default
    "dpo": (DPOTrainer, DPOConfig, {}),
}  # fmt: skip
"""Their settings where the two sides' defaults differ."""


def trainer_of(options: Options, callbacks: list[TrainerCallback]) -> Any:
    torch.set_num_threads(options["threads"])
    gate, tried, job = options["task"] == "gate", options["tried"], job_of(options)
    trainer, config, settings = TRAINERS[job.algorithm or options["job"]]
    rows = read_rows(Path(options["folder"]) / "rows.jsonl")
    micro, whole = tried["micro_batch"], job.whole
    if gate:
        rows = rows[: job.gate_rows]
        micro = whole = job.gate_rows * job.samples if job.has_rollout else job.gate_rows
    if job.has_rollout:
        settings = {**settings, **sampling(job)}
    if job.beta is not None:
        settings = {**settings, "beta": options["beta"]}
    arguments = config(
        output_dir=tempfile.mkdtemp(dir=options["folder"]), use_cpu=options["device"] == "cpu", max_steps=1_000_000,
        bf16=tried["precision"] == "autocast",
        model_init_kwargs={"dtype": "bfloat16" if tried["precision"] == "pure" else "float32"},
        per_device_train_batch_size=micro, gradient_accumulation_steps=whole // micro,
        train_sampling_strategy="sequential", learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        gradient_checkpointing=False, dataloader_pin_memory=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    # The reference is what the trainer is given; the gate then puts the policy's own weights into its model.
    elsewhere = gate and job.beta is not None
    made = trainer(
        model=f"{options['folder']}/{'reference' if elsewhere else 'model'}", args=arguments, callbacks=callbacks,
        train_dataset=Dataset.from_list(rows), **({"reward_funcs": reward} if job.has_rollout else {}),
    )  # fmt: skip
    if elsewhere:
        policy = AutoModelForCausalLM.from_pretrained(f"{options['folder']}/model", dtype=torch.float32)
        made.model.load_state_dict(policy.state_dict())
    return made


def sampling(job: Job) -> dict[str, Any]:
    return {
        "num_generations": job.samples, "max_completion_length": job.max_tokens, "temperature": 1.0,
        "shuffle_dataset": False,
    }  # fmt: skip


class Pace(TrainerCallback):
    """A step is all that happens between two calls of `on_step_begin`."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.steps = 0
        self.measured = {"rollout": 0.0, "tokens": 0, "flat": 0}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.steps:
            self.channel.step(**self.measured)
        else:
            self.channel.loaded()
        self.steps += 1
        self.measured = {"rollout": 0.0, "tokens": 0, "flat": 0}

    def watch(self, trainer: Any) -> None:
        """Tokens of what is learned from and time of what is generated, noted as they pass."""
        compute_loss, generate = trainer.compute_loss, getattr(trainer, "_generate_single_turn", None)

        def counted(model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
            tokens, flat = count(inputs)
            self.measured["tokens"] += tokens
            self.measured["flat"] += flat
            return compute_loss(model, inputs, *given, **named)

        def timed(*given: Any, **named: Any) -> Any:
            assert generate is not None
            start = time.perf_counter()
            generated = generate(*given, **named)
            self.measured["rollout"] += time.perf_counter() - start
            return generated

        trainer.compute_loss, trainer._generate_single_turn = counted, timed


def count(inputs: dict[str, Any]) -> tuple[int, int]:
    """Tokens that carry loss (all, where whole rows are scored), and tokens of all rows without padding."""
    if "completion_ids" in inputs:
        tokens = int(inputs["completion_mask"].sum())
        return tokens, tokens + int(inputs["prompt_mask"].sum())
    flat = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
    labels = labels_of(inputs)
    return flat if labels is None else int((labels != -100).sum()), flat


def labels_of(inputs: dict[str, Any]) -> Tensor | None:
    if "completion_mask" in inputs:
        return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return inputs.get("labels")


def time_steps(options: Options, channel: Channel) -> None:
    pace = Pace(channel)
    trainer = trainer_of(options, [pace])
    pace.watch(trainer)
    trainer.train()


# Which settings are the fastest -------------------------------------------------------------------------------------


class Trial(Channel):
    """Nobody waits between its steps: after the first, three, or as many as begin within eight seconds. One step is
    enough where the best so far took two thirds of its time for a token."""

    def __init__(self, best: float) -> None:
        self.best = best
        self.steps: list[tuple[float, int]] = []

    def loaded(self) -> None:
        self.started = time.perf_counter()

    def step(self, **measured: float) -> None:
        self.steps.append((time.perf_counter() - self.started, int(measured["flat"])))
        timed = [seconds for seconds, _ in self.steps[1:]]
        if len(timed) == 3 or sum(timed) > 8 or self.per_token > 1.5 * self.best:
            raise Finished
        self.started = time.perf_counter()

    @property
    def per_token(self) -> float:
        """Seconds a flat token: samples are as long as they come out, and packed rows hold what fits."""
        return statistics.median(seconds / flat for seconds, flat in self.steps[1:] or self.steps)


def trials(options: Options, channel: Channel) -> None:
    """One candidate after another until the time is up; says what each cost."""
    until, best = time.monotonic() + options["seconds"], options["best"]
    for tried in options["candidates"]:
        if time.monotonic() > until:
            break
        trial = Trial(best)
        with contextlib.suppress(Finished):
            time_steps({**options, "tried": tried}, trial)
        best = min(best, trial.per_token)
        seconds = statistics.median(seconds for seconds, _ in trial.steps[1:] or trial.steps)
        channel.say({"settings": tried, "per_token": trial.per_token, "seconds": seconds, "steps": len(trial.steps)})
    channel.say({})


# The numbers of the fixed batch -------------------------------------------------------------------------------------


def gate(options: Options, channel: Channel) -> None:
    """Loss, gradient norm and what the model says of each row."""
    trainer = trainer_of(options, [])
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    job = job_of(options)
    rollout = job.has_rollout
    inputs = given_samples(trainer, job) if rollout else next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        rows = sampled_rows(trainer, inputs) if rollout else given_rows(model, inputs)
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    channel.say({"loss": float(loss), "grad_norm": float(norm), "rows": rows})


def given_samples(trainer: Any, job: Job) -> dict[str, Any]:
    """From samples to what the loss needs, as TRL does it; only what it would generate is put in its mouth."""
    rows = [row for row in trainer.train_dataset for _ in range(job.samples)]
    vocabulary = trainer.model.config.vocab_size
    completions = [
        given_completion(row["prompt"], i % job.samples, vocabulary, job.max_tokens) for i, row in enumerate(rows)
    ]
    prompts = trainer.processing_class([row["prompt"] for row in rows])["input_ids"]
    texts = [as_text(completion) for completion in completions]
    further: tuple[Any, ...] = (None, texts, None, {}, None, None) if isinstance(trainer, GRPOTrainer) else (texts,)
    trainer._generate = lambda _: (prompts, completions, *further)
    return trainer._generate_and_score_completions(rows)


def sampled_rows(trainer: Any, inputs: dict[str, Any]) -> list[Any]:
    """[tokens, log-probs of its completion] of each row; the drift goes into `inputs`, under the names that both
    trainers have for it."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    marked = inputs["completion_mask"].bool()
    logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, tokens, mask, marked.shape[1])
    drifts = [torch.tensor(drift(t[m].tolist())) for t, m in zip(inputs["completion_ids"], marked, strict=True)]
    old = logps + torch.nn.utils.rnn.pad_sequence(drifts, batch_first=True).to(logps.device)
    inputs.update(old_per_token_logps=old, old_logps=(old * marked).sum(1))
    return [[t[m.bool()].tolist(), p[c].tolist()] for t, m, p, c in zip(tokens, mask, logps, marked, strict=True)]


def given_rows(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """[tokens, log-probs of its trained tokens or its score] of each row, a packed one cut into what it holds."""
    tokens, labels = inputs["input_ids"], labels_of(inputs)
    mask = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
    if labels is None:
        scores = model(input_ids=tokens, attention_mask=mask.long()).logits.squeeze(-1)
        return [[t[m].tolist(), [float(score)]] for t, m, score in zip(tokens, mask, scores, strict=True)]
    named = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
    logps = model(input_ids=tokens, labels=labels, fused_lm_head=True, use_cache=False, **named).log_probs
    logps = torch.nn.functional.pad(logps, (1, 0))  # the first token has none
    rows = []
    for line in zip(tokens, labels, logps, mask, strict=True):
        cuts = inputs["cu_seq_lens_q"].diff().tolist() if "cu_seq_lens_q" in inputs else [tokens.shape[1]]
        for t, label, p, m in zip(*(part.split(cuts) for part in line), strict=True):
            rows.append([t[m].tolist(), p[label != -100].tolist()])
    return rows


if __name__ == "__main__":
    serve(steps=time_steps, trials=trials, gate=gate)
