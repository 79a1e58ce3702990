"""`klimb new`: a folder that runs as it stands (recipe, data, reward function, a tiny model), to be made one's own."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

from klimb.errors import RunError
from klimb.runtime import durable

STARTER = Path(__file__).parent / "starter"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as Qwen writes it: the folder's data go through a template as they will with a model of one's own."""


def new(name: str) -> Path:
    """Writes the folder, whole or not at all. Raises RunError where something of this name holds anything."""
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError("is there already", where=folder, why="klimb new writes over nothing", fix="choose another name")
    with durable.explained("cannot make the folder", folder, fix="choose another place"):
        durable.remove_folder(folder)  # empty
        with durable.new_folder(folder) as made:
            for file in sorted(path for path in STARTER.iterdir() if path.is_file()):
                text = file.read_text(encoding="utf-8").replace("{{name}}", folder.resolve().name)
                (made / file.name).write_text(text, encoding="utf-8")
            (made / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows()), encoding="utf-8")
            _make_model(made / "model")
    return folder


def rows() -> list[dict[str, object]]:
    """Twenty sums of one digit."""
    sums = [(a, b) for a in range(1, 9) for b in range(1, 10 - a)]
    return [
        {"prompt": [{"role": "user", "content": f"{a} + {b}"}], "answer": str(a + b)}
        for a, b in random.Random(0).sample(sums, 20)
    ]


def _make_model(directory: Path) -> None:
    from transformers.utils import logging

    from klimb.lab.scratch import character_tokenizer, make_model

    logging.disable_progress_bar()
    tokenizer = character_tokenizer(string.printable[:95] + "\n")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    make_model(directory, tokenizer=tokenizer, architecture="llama", hidden=64, layers=2, heads=4, mlp=128,
               context=256, seed=0)  # fmt: skip
