"""Ratings in words behind a completion: rows → tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klimb.data.judged import load_judged
from klimb.data.rated_text import Spelling, rated_text
from klimb.data.render import Renderer
from klimb.errors import DataError
from klimb.lab.scratch import piece_tokenizer, word_tokenizer

ASK, NAMES = "\nRate this.\n", ["helpfulness", "correctness"]
ROW = {"prompt": "2+2=", "completion": "4", "helpfulness": 10, "correctness": 2.5, "other": None}


def read(renderer: Renderer, tokens: list[int]) -> str:
    return str(renderer.tokenizer.decode(tokens))


def test_ratings_stand_behind_the_instruction(characters: Renderer) -> None:
    [item] = load_judged(rated_text(NAMES, ASK), [ROW], characters).items
    asked, answer = item.pieces
    assert read(characters, item.prompt + asked) == "<bos>2+2=4\nRate this.\n"
    assert read(characters, answer) == "helpfulness: 10, correctness: 2.5<eos>"
    assert item.values == [10.0, 2.5]


def test_ratings_of_messages_are_the_assistants_next_turn(characters: Renderer) -> None:
    said = {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}
    [item] = load_judged(rated_text(NAMES, "Rate this."), [{**ROW, **said}], characters).items
    asked, answer = item.pieces
    assert read(characters, asked) == "4<|im_end|>\n<|im_start|>user\nRate this.<|im_end|>\n<|im_start|>assistant\n"
    assert read(characters, answer) == "helpfulness: 10, correctness: 2.5<|im_end|>"


def test_what_is_spelt_in_pieces_reads_as_if_it_were_whole() -> None:
    """Byte pairs that never saw such a text, and those that have merged parts of it."""
    text = "helpfulness: 10, correctness: 2.5"
    for seen in (["Nothing of the kind."] * 20, [text, text.replace("10", "7")] * 20):
        renderer = Renderer(piece_tokenizer(seen, 400))
        said = Spelling(renderer, NAMES, ASK).answer([10.0, 2.5], False)
        assert read(renderer, said) == f"{text}<eos>"
        assert said == renderer.completion(ASK, text).completion  # as whoever has it written will meet it


def test_the_cache_knows_the_names_and_the_instruction(characters: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rated.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    for names, ask, expected in (
        (NAMES, ASK, "helpfulness: 10, correctness: 2.5<eos>"), (NAMES[1:], ASK, "correctness: 2.5<eos>"),
        (NAMES, "\nNow?\n", "helpfulness: 10, correctness: 2.5<eos>"),
    ):  # fmt: skip
        found = load_judged(rated_text(names, ask), path, characters, cache=True)
        assert "miss" in found.report.cache
        [item] = load_judged(rated_text(names, ask), path, characters, cache=True).items
        assert read(characters, item.pieces[0]) == f"4{ask}"
        assert read(characters, item.pieces[1]) == expected


def test_rows_without_ratings_are_refused(characters: Renderer) -> None:
    for change, complaint in (({"correctness": None}, "has no column of ratings correctness"),
                              ({"correctness": "good"}, "is 'good', not a number")):  # fmt: skip
        with pytest.raises(DataError, match=complaint):
            load_judged(rated_text(NAMES, ASK), [{**ROW, **change}], characters)
    with pytest.raises(DataError, match="tokens"):
        load_judged(rated_text(NAMES, ASK), [ROW], characters, max_length=40)
    words = Renderer(word_tokenizer(["a", "b", "rate", "Yes", "helpfulness:", "1"]))
    row = {"prompt": "a", "completion": "b", "helpfulness": 1}
    assert load_judged(rated_text(["helpfulness"], " rate"), [row], words).items
    with pytest.raises(DataError, match="cannot read this text"):
        load_judged(rated_text(["helpfulness"], " rate"), [{**row, "helpfulness": 2}], words)
