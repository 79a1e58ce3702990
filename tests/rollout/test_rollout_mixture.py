"""Drawing from a geometric mixture of two models: what comes out has the distribution that the formula says."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from families import VOCABULARY, tiny
from test_rollout_local import STOP, as_batch, prompts, requests
from torch import Tensor

from klimb.batch import TokenBatch
from klimb.errors import ConfigError
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.load import LoRA
from klimb.models.packing import pack
from klimb.rollout.engine import Request, generate
from klimb.rollout.local import LocalEngine
from klimb.rollout.mixture import Mixture
from klimb.rollout.sampling import SamplingParams
from klimb.types import Group

pytestmark = pytest.mark.usefixtures("kernels")
PAIRS = [("llama", "llama"), ("gpt2", "qwen3"), ("gemma2", "llama-tied")]


def face(family: str, seed: int) -> Policy:
    return Policy(Backbone(tiny(family, seed)), None)


def drawn(policy: Policy | Mixture, asked: list[Request], max_rows: int = 64) -> list[Group]:
    return generate(LocalEngine(policy, str, max_rows=max_rows), asked)


@torch.no_grad()
def distributions(policy: Policy, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """log π of all that could stand at the marked tokens [M, V], by the trainer's packed pass."""
    head, states = policy.predictions(pack(batch, policy.device))
    return (head.logits(states).double() / temperature).log_softmax(-1)


def by_formula(policy: Policy, reference: Policy, share: float, batch: TokenBatch, temperature: float) -> Tensor:
    own, other = (distributions(each, batch, temperature).exp() for each in (policy, reference))
    weights = own ** (1 - share) * other**share
    return (weights / weights.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize(("own", "other"), PAIRS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_of_what_is_drawn_are_the_mixtures(own: str, other: str, temperature: float) -> None:
    """Through both caches, with samples that come and go."""
    policy, reference = face(own, 0), face(other, 1)
    groups = drawn(Mixture(policy, reference, 0.3), requests(SamplingParams(24, STOP, temperature)), max_rows=5)
    batch = as_batch(groups)
    expected = by_formula(policy, reference, 0.3, batch, temperature)
    tokens = torch.tensor([token for group in groups for sample in group.samples for token in sample.tokens])
    gap = expected[torch.arange(len(tokens)), tokens] - batch["behavior"][batch.mask]
    assert torch.quantile(gap.abs(), 0.99) <= 2e-5 / temperature  # that of one model's own samples


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_tokens_follow_the_mixture(share: float) -> None:
    """χ² of the first and of the second token of 20,000 samples, those that each first one makes likely."""
    policy, reference = face("llama", 0), face("gpt2", 1)
    n, prompt = 20_000, prompts(1)[0]
    (group,) = drawn(Mixture(policy, reference, share), [Request(prompt, n, SamplingParams(2, STOP), 5)], n)
    begun = Counter(sample.tokens[0] for sample in group.samples)
    one_each = {sample.tokens[0]: sample for sample in group.samples if sample.tokens[0] not in STOP}
    found = by_formula(policy, reference, share, as_batch([Group(prompt, [*one_each.values()])]), 1.0).exp()
    first, second = found[::2], found[1::2]
    assert chi_square(begun, n * first[0]) < 4.5
    counts = torch.tensor([begun[token] for token in one_each], dtype=torch.float64)
    followed = Counter(sample.tokens[1] for sample in group.samples if len(sample.tokens) > 1)
    assert chi_square(followed, counts @ second) < 4.5


def chi_square(counts: Counter[int], expected: Tensor) -> float:
    """How many standard deviations χ² is above its mean, of cells of at least 20 expected; 4.5 is about p = 1e-5."""
    counted = torch.tensor([counts[token] for token in range(len(expected))], dtype=torch.float64)
    big = expected >= 20
    freedom = int(big.sum()) - 1
    assert freedom > 20
    value = float(((counted - expected)[big] ** 2 / expected[big]).sum())
    return (value - freedom) / math.sqrt(2 * freedom)


def test_at_its_ends_it_is_one_of_the_two_to_the_bit() -> None:
    policy, reference = face("llama", 0), face("llama", 1)
    asked = requests(SamplingParams(12, STOP))
    assert drawn(Mixture(policy, reference, 0.0), asked) == drawn(policy, asked)
    assert drawn(Mixture(policy, reference, 1.0), asked) == drawn(reference, asked)


def test_an_adapter_is_mixed_with_the_base_below_it() -> None:
    backbone = Backbone(tiny("llama"), None, LoRA(rank=2))
    with torch.no_grad():
        for name, weight in backbone.trainable().items():
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    policy, base = Policy(backbone), Policy(backbone, None)
    groups = drawn(Mixture(policy, base, 0.5), requests(SamplingParams(12, STOP)))
    batch = as_batch(groups)
    expected = by_formula(policy, base, 0.5, batch, 1.0)
    tokens = torch.tensor([token for group in groups for sample in group.samples for token in sample.tokens])
    gap = expected[torch.arange(len(tokens)), tokens] - batch["behavior"][batch.mask]
    assert gap.abs().max() <= 1e-4
    alone = distributions(policy, batch)[torch.arange(len(tokens)), tokens] - batch["behavior"][batch.mask]
    assert alone.abs().mean() > 0.05  # it is not the policy's own


def test_models_of_other_vocabularies_do_not_mix() -> None:
    other = tiny("llama")
    other.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ConfigError, match=f"logits of {VOCABULARY + 3} tokens and the policy of {VOCABULARY}"):
        Mixture(face("llama", 0), Policy(Backbone(other), None), 0.5)
