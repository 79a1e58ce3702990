"""The models that a benchmark trains: random weights that stop as often as trained ones do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
from jobs import Job, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from klimb.lab.scratch import Architecture, make_model, word_tokenizer

logging.set_verbosity_error()
logging.disable_progress_bar()

LEARNING_RATE = 1e-10  # at 1e-6 AdamW moves all weights at once and completions grow by half in eight steps
_SPREAD = 0.02
_DIRECTION_SHARE = 2.0  # length of the fixed direction in every embedding that the stop token hangs on, over the rest


class Size(NamedTuple):
    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int

    def forward_flops(self, tokens: int, predicted: int, seen: int) -> int:
        """Of a forward pass of the Llama shape: `predicted` of the tokens reach the head, `seen` counts the pairs of
        a token and an earlier one (or itself)."""
        layers = 2 * (4 * self.hidden**2 + 3 * self.hidden * self.mlp) * self.layers
        return layers * tokens + 2 * self.hidden * self.vocabulary * predicted + 4 * self.hidden * self.layers * seen


SIZES = {
    "S": Size(128, 4, 4, 344, 512),
    "M": Size(320, 6, 5, 1040, 4096),
    "L": Size(640, 10, 10, 1600, 8192),
}
"""Random weights; as a Llama 0.92 M, 11.1 M and 57.6 M parameters (47 M of L in its layers)."""


def prepare(folder: Path, size: str, job: Job, steps: int, architecture: Architecture = "llama") -> int:
    """Writes rows.jsonl, model/ and, where the job has one, another reference/; returns the number of parameters.

    reference/ is near to model/ and not the same: the batch that both sides have to agree on needs log-ratios that
    are not zero.
    """
    shape = SIZES[size]
    if architecture == "gpt2":  # TRL pads a prompt on the left and leaves the positions of that family as they come
        job = job._replace(prompt_tokens=(job.prompt_tokens[1],) * 2)
    words = [f"w{i}" for i in range(shape.vocabulary - 3)]  # three special tokens come on top
    for name in ("model", "reference") if job.beta is not None else ("model",):
        make_model(
            folder / name, tokenizer=word_tokenizer(words), architecture=architecture, hidden=shape.hidden,
            layers=shape.layers, heads=shape.heads, mlp=shape.mlp, context=job.context, seed=0,
        )  # fmt: skip
    write_rows(folder / "rows.jsonl", job, words, steps)
    parameters = _teach_to_stop(folder / "model", job.stop, random.Random(0))
    if job.beta is not None:
        _moved(folder / "model").save_pretrained(folder / "reference")
    if job.scores:
        _as_classifier(folder / "model")
    return parameters


def _moved(path: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.03 * parameter.std() * torch.randn(parameter.shape, generator=draw)
    return model


def _as_classifier(path: Path) -> None:
    """One score from a random head, in the place of the causal model: heads made by the sides would differ."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=model.config.hidden_size**-0.5)
    model.save_pretrained(path)


def _teach_to_stop(path: Path, probability: float, draw: random.Random) -> int:
    """Random weights stop once in V tokens: make the stop token as likely, everywhere, as real lengths ask for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
    eos = model.config.eos_token_id
    direction = torch.tensor([1.0, -1.0]).repeat(hidden // 2) * hidden**-0.5  # its mean is 0: layer norms take that off
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= _SPREAD * hidden**0.5  # made with a spread of hidden^-0.5, which random layers amplify
        embedding = model.get_input_embeddings().weight
        embedding += _DIRECTION_SHARE * embedding.norm(dim=1).mean() * direction
        row = model.get_output_embeddings().weight
        row -= (row @ direction)[:, None] * direction  # no other token hangs on the direction
        texts = torch.tensor([[draw.randrange(3, vocabulary) for _ in range(220)] for _ in range(8)])
        states = model.base_model(texts).last_hidden_state[:, 75:].reshape(-1, hidden)
        others = states @ row.T
        others[:, eos] = -torch.inf
        low, high = (0.0, 100.0) if probability else (-100.0, -100.0)
        for _ in range(40):
            scale = (low + high) / 2
            logits = others.clone()
            logits[:, eos] = scale * (states @ direction)
            likely = float(logits.softmax(-1)[:, eos].mean()) > probability
            low, high = (low, scale) if likely else (scale, high)
        row[eos] = scale * direction
    model.save_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters())
