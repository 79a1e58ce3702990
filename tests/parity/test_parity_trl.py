"""klimb against TRL 1.16: the same weights, rows and settings give the same loss and the same gradients.

TRL's own code is called from sampled completions on (log-probs, reference, rewards, advantages, loss); only what it
would generate is put in its mouth. Weights move between sampling and loss so far that 10–30 % of the tokens clip.
"""

from __future__ import annotations

import importlib
import random
from dataclasses import replace
from functools import partial
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
from klimb.models.packing import Budget
from klimb.objective.advantage import group_mean
from klimb.objective.aggregate import sequence_mean, sequence_sum, token_mean
from klimb.objective.algorithm import Algorithm
from klimb.objective.algorithms import ALGORITHMS, CISPO, DAPO, DR_GRPO, GRPO, GSPO, RLOO
from klimb.objective.credit import assign_credit
from klimb.objective.importance import off_policy_drop
from klimb.objective.kl import KL, NO_KL, k3
from klimb.objective.policy_loss import update_columns
from klimb.objective.preference import Mixed
from klimb.objective.preference.batchwise import aot, aot_unpaired, wpo
from klimb.objective.preference.divergence import fdpo_alpha, fdpo_js, fdpo_kl
from klimb.objective.preference.likelihood import alphapo, chosen_nll, cpo, orpo, rpo, simpo
from klimb.objective.preference.margin import (
    cdpo,
    discopop,
    dpo,
    dpo_norm,
    exo,
    hinge,
    ipo_average,
    ld_dpo,
    robust,
)
from klimb.objective.preference.pointwise import apo_down, apo_zero, bco_pair, kto, nca, sppo_hard
from klimb.objective.surrogate import cispo, clip, dual_clip, product_clip, sapo, vespo
from klimb.stages import preference, rl, sft
from klimb.stages.feedback import mismatched
from klimb.stages.reward_kinds import comparisons

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


def assert_equal(update: Update, gradients: dict[str, Tensor], loss: Tensor, terms: float = 1.0) -> None:
    """terms: the size of what is summed to the loss, which may cancel."""
    for budget in (WHOLE, 40):
        found, measured = outcome(update, budget=budget)
        used = {name: gradient for name, gradient in found.items() if name in gradients}
        assert used.keys() == gradients.keys()
        assert relative_error(used, gradients) <= BOUND
        # Terms of either sign cancel in a loss of algorithms: hence an absolute part.
        assert measured["objective"] == pytest.approx(float(loss), rel=BOUND, abs=BOUND / 10 * terms)


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
    # VESPO's terms are −A φ log π: several nats each, where those of a ratio are around 1.
    assert_equal(update, gradients, loss, terms=4.0 if case == "vespo" else 1.0)


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


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft(loss_type: str, reference: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from datasets import Dataset

    own = tiny("llama")
    own.set_attn_implementation("eager")
    trainer = trl.SFTTrainer(
        model=own, args=trl.SFTConfig(**settings(tmp_path, loss_type=loss_type)), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"input_ids": [5, 6, 7]}] * 2),
    )  # fmt: skip
    batch = rows(masked=True)
    inputs = lines_of(batch)
    marked = inputs.pop("completion_mask").bool()
    inputs["labels"] = torch.where(marked, inputs["input_ids"], -100)
    loss = trainer.compute_loss(own, inputs, num_items_in_batch=marked.sum())
    policy = Policy(Backbone(tiny("llama")), None)
    update = Update(policy.trainable(), batch, lambda micro, totals: sft.sft_loss(policy, micro, totals, loss_type))
    assert_equal(update, gradients_of(own, loss), loss)


def pair_rows(masked: bool) -> TokenBatch:
    """A prompt's samples 0 and 1, 2 and 3 as pairs, the first one chosen; margins for the reward model."""
    batch = rows(masked)
    pairs = TokenBatch.from_rows(batch.rows, [i // 2 for i in range(len(batch))], batch.ids, whole_groups=True)
    return pairs.with_columns(
        margin=torch.linspace(0, 1, len(batch) // 2).repeat_interleave(2), side=torch.arange(len(batch)) % 2
    )


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


DPO_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sigmoid": (dpo(0.3), {}),
    "ipo": (ipo_average(0.3), {}),
    "robust": (robust(0.3, 0.2), {"label_smoothing": 0.2}),
    "hinge": (hinge(0.3), {}),
    "exo_pair": (exo(0.3, 0.01), {"label_smoothing": 0.01}),
    "nca_pair": (nca(0.3), {}),
    "sppo_hard": (sppo_hard(0.3), {}),
    "bco_pair": (bco_pair(0.3), {}),
    "apo_zero": (apo_zero(0.3), {}),
    "apo_down": (apo_down(0.3), {}),
    "aot": (aot(0.3), {}),
    "aot_unpaired": (aot_unpaired(0.3), {}),
    "discopop": (discopop(0.3, 0.5), {"discopop_tau": 0.5}),
    "sigmoid_norm": (dpo_norm(0.3), {}),
    "sigmoid, forward KL": (fdpo_kl(0.3), {"f_divergence_type": "forward_kl"}),
    "sigmoid, JS": (fdpo_js(0.3), {"f_divergence_type": "js_divergence"}),
    "sigmoid, alpha": (fdpo_alpha(0.3, 0.4), {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4}),
    "sigmoid, ld": (ld_dpo(0.3, 0.4), {"ld_alpha": 0.4}),
    "sigmoid, wpo": (wpo(0.3), {"use_weighting": True}),
    "cdpo, as aot of single pairs": (cdpo(0.3, 0.2), {"label_smoothing": 0.2}),
    "rpo, pair by pair": (rpo(0.3, 0.7), {}),
    "mpo, pair by pair": (Mixed(((0.8, dpo(0.3)), (0.2, bco_pair(0.3)), (1.0, chosen_nll()))), {}),
}
ALONE = {"cdpo": (["aot"], [1.0]), "rpo": (["sigmoid", "sft"], [1.0, 0.7]),
         "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])}  # fmt: skip
"""Called with one pair at a time: TRL's sft is a mean over the batch's tokens, klimb's over each completion's."""


@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo(case: str, dpo_setting: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from datasets import Dataset

    own, ref, batch, policy = dpo_setting
    mine, options = DPO_CASES[case]
    name = case.partition(",")[0]
    types, weights = ALONE.get(name, ([name], [1.0]))
    trainer = trl.DPOTrainer(
        model=own, ref_model=ref, processing_class=tokenizer,
        args=trl.DPOConfig(**settings(tmp_path, loss_type=types, loss_weights=weights, beta=0.3, **options)),
        train_dataset=Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}] * 2),
    )  # fmt: skip
    inputs, pairs = lines_of(batch), len(batch) // 2
    parts = [slice(i, i + 1) for i in range(pairs)] if name in ALONE else [slice(None)]
    losses = [trainer.compute_loss(own, chosen_then_rejected(inputs, part)) for part in parts]
    loss = torch.stack(losses).mean()
    assert_equal(prepared(policy, mine, batch), gradients_of(own, loss), loss)


def prepared(policy: Policy, loss: Any, batch: TokenBatch, reference: Policy | None = None) -> Update:
    """The update as the stage makes it, its statistics taken first."""
    session = SimpleNamespace(scoring=Budget(WHOLE))
    update = preference.Update(policy, loss, session, reference)  # type: ignore[arg-type]
    batch, fixed, _ = preference.with_statistics(update, batch, seed=0)
    return Update(policy.trainable(), batch, partial(update.part, fixed))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
def test_kto(weights: tuple[float, float], reference: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL makes its mismatched completions when it prepares the data; here both get klimb's."""
    from datasets import Dataset

    own, ref = tiny("llama"), AutoModelForCausalLM.from_pretrained(reference, attn_implementation="eager").eval()
    own.set_attn_implementation("eager")
    trainer = trl.KTOTrainer(
        model=own, ref_model=ref, processing_class=tokenizer,
        args=trl.KTOConfig(**settings(tmp_path, beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])),
        train_dataset=Dataset.from_list([{"prompt": "w5", "completion": f"w{i}", "label": i % 2 == 0}
                                         for i in range(6, 6 + GROUPS * SAMPLES)]),
    )  # fmt: skip
    batch = rows(masked=True)
    label = torch.arange(len(batch)) % 3 == 0
    alone = TokenBatch.from_rows(batch.rows, range(len(batch)), batch.ids)
    frozen = Policy(Backbone(AutoModelForCausalLM.from_pretrained(reference, attn_implementation="klimb").eval()), None)
    alone = alone.with_columns(side=(~label).long(), ref_logps=policy_logps(frozen, alone, budget=WHOLE).logps)
    others = lines_of(mismatched(alone, context=10_000))
    inputs = {**lines_of(alone), "label": label, **{f"KL_{name}": lines for name, lines in others.items()}}
    loss = trainer.compute_loss(own, inputs)
    policy = Policy(Backbone(tiny("llama")), None)
    assert_equal(prepared(policy, kto(0.3, *weights), alone, frozen), gradients_of(own, loss), loss)


FREE_CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "simpo": (simpo(2.0, 0.8), "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0}),
    "alphapo": (
        alphapo(2.0, 0.25, 0.8), "cpo",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0, "alpha": 0.25},
    ),
    "cpo": (cpo(0.3, 0.7), "cpo", {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.7}),
    "orpo": (orpo(0.3), "orpo", {"beta": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("case", FREE_CASES)
def test_without_a_reference(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Pair by pair, as TRL's likelihood term is a mean over the batch's tokens."""
    from datasets import Dataset

    mine, kind, options = FREE_CASES[case]
    module = importlib.import_module(f"trl.experimental.{kind}")
    own = tiny("llama")
    own.set_attn_implementation("eager")
    trainer = getattr(module, f"{kind.upper()}Trainer")(
        model=own, processing_class=tokenizer,
        args=getattr(module, f"{kind.upper()}Config")(**settings(tmp_path, max_length=64, **options)),
        train_dataset=Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}] * 2),
    )  # fmt: skip
    batch = pair_rows(masked=False)
    if case == "orpo":  # TRL's likelihood is over the prompt, too: one token, which nothing predicts
        short = [[Row(line.prompt[-1:], line.completion, line.mask)] for (line,) in batch.rows]
        batch = replace(batch, rows=short)
    losses = []
    for row in range(0, len(batch), 2):
        pair: dict[str, Tensor] = {}
        for side, (line,) in zip(("chosen", "rejected"), batch.rows[row : row + 2]):
            whole = [*line.prompt, *line.completion]
            pair |= {
                f"{side}_input_ids": torch.tensor([whole]), f"{side}_attention_mask": torch.ones(1, len(whole)).long(),
                f"{side}_labels": torch.tensor([[-100] * len(line.prompt) + [*line.completion]]),
            }  # fmt: skip
        losses.append(trainer.get_batch_loss_metrics(own, pair)[0])
    loss = torch.stack(losses).mean()
    policy = Policy(Backbone(tiny("llama")), None)
    assert_equal(prepared(policy, mine, batch), gradients_of(own, loss), loss)


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
    update = Update(
        model.trainable(), batch, lambda micro, totals: comparisons.pair_loss(model, micro, totals, centering)
    )
    assert_equal(update, gradients_of(own, loss), loss)
