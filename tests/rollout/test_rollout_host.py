"""What a decode step asks of the host. On the meta device nothing has a value, so whoever looks at one is found; on a
GPU he would wait for all that was launched before."""

from __future__ import annotations

import random

import pytest
import torch
from families import CONFIGS, VOCABULARY, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from klimb import native
from klimb.models import attention
from klimb.models.backbone import Backbone
from klimb.models.cache import Decode, Seats
from klimb.models.faces import Policy
from klimb.models.load import LoRA, look_for_no_padding
from klimb.rollout.engine import Request
from klimb.rollout.local import LocalEngine
from klimb.rollout.sampling import SamplingParams
from klimb.types import Prompt

PLAIN = SamplingParams(24, frozenset((1, 2)))
RESTRICTED = SamplingParams(24, frozenset((1, 2)), temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.1)


def engine_with(policy: Policy, params: SamplingParams) -> LocalEngine:
    """Three prompts of other lengths, two of which start at once."""
    draw = random.Random(0)
    prompts = [Prompt(f"p{i}", [draw.randrange(8, VOCABULARY) for _ in range(3 + 2 * i)], "?") for i in range(3)]
    engine = LocalEngine(policy, str, max_rows=8)
    engine.submit([Request(prompt, 4, params, seed=0) for prompt in prompts])
    return engine


@pytest.mark.parametrize("params", [PLAIN, RESTRICTED], ids=["plain", "restricted"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt2"])
@torch.inference_mode()
def test_nothing_waits_for_the_device_but_the_question_who_is_done(
    family: str, lora: LoRA | None, params: SamplingParams
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention.NAME).eval()
        look_for_no_padding(model)
        backbone = Backbone(model, None, lora)
    engine = engine_with(Policy(backbone, "policy" if lora else None), params)
    engine._prefill(8)
    for _ in range(3):
        engine._decode()
    with pytest.raises(NotImplementedError, match="meta"):  # the one question of a step
        list(engine._take_finished())


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt2"])
@torch.inference_mode()
def test_a_step_of_fixed_shape_gives_the_same_logits(family: str) -> None:
    """The whole room of the cache instead of what is filled: what a captured graph would compute."""
    policy = Policy(Backbone(tiny(family)), None)
    engine = engine_with(policy, PLAIN)
    native.use(False)
    engine._prefill(8)
    for _ in range(2):
        engine._decode()
    slots, cache = engine.slots, engine.cache
    assert slots is not None
    assert cache is not None
    rows = slice(0, len(slots.owners))

    def logits(longest: int) -> Tensor:
        plan = Decode(cache, Seats(slots.prompts, torch.device("cpu")), slots.prompt_lengths[rows], slots.drawn[rows],
                      longest)  # fmt: skip
        return engine._logits(engine._states(slots.last[rows], plan.position, plan, plan.rows))

    assert slots.longest < cache.length
    assert torch.allclose(logits(slots.longest), logits(cache.length), rtol=0, atol=1e-5)  # sums of another length
    native.use(True)
