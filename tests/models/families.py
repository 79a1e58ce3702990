"""Tiny random models of every tested family, and ragged batches to hold them against transformers."""

from __future__ import annotations

import random

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from klimb import native
from klimb.batch import Row, TokenBatch
from klimb.models import attention, decoder, fused

VOCABULARY = 97
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_WINDOW = {"sliding_window": 7, "head_dim": 8, "query_pre_attn_scalar": 8}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "llama-tied": lambda: transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=16),
    "mistral-window": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=7),
    "gemma2": lambda: transformers.Gemma2Config(**_SHAPE, **_WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SHAPE, **_WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "cohere-scaled": lambda: transformers.CohereConfig(**_SHAPE, logit_scale=0.25),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}


def tiny(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Weights are spread out so that a wrong position or mask moves the log-probs by far more than rounding.

    As klimb loads them: small layers taken over where there are kernels.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model = model.to(dtype).eval()
    if native.why_not() is None:
        fused.take_over(model)
        decoder.take_over(model)
    return model


def ragged(groups: int = 3, samples: int = 4, seed: int = 0, longest: int = 20) -> TokenBatch:
    """Groups with a shared prompt, lengths and masks at random; at least one marked token a sample."""
    draw = random.Random(seed)
    rows, group = [], []
    for place in range(groups):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 14))]
        for _ in range(samples):
            completion = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))]
            mask = [draw.random() < 0.8 for _ in completion]
            mask[draw.randrange(len(mask))] = True
            rows.append([Row(prompt, completion, mask)])
            group.append(place)
    return TokenBatch.from_rows(rows, group, [f"row {i}" for i in range(len(rows))])


@torch.no_grad()
def own_logps(model: PreTrainedModel, batch: TokenBatch, temperature: float = 1.0) -> torch.Tensor:
    """The oracle: each row alone through the model's own eager attention and head, no padding, no sharing."""
    model.set_attn_implementation("eager")
    grid = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for i, (row,) in enumerate(batch.rows):
        tokens = torch.tensor([[*row.prompt, *row.completion]])
        logps = (model(input_ids=tokens).logits[0].double() / temperature).log_softmax(-1)
        marked = [len(row.prompt) + j for j, m in enumerate(row.mask) if m]
        grid[i, : len(marked)] = torch.stack([logps[p - 1, tokens[0, p]] for p in marked])
    model.set_attn_implementation(attention.NAME)
    return grid
