"""One update of every loss that klimb trains with, on tiny models: what has to be the same however it is computed."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from families import CONFIGS, ragged, tiny
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from klimb import metrics
from klimb.batch import TokenBatch
from klimb.models.backbone import Backbone
from klimb.models.faces import Critic, Policy, RewardModel
from klimb.models.packing import Budget
from klimb.objective.algorithms import ALGORITHMS, GRPO, RLOO, Algorithm
from klimb.objective.credit import assign_credit
from klimb.objective.importance import truncate
from klimb.objective.kl import KL, k2
from klimb.objective.policy_loss import update_columns
from klimb.objective.preference import PREFERENCE_LOSSES, needs_of, parse_preference
from klimb.objective.surrogate import anchor_of, clip, dual_clip, product_clip
from klimb.runtime.learner import Learner, Loss, Optimizer
from klimb.stages import preference, rl, sft
from klimb.stages.reward_kinds import comparisons

TEMPERATURE = 0.8


@dataclass(frozen=True)
class Update:
    parameters: Mapping[str, nn.Parameter]
    batch: TokenBatch
    loss: Loss


def outcome(
    update: Update, *, budget: int, batch: TokenBatch | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients as they reach AdamW (unclipped), and the merged metrics."""
    learner = Learner(update.parameters, Optimizer(max_grad_norm=None), lr=1e-30, total_steps=1, budget=budget)
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({n: m.grad.clone() for n, m in learner.masters.items() if m.grad is not None})

    learner.adam.register_step_pre_hook(keep)
    measured = learner.step(batch or update.batch, update.loss)
    return gradients, metrics.results(measured)


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest ‖a − b‖ / ‖b‖ of a parameter; one whose gradient is next to nothing (a key's bias has none in theory)
    is measured by a twentieth of the whole gradient."""
    assert found.keys() == expected.keys()
    whole = float(torch.cat([g.flatten() for g in expected.values()]).norm())
    return max(float((found[n] - g).norm() / max(float(g.norm()), whole / 20)) for n, g in expected.items())


# The updates --------------------------------------------------------------------------------------------------------


def policy_model(dtype: torch.dtype, seed: int = 0) -> Policy:
    """GPT-2 computes every part in the dtype of its weights; the others do their norms in fp32 even in float64."""
    return Policy(Backbone(tiny("gpt2", seed, dtype)), None)


def supervised(dtype: torch.dtype) -> Update:
    policy = policy_model(dtype)
    return Update(policy.trainable(), ragged(4, 3), lambda micro, totals: sft.sft_loss(policy, micro, totals))


def dynamic(dtype: torch.dtype) -> Update:
    policy = policy_model(dtype)
    return Update(policy.trainable(), ragged(4, 3), lambda micro, totals: sft.sft_loss(policy, micro, totals, "dft"))


def one_sample(dtype: torch.dtype) -> Update:
    """Nothing to do for a second rank, and a parameter that nothing uses."""
    policy = policy_model(dtype)
    parameters = {**policy.trainable(), "unused": nn.Parameter(torch.ones(3, dtype=dtype))}
    return Update(parameters, ragged(1, 1), lambda micro, totals: sft.sft_loss(policy, micro, totals))


def pairs() -> TokenBatch:
    batch = ragged(groups=6, samples=2, seed=2)
    paired = TokenBatch.from_rows(batch.rows, batch.group.tolist(), batch.ids, whole_groups=True)
    return paired.with_columns(margin=torch.linspace(0, 1, 6).repeat_interleave(2))


def reward_model(dtype: torch.dtype) -> Update:
    classifier = tiny_classifier(dtype)
    model = RewardModel(Backbone(classifier))
    return Update(model.trainable(), pairs(), lambda micro, totals: comparisons.pair_loss(model, micro, totals, 0.05))


def tiny_classifier(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS["gpt2"]()
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="klimb").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def preferences(name: str) -> Callable[[torch.dtype], Update]:
    def make(dtype: torch.dtype) -> Update:
        policy, loss = policy_model(dtype), parse_preference(name)
        batch = sided(needs_of(loss).data)
        with torch.no_grad():
            logps = policy(batch).logps
        batch = batch.with_columns(ref_logps=near(logps, 0.3, seed=3))
        session = SimpleNamespace(scoring=Budget(60))
        reference = Policy(Backbone(tiny("gpt2", 1, dtype)), None)
        update = preference.Update(policy, loss, session, reference)
        batch, fixed, _ = preference.with_statistics(update, batch, seed=0)
        return Update(policy.trainable(), batch, functools.partial(update.part, fixed))

    return make


def sided(data: str) -> TokenBatch:
    """Six pairs or triples, or twelve labelled completions, as the stage batches them."""
    samples = {"triples": 3, "labels": 1}.get(data, 2)
    batch = ragged(groups=12 // min(samples, 2), samples=samples, seed=2)
    sides = torch.tensor([0, 1, 1, 0] * 3) if data == "labels" else torch.arange(samples).repeat(6)
    whole = TokenBatch.from_rows(batch.rows, batch.group.tolist(), batch.ids, whole_groups=True)
    return whole.with_columns(side=sides)


def near(logps: Tensor, scale: float, seed: int) -> Tensor:
    """Log-probs of a policy that is not quite the same."""
    return logps + scale * torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rl_batch(algorithm: Algorithm, policy: Policy, batch: TokenBatch) -> TokenBatch:
    """Columns as the stage fills them; the policy has moved since sampling so far that 10–30 % of the tokens clip."""
    with torch.no_grad():
        logps = policy(batch, temperature=TEMPERATURE).logps
    draw = torch.Generator().manual_seed(5)
    scores = torch.randn(len(batch), generator=draw, dtype=torch.float64)
    scores[:3] = 1.0
    values = torch.where(batch.mask, torch.randn(batch.mask.shape, generator=draw), 0.0)
    ref_logps = near(logps, 0.3, seed=6)
    credit = assign_credit(
        algorithm, scores=scores, mask=batch.mask, group=batch.group, logps=logps, ref_logps=ref_logps,
        values=values if algorithm.critic else None, baseline=0.1 * batch.group.double(),
        parts=torch.stack([scores, scores.abs()], dim=1), part_weights=torch.tensor([1.0, 0.5]),
        collisions=logps.exp(),
    )  # fmt: skip
    advantages = credit.advantages.to(logps.dtype)

    def clipped(scale: float) -> float:
        marked = algorithm.surrogate(logps, near(logps, scale, 7).to(logps.dtype), advantages, batch.mask).clipped
        return float((marked & batch.mask).sum() / batch.mask.sum())

    scale = min(torch.logspace(-5, 2, 200).tolist(), key=lambda s: abs(clipped(s) - 0.2))
    old = near(logps, scale, seed=7)
    sampled = old if anchor_of(algorithm.surrogate) == "behavior" else near(old, 0.2, seed=8)
    batch = batch.with_columns(
        advantages=credit.advantages, old_logps=old, behavior_logps=sampled, ref_logps=ref_logps, scores=scores
    )
    columns = update_columns(
        algorithm, logps=logps, old_logps=old, behavior_logps=sampled, advantages=credit.advantages, scores=scores,
        mask=batch.mask, entropy=-logps, seed=9,
    )  # fmt: skip
    batch = batch.with_columns(**columns)
    return batch if credit.returns is None else batch.with_columns(returns=credit.returns, values=values)


def reinforcement(algorithm: Algorithm) -> Callable[[torch.dtype], Update]:
    def make(dtype: torch.dtype) -> Update:
        row, policy = algorithm.resolve(max_length=12), policy_model(dtype)
        actors = SimpleNamespace(policy=policy, algorithm=row, config=SimpleNamespace(temperature=TEMPERATURE))
        batch = rl_batch(row, policy, ragged(4, 3, longest=12))
        return Update(policy.trainable(), batch, lambda micro, totals: rl.rl_loss(actors, micro, totals, {}, None))

    return make


def critic(dtype: torch.dtype) -> Update:
    ppo, face = ALGORITHMS["ppo"], Critic(Backbone(tiny("gpt2", 1, dtype)), None)
    batch = rl_batch(ppo, policy_model(dtype), ragged(4, 3, longest=12))
    torch.manual_seed(9)
    nn.init.normal_(face.value.weight, std=0.2)
    actors = SimpleNamespace(critic=face, algorithm=ppo)
    return Update(face.trainable(), batch, lambda micro, totals: rl.value_loss(actors, micro, totals))


FURTHER = (
    replace(RLOO, name="rloo, as TRL", surrogate=product_clip()),
    replace(GRPO, name="dual clip", surrogate=dual_clip()),
    replace(GRPO, name="KL of sequences", kl=KL("loss", k2, beta=0.1, level="sequence")),
    replace(GRPO, name="importance and entropy", surrogate=clip(0.2, 0.28), importance=truncate(), entropy_bonus=0.02),
)
UPDATES: dict[str, Callable[[torch.dtype], Update]] = {
    "sft": supervised,
    "dft": dynamic,
    "one sample": one_sample,
    "reward model": reward_model,
    **{name: preferences(name) for name in PREFERENCE_LOSSES},
    **{algorithm.name: reinforcement(algorithm) for algorithm in (*ALGORITHMS.values(), *FURTHER)},
    "critic": critic,
}
WHOLE = 100_000
BUDGETS = (WHOLE, 60)


def main(folder: Path) -> None:
    """One of several ranks: every update, its outcome to files."""
    from klimb.runtime.ranks import process_group, rank

    torch.set_num_threads(1)
    facts: dict[str, dict[str, float]] = {}
    tensors: dict[str, Tensor] = {}
    with process_group():
        for dtype in (torch.float32, torch.float64):
            for name, make in UPDATES.items():
                for budget in BUDGETS:
                    key = f"{dtype}/{name}/{budget}"
                    gradients, facts[key] = outcome(make(dtype), budget=budget)
                    tensors |= {f"{key}/{parameter}": gradient for parameter, gradient in gradients.items()}
        save_file(tensors, folder / f"gradients-{rank()}.safetensors")
        (folder / f"metrics-{rank()}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
