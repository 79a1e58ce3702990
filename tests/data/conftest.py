from __future__ import annotations

import string

import pytest

from klimb.commands.new import TEMPLATE
from klimb.data.render import Renderer
from klimb.lab.scratch import character_tokenizer


@pytest.fixture(scope="session")
def characters() -> Renderer:
    """A token for every character, and a chat template."""
    tokenizer = character_tokenizer(string.printable[:95] + "\n")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return Renderer(tokenizer)
