"""klimb against TRL 1.16: the same weights, rows and settings give the same loss and the same gradients.

TRL's own code is called from sampled completions on (log-probs, reference, rewards, advantages, loss); only what it
would generate is put in its mouth. Weights move between sampling and loss so far that 10–30 % of the tokens clip.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from updates import WHOLE, Update, outcome, relative_error, tiny_classifier

from klimb.batch import Row, TokenBatch
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy, RewardModel, policy_logps
from klimb.objective.advantage import group_mean
from klimb.objective.aggregate import sequence_mean, sequence_sum, token_mean
from klimb.objective.algorithm import Algorithm
from klimb.objective.algorithms import ALGORITHMS, CISPO, DAPO, DR_GRPO, GRPO, GSPO, RLOO
from klimb.objective.credit import assign_credit
from klimb.objective.importance import off_policy_drop
from klimb.objective.kl import KL, NO_KL, k3
from klimb.objective.policy_loss import update_columns
from klimb.objective.preference import cdpo, dpo, ipo_average
from klimb.objective.surrogate import cispo, clip, dual_clip, product_clip, sapo, vespo
from klimb.stages import preference, reward, rl, sft

trl = pytest.importorskip("trl", minversion="1.16", reason="parity with TRL needs trl>=1.16 (the extra [dev])")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BOUND = 1e-5  # relative, fp32: padded attention and another order of sums
GROUPS, SAMPLES, LONGEST = 4, 4, 12
PAD, EOS = 0, 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """π_ref on the disk, where TRL looks for it: the policy is near to it and not the same."""
    folder = tmp_path_factory.mktemp("reference")
    moved(tiny("llama"), 0.03, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def moved(model: nn.Module, scale: float, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=draw))
    return model


def rows(masked: bool, seed: int = 4) -> TokenBatch:
    """Groups of ragged completions; with `masked`, tokens that the policy did not choose stand among its own."""
    draw = random.Random(seed)
    tokens = lambda n: [draw.randrange(3, VOCABULARY) for _ in range(n)]  # noqa: E731
    made = []
    for _ in range(GROUPS):
        prompt = tokens(draw.randint(2, 7))
        for _ in range(SAMPLES):
            completion = [*tokens(draw.randint(1, LONGEST - 1)), EOS]
            mask = [not masked or draw.random() < 0.7 for _ in completion[:-1]]
            made.append([Row(prompt, completion, [*mask, True])])
    group = [i // SAMPLES for i in range(len(made))]
    return TokenBatch.from_rows(made, group, [f"row {i}" for i in range(len(made))])


def scores() -> Tensor:
    values = torch.randn(GROUPS * SAMPLES, generator=torch.Generator().manual_seed(8), dtype=torch.float32)
    values[:SAMPLES] = 1.0  # a group without variance
    return values


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": [], "per_device_train_batch_size": GROUPS * SAMPLES, "save_strategy": "no", **changes,
    }  # fmt: skip


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def padded(lines: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(line) for line in lines], batch_first=True, padding_value=value)


def assert_equal(update: Update, gradients: dict[str, Tensor], loss: Tensor) -> None:
    for budget in (WHOLE, 40):
        found, measured = outcome(update, budget=budget)
        used = {name: gradient for name, gradient in found.items() if name in gradients}
        assert used.keys() == gradients.keys()
        assert relative_error(used, gradients) <= BOUND
        # Terms of either sign and the order of 1 cancel in a loss of algorithms: hence an absolute part.
        assert measured["objective"] == pytest.approx(float(loss), rel=BOUND, abs=BOUND / 5)


# Algorithms ---------------------------------------------------------------------------------------------------------


def in_trl(trainer: Any, batch: TokenBatch, old: dict[str, Tensor], new: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """TRL's loss with the weights `new` on what the weights `old` are said to have generated."""
    prompts = [list(row.prompt) for (row,) in batch.rows]
    completions = [list(row.completion) for (row,) in batch.rows]
    texts = ["text"] * len(batch)
    if isinstance(trainer, trl.GRPOTrainer):
        tool_mask = [[int(m) for m in row.mask] for (row,) in batch.rows]
        generated: tuple[Any, ...] = (prompts, completions, tool_mask, texts, None, {}, None, None)
    else:
        generated = (prompts, completions, texts)
    trainer._generate = lambda _: generated
    trainer.model.load_state_dict(old)
    inputs = trainer._generate_and_score_completions([{"prompt": "text"}] * len(batch))
    trainer.model.load_state_dict(new)
    loss = trainer.compute_loss(trainer.model, inputs)
    return loss, gradients_of(trainer.model, loss)


def in_klimb(algorithm: Algorithm, batch: TokenBatch, reference: Path, temperature: float) -> tuple[Update, dict, dict]:
    """The same in klimb, and the weights before and after: moved so far that 10–30 % of the tokens clip."""
    ref = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, attn_implementation="klimb").eval()
    model = tiny("llama")
    policy = Policy(Backbone(model), None)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logps = policy_logps(policy, batch, budget=WHOLE, temperature=temperature).logps
    ref_logps = policy_logps(Policy(Backbone(ref), None), batch, budget=WHOLE, temperature=temperature).logps
    credit = assign_credit(
        algorithm, scores=scores().double(), mask=batch.mask, group=batch.group, logps=logps, ref_logps=ref_logps
    )
    batch = batch.with_columns(advantages=credit.advantages, old_logps=logps, behavior_logps=logps, ref_logps=ref_logps)
    actors = SimpleNamespace(policy=policy, algorithm=algorithm, config=SimpleNamespace(temperature=temperature))

    # Gates that close softly say little about how far the policy moved.
    hard = replace(algorithm, surrogate=clip(), token_filter=None) if soft(algorithm) else algorithm

    def clipped(scale: float) -> float:
        model.load_state_dict(old)
        moved(model, scale, seed=2)
        with torch.no_grad():
            judge = SimpleNamespace(**{**vars(actors), "algorithm": hard})
            return rl.rl_loss(judge, batch, batch.totals, {}, None)[1]["clip_fraction"].result()

    low, high = 1e-5, 1.0
    while not 0.1 <= (share := clipped((low * high) ** 0.5)) <= 0.3:
        low, high = ((low * high) ** 0.5, high) if share < 0.1 else (low, (low * high) ** 0.5)
    now = policy_logps(policy, batch, budget=WHOLE, temperature=temperature, entropy=True)
    columns = update_columns(
        algorithm, logps=now.logps, old_logps=logps, behavior_logps=logps, advantages=credit.advantages,
        scores=scores().double(), mask=batch.mask, entropy=now.entropy,
    )  # fmt: skip
    batch = batch.with_columns(**columns)
    update = Update(policy.trainable(), batch, lambda micro, totals: rl.rl_loss(actors, micro, totals, {}, None))
    return update, old, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def soft(algorithm: Algorithm) -> bool:
    return isinstance(algorithm.surrogate, sapo | vespo) or algorithm.token_filter is not None


LEASH = KL("loss", k3, beta=0.1)
BETA = {"beta": 0.1, "use_bias_correction_kl": False}  # k3 as in the GRPO paper; TRL's default weighs it by the ratio
GRPO_CASES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "grpo": (replace(GRPO, kl=LEASH), {"loss_type": "grpo", "scale_rewards": "group", **BETA}),
    "grpo without std": (
        replace(GRPO, advantage=group_mean, kl=NO_KL), {"loss_type": "grpo", "scale_rewards": "none", "beta": 0.0}
    ),
    "bnpo": (replace(GRPO, aggregate=token_mean, kl=LEASH), {"loss_type": "bnpo", "scale_rewards": "group", **BETA}),
    "dapo": (
        replace(DAPO, overlong=None, kl=LEASH),
        {"loss_type": "dapo", "scale_rewards": "group", "epsilon": 0.2, "epsilon_high": 0.28, **BETA},
    ),
    "dapo with entropy": (
        replace(DAPO, overlong=None, entropy_bonus=0.05),
        {"loss_type": "dapo", "scale_rewards": "group", "epsilon": 0.2, "epsilon_high": 0.28, "entropy_coef": 0.05},
    ),
    "dr_grpo": (
        replace(DR_GRPO, aggregate=sequence_sum(float(LONGEST)), kl=LEASH),
        {"loss_type": "dr_grpo", "scale_rewards": "none", **BETA},
    ),
    "gspo": (
        replace(GSPO, aggregate=sequence_mean),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "cispo": (
        replace(CISPO, overlong=None, surrogate=cispo(low=1.0, high=0.5)), {"loss_type": "cispo", "epsilon_high": 1.5}
    ),
    "dual clip": (
        replace(GRPO, surrogate=dual_clip(0.2, 0.2, bound=1.5), kl=NO_KL), {"loss_type": "grpo", "delta": 1.5}
    ),
    "two-sided": (ALGORITHMS["intellect2"], {"loss_type": "grpo", "delta": 4.0, "beta": 0.001,
                                             "use_bias_correction_kl": False}),
    "corrected KL": (
        replace(GRPO, kl=replace(LEASH, corrected=True)),
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    ),
    "sapo": (ALGORITHMS["sapo"], {"loss_type": "sapo"}),
    "luspo": (
        ALGORITHMS["luspo"],
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3},
    ),
    "vespo": (ALGORITHMS["vespo"], {"loss_type": "vespo"}),
    "lite ppo": (ALGORITHMS["lite_ppo"], {"loss_type": "dapo", "scale_rewards": "batch"}),
    "top entropy": (
        replace(ALGORITHMS["top_entropy"], overlong=None),
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "top_entropy_quantile": 0.2},
    ),
    "off-policy sequence mask": (
        replace(GRPO, kl=NO_KL, importance=off_policy_drop(0.01)),
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.01},
    ),
    "clip higher": (replace(GRPO, surrogate=clip(0.1, 0.3), kl=NO_KL),
                    {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", GRPO_CASES)
def test_grpo(
    case: str, temperature: float, reference: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    algorithm, options = GRPO_CASES[case]
    # num_iterations=2: TRL then keeps the log-probs of the weights that sampled.
    arguments = {"num_generations": SAMPLES, "max_completion_length": LONGEST, "num_iterations": 2, **options}
    trainer = on_policy_trainer(trl.GRPOTrainer, trl.GRPOConfig, arguments, reference, tokenizer, tmp_path, temperature)
    batch = rows(masked=True)
    update, old, new = in_klimb(algorithm, batch, reference, temperature)
    loss, gradients = in_trl(trainer, batch, old, new)
    assert_equal(update, gradients, loss)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo(
    beta: float, temperature: float, reference: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    kl = replace(RLOO.kl, beta=beta) if beta else NO_KL
    algorithm = replace(RLOO, surrogate=product_clip(0.2, 0.2), kl=kl)
    arguments = {"num_generations": SAMPLES, "max_completion_length": LONGEST, "beta": beta, "epsilon": 0.2}
    trainer = on_policy_trainer(trl.RLOOTrainer, trl.RLOOConfig, arguments, reference, tokenizer, tmp_path, temperature)
    batch = rows(masked=False)  # TRL's RLOO knows no tokens of others
    update, old, new = in_klimb(algorithm, batch, reference, temperature)
    loss, gradients = in_trl(trainer, batch, old, new)
    assert_equal(update, gradients, loss)


def on_policy_trainer(
    kind: Any, config: Any, arguments: dict[str, Any], reference: Path, tokenizer: PreTrainedTokenizerFast, out: Path,
    temperature: float,
) -> Any:  # fmt: skip
    from datasets import Dataset

    def given(**_: Any) -> list[float]:
        return scores().tolist()

    return kind(
        model=str(reference), reward_funcs=given, processing_class=tokenizer,
        args=config(**settings(out, temperature=temperature, **arguments),
                    model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"}),
        train_dataset=Dataset.from_list([{"prompt": "w5"}] * (GROUPS * SAMPLES)),
    )  # fmt: skip


# Supervised and preferences -----------------------------------------------------------------------------------------


def lines_of(batch: TokenBatch) -> dict[str, Tensor]:
    """Right-padded, as TRL's collators make them."""
    whole = [[*row.prompt, *row.completion] for (row,) in batch.rows]
    marked = [[0] * len(row.prompt) + [int(m) for m in row.mask] for (row,) in batch.rows]
    return {
        "input_ids": padded(whole, PAD), "attention_mask": padded([[1] * len(line) for line in whole], 0),
        "completion_mask": padded(marked, 0),
    }  # fmt: skip


def test_sft(reference: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from datasets import Dataset

    own = tiny("llama")
    own.set_attn_implementation("eager")
    trainer = trl.SFTTrainer(
        model=own, args=trl.SFTConfig(**settings(tmp_path)), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"input_ids": [5, 6, 7]}] * 2),
    )  # fmt: skip
    batch = rows(masked=True)
    inputs = lines_of(batch)
    marked = inputs.pop("completion_mask").bool()
    inputs["labels"] = torch.where(marked, inputs["input_ids"], -100)
    loss = trainer.compute_loss(own, inputs, num_items_in_batch=marked.sum())
    policy = Policy(Backbone(tiny("llama")), None)
    update = Update(policy.trainable(), batch, lambda micro, totals: sft.sft_loss(policy, micro, totals))
    assert_equal(update, gradients_of(own, loss), loss)


def pair_rows(masked: bool) -> TokenBatch:
    """A prompt's samples 0 and 1, 2 and 3 as pairs, the first one chosen; margins for the reward model."""
    batch = rows(masked)
    pairs = TokenBatch.from_rows(batch.rows, [i // 2 for i in range(len(batch))], batch.ids, whole_groups=True)
    return pairs.with_columns(margin=torch.linspace(0, 1, len(batch) // 2).repeat_interleave(2))


def chosen_then_rejected(inputs: dict[str, Tensor], pairs: slice = slice(None)) -> dict[str, Tensor]:
    """TRL's order: all chosen, then all rejected."""
    return {name: torch.cat([lines[0::2][pairs], lines[1::2][pairs]]) for name, lines in inputs.items()}


@pytest.fixture
def dpo_setting(reference: Path) -> tuple[Any, Any, TokenBatch, Policy]:
    own, ref = tiny("llama"), AutoModelForCausalLM.from_pretrained(reference, attn_implementation="eager").eval()
    own.set_attn_implementation("eager")
    batch = pair_rows(masked=True)
    frozen = AutoModelForCausalLM.from_pretrained(reference, attn_implementation="klimb").eval()
    batch = batch.with_columns(ref_logps=policy_logps(Policy(Backbone(frozen), None), batch, budget=WHOLE).logps)
    return own, ref, batch, Policy(Backbone(tiny("llama")), None)


@pytest.mark.parametrize(("loss_type", "mine"), [("sigmoid", dpo), ("ipo", ipo_average), ("aot", cdpo)])
def test_dpo(loss_type: str, mine: Any, dpo_setting: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL's aot sorts the pairs of a batch: on one pair it is cDPO, so it is called pair by pair."""
    from datasets import Dataset

    own, ref, batch, policy = dpo_setting
    smoothing = 0.2 if mine is cdpo else 0.0
    trainer = trl.DPOTrainer(
        model=own, ref_model=ref, processing_class=tokenizer,
        args=trl.DPOConfig(**settings(tmp_path, loss_type=[loss_type], beta=0.3, label_smoothing=smoothing)),
        train_dataset=Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}] * 2),
    )  # fmt: skip
    inputs, pairs = lines_of(batch), len(batch) // 2
    parts = [slice(i, i + 1) for i in range(pairs)] if mine is cdpo else [slice(None)]
    losses = [trainer.compute_loss(own, chosen_then_rejected(inputs, part)) for part in parts]
    loss = torch.stack(losses).mean()
    chosen = cdpo(beta=0.3, epsilon=smoothing) if mine is cdpo else mine(beta=0.3)
    update = Update(
        policy.trainable(), batch, lambda micro, totals: preference.pair_loss(policy, chosen, micro, totals)
    )
    assert_equal(update, gradients_of(own, loss), loss)


@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_reward_model(
    centering: float, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("classifier")
    tiny_classifier(torch.float32).save_pretrained(folder)
    own = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    trainer = trl.RewardTrainer(
        model=own, processing_class=tokenizer,
        args=trl.RewardConfig(**settings(tmp_path, center_rewards_coefficient=centering or None, disable_dropout=True)),
        train_dataset=Dataset.from_list([{"chosen": "w5 w6", "rejected": "w7"}] * 2),
    )  # fmt: skip
    batch = pair_rows(masked=False)
    inputs = chosen_then_rejected(lines_of(batch))
    del inputs["completion_mask"]
    loss = trainer.compute_loss(own, {**inputs, "margin": batch["margin"][0::2]})
    model = RewardModel(Backbone(tiny_classifier(torch.float32)))
    update = Update(model.trainable(), batch, lambda micro, totals: reward.pair_loss(model, micro, totals, centering))
    assert_equal(update, gradients_of(own, loss), loss)
