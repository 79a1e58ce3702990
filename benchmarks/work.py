"""The work that both sides of a benchmark do: one model, one set of prompts, one reward, one fixed batch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from klimb.lab.scratch import make_model, word_tokenizer

PROMPTS, SAMPLES = 8, 8
PROMPT_TOKENS, MAX_TOKENS = (75, 95), 128
LEARNING_RATE = 1e-10  # at 1e-6 AdamW moves all weights at once and completions grow by half in eight steps
_STOP_PROBABILITY = 0.0105  # a completion ends after 72 tokens on average, cut at 128: lengths 1–128, mean about 70
_SPREAD = 0.02
_DIRECTION_SHARE = 2.0  # length of the fixed direction in every embedding that the stop token hangs on, over the rest


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int


SIZES = {"S": Size(128, 4, 4, 344, 512), "M": Size(320, 6, 5, 1040, 4096)}
"""Llama with random weights: 0.92 M and 11.1 M parameters."""


class FixedBatch(NamedTuple):
    """What the correctness gate feeds to both sides: prompts, completions and numbers that no model made."""

    prompts: list[list[int]]
    completions: list[list[int]]
    advantages: list[float]
    ref_logps: list[list[float]]


def prepare(folder: Path, size: str) -> int:
    """Writes model/ and prompts.jsonl; returns the number of parameters."""
    shape = SIZES[size]
    words = [f"w{i}" for i in range(shape.vocabulary - 3)]  # three special tokens come on top
    make_model(
        folder / "model", tokenizer=word_tokenizer(words), architecture="llama", hidden=shape.hidden,
        layers=shape.layers, heads=shape.heads, mlp=shape.mlp, context=256, seed=0,
    )  # fmt: skip
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(words, k=draw.randint(*PROMPT_TOKENS))) for _ in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return _teach_to_stop(folder / "model", draw)


def _teach_to_stop(path: Path, draw: random.Random) -> int:
    """Random weights stop once in V tokens: make the stop token as likely, everywhere, as real lengths ask for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
    eos = model.config.eos_token_id
    direction = torch.full((hidden,), hidden**-0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= _SPREAD * hidden**0.5  # made with a spread of hidden^-0.5, which random layers amplify
        embedding = model.get_input_embeddings().weight
        embedding += _DIRECTION_SHARE * embedding.norm(dim=1).mean() * direction
        row = model.get_output_embeddings().weight
        row -= (row @ direction)[:, None] * direction  # no other token hangs on the direction
        texts = torch.tensor([[draw.randrange(3, vocabulary) for _ in range(220)] for _ in range(8)])
        states = model.model(texts).last_hidden_state[:, PROMPT_TOKENS[0] :].reshape(-1, hidden)
        others = states @ row.T
        others[:, eos] = -torch.inf
        low, high = 0.0, 100.0
        for _ in range(40):
            scale = (low + high) / 2
            logits = others.clone()
            logits[:, eos] = scale * (states @ direction)
            likely = float(logits.softmax(-1)[:, eos].mean()) > _STOP_PROBABILITY
            low, high = (low, scale) if likely else (scale, high)
        row[eos] = scale * direction
    model.save_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters())


def reward(completions: list[str], **_: object) -> list[float]:
    """The share of even-numbered words: next to no work."""
    scores = []
    for completion in completions:
        words = [word for word in completion.split() if word.startswith("w")]
        scores.append(sum(int(word[1:]) % 2 == 0 for word in words) / max(len(words), 1))
    return scores


def fixed_batch(size: str) -> FixedBatch:
    draw = random.Random(1)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(SIZES[size].vocabulary - 3) for _ in range(draw.randint(low, high))]

    prompts = [prompt for _ in range(PROMPTS) for prompt in [tokens(*PROMPT_TOKENS)] * SAMPLES]
    completions = [tokens(3, MAX_TOKENS) for _ in prompts]
    return FixedBatch(
        prompts, completions, [draw.gauss(0, 1) for _ in prompts],
        [[draw.gauss(-6, 0.5) for _ in completion] for completion in completions],
    )  # fmt: skip
