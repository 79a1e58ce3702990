"""The log-prob stored when a token was drawn is the trainer's, on every device and in every type."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, tiny

from klimb.models.backbone import Backbone
from klimb.models.faces import Policy, policy_logps
from klimb.models.load import load_causal
from klimb.rollout.engine import Request, generate
from klimb.rollout.local import LocalEngine
from klimb.rollout.sampling import SamplingParams
from klimb.stages.evaluate import batch_of
from klimb.types import Prompt

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 7e-3}
"""Of the 99th percentile. Sums in another order differ in their last bit: of 24, 8 and 11."""


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_what_is_sampled_is_what_is_trained(family: str, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    network, _ = load_causal(str(tmp_path), torch.device(device), dtype)
    policy = Policy(Backbone(network), None)
    draw = random.Random(0)
    prompts = [Prompt(f"p{i}", [draw.randrange(8, VOCABULARY) for _ in range(1 + i % 9)], "?") for i in range(16)]
    params = SamplingParams(24, frozenset(range(3)))
    engine = LocalEngine(policy, str, max_rows=40)  # of 64: some wait, some move into the slots of others
    groups = generate(engine, [Request(prompt, 4, params, seed=0) for prompt in prompts])
    batch = batch_of(groups)
    logps = policy_logps(policy, batch, budget=400).logps.cpu()[batch.mask]
    sampled = torch.tensor([logp for group in groups for sample in group.samples for logp in sample.logps])
    gaps = (logps - sampled).abs().sort().values
    assert len(gaps) > 500
    assert gaps[int(0.99 * len(gaps))] < BOUNDS[dtype]
