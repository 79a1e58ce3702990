"""A model of a few thousand parameters that was taught to answer "a ?" with "it is a", in a conversation."""

from __future__ import annotations

from pathlib import Path

from world import WORDS, Played, play, write

from klimb.lab.scratch import make_model, word_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def chat_model(folder: Path, template: str | None = TEMPLATE) -> str:
    tokenizer = word_tokenizer((*WORDS, "user", "assistant", "system"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return str(make_model(folder, tokenizer=tokenizer, architecture="llama", hidden=16, layers=1, heads=2, mlp=32,
                          context=48, seed=0))  # fmt: skip


def conversations(folder: Path) -> str:
    rows = [{"messages": [{"role": "user", "content": f"{a} ?"}, {"role": "assistant", "content": f"it is {a}"}]}
            for a in "abcdef"]  # fmt: skip
    return write(folder / "chat.jsonl", rows)


def taught(folder: Path) -> Played:
    return play("sft", folder / "sft", model=chat_model(folder / "base"), data=conversations(folder), steps=60,
                batch_size=6)  # fmt: skip
