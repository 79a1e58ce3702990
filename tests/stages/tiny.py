"""Models of random numbers in the shape of those that people have: Qwen3 and Llama, with a chat template."""

from __future__ import annotations

import string
from pathlib import Path

from klimb.commands.new import TEMPLATE
from klimb.lab.scratch import Architecture, character_tokenizer, make_model


def chat_model(folder: Path, architecture: Architecture = "qwen3", context: int = 1024) -> str:
    """Characters as tokens, ChatML."""
    tokenizer = character_tokenizer(string.printable[:95] + "\n")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    made = make_model(folder, tokenizer=tokenizer, architecture=architecture, hidden=32, layers=2, heads=2, mlp=64,
                      context=context, seed=0)  # fmt: skip
    return str(made)
