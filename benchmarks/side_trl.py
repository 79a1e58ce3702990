"""TRL's side: its GRPOTrainer, with a callback that waits for the driver before every step."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from work import LEARNING_RATE, MAX_TOKENS, PROMPTS, SAMPLES, fixed_batch, reward
from worker import Channel, serve

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Pace(TrainerCallback):
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.trainer: Any = None
        self.steps = 0
        self.started = self.generating = 0.0
        self.lengths: list[int] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.steps:
            self.channel.loaded()
        else:
            self.channel.step(
                seconds=self.seconds, rollout=self.generating, tokens=sum(self.lengths),
                length=sum(self.lengths) / len(self.lengths),
            )  # fmt: skip
        self.steps += 1
        self.generating = 0.0
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started

    def watch(self, trainer: GRPOTrainer) -> None:
        """Time and lengths of the generation, noted as it passes."""
        generate = trainer._generate_single_turn

        def watched(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            completions, logprobs = generate(*given, **named)
            self.generating += time.perf_counter() - start
            self.lengths = [len(completion) for completion in completions]
            return completions, logprobs

        trainer._generate_single_turn = watched


def trainer_of(options: dict[str, Any], callbacks: list[TrainerCallback]) -> GRPOTrainer:
    torch.set_num_threads(options["threads"])
    tried = options["tried"]
    micro = tried["micro_batch"]
    precision = "bfloat16" if tried.get("weights") == "bf16" else "float32"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"), use_cpu=True, max_steps=1_000_000,
        bf16=tried.get("autocast", False), model_init_kwargs={"dtype": precision},
        per_device_train_batch_size=micro, gradient_accumulation_steps=PROMPTS * SAMPLES // micro,
        num_generations=SAMPLES, max_completion_length=MAX_TOKENS, temperature=1.0, beta=options["beta"],
        # TRL multiplies the KL by the ratio unless told otherwise: another gradient than that of the paper's loss.
        loss_type="grpo", scale_rewards="group", use_bias_correction_kl=False, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", gradient_checkpointing=False, dataloader_pin_memory=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    return GRPOTrainer(
        model=f"{options['folder']}/model", args=config, reward_funcs=reward, callbacks=callbacks,
        train_dataset=load_dataset("json", data_files=f"{options['folder']}/prompts.jsonl", split="train"),
    )  # fmt: skip


def time_steps(options: dict[str, Any], channel: Channel) -> None:
    pace = Pace(channel)
    trainer = trainer_of(options, [pace])
    pace.watch(trainer)
    trainer.train()


def gate(options: dict[str, Any]) -> dict[str, Any]:
    """Log-probs, loss and gradient norm of the fixed batch."""
    trainer = trainer_of(options, [])
    trainer.current_gradient_accumulation_steps = 1
    fixed = fixed_batch(options["size"])
    prompts, prompt_mask = _padded(fixed.prompts, left=True)
    completions, mask = _padded(fixed.completions)
    reference, _ = _padded(fixed.ref_logps)
    inputs = {
        "prompt_ids": prompts.long(), "prompt_mask": prompt_mask.long(), "completion_ids": completions.long(),
        "completion_mask": mask.long(), "advantages": torch.tensor(fixed.advantages), "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), completions.shape[1],
        )  # fmt: skip
    return {"loss": float(loss), "grad_norm": float(norm), "logps": logps[mask].tolist()}


def _padded(rows: list[Any], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    values = torch.zeros(len(rows), width, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        values[i, place] = torch.tensor(row, dtype=torch.float64)
        mask[i, place] = True
    return values.float(), mask


if __name__ == "__main__":
    serve(time_steps, gate)
