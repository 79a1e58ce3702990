"""Comparisons by people: who is held out, and what the small model reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from klimb.errors import DataError
from klimb.lab.transcripts import prepare


def rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def pairs(folder: Path, count: int) -> str:
    made = [{"chosen": f"\n\nHuman: {n}?\n\nAssistant: yes {k}", "rejected": f"\n\nHuman: {n}?\n\nAssistant: no {k}"}
            for n in range(count) for k in range(2)]  # fmt: skip
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*made, {"chosen": "same", "rejected": "same"}]))
    return str(path)


def test_a_dialogue_is_on_one_side_whatever_the_seed(tmp_path: Path) -> None:
    data = pairs(tmp_path, 60)
    worlds = [prepare(tmp_path / str(seed), data=data, seed=seed) for seed in (0, 1)]
    for part in ("comparisons", "held_out", "dialogues"):
        assert rows(worlds[0][part]) == rows(worlds[1][part])
    training, held_out = rows(worlds[0]["comparisons"]), rows(worlds[0]["held_out"])
    assert len(training) + len(held_out) == 120
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held_out}
    assert 15 <= len(held_out) <= 45  # of 60 dialogues a quarter, binomial: 30 pairs, within 2.2 standard deviations
    assert [row["text"] for row in rows(worlds[0]["dialogues"])] == [row["prompt"] + row["chosen"] for row in training]
    assert worlds[0]["summary"].endswith("1 left out, the first: " + f"{data}:121: chosen and rejected are the same")
    weights = [(Path(world["model"]) / "model.safetensors").read_bytes() for world in worlds]
    assert weights[0] != weights[1]


def test_any_text_is_read_and_written_as_it_stands(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepare(tmp_path / "world", data=pairs(tmp_path, 60), seed=0)["model"])
    for text in ("\n\nHuman: 7?\n\nAssistant: yes", "naïve – 日本 🙂 <eos>"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("Assistant", add_special_tokens=False).input_ids) == 1  # learnt from these texts


def test_too_few_to_hold_some_out(tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(DataError, match="1 comparisons are too few"):
        prepare(tmp_path / "world", data=str(data), seed=0)
