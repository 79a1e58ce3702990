"""What preference losses learn from: labels, of pairs too, triples, and pairs of single steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from klimb.data.feedback import load_feedback
from klimb.data.render import Renderer
from klimb.errors import DataError
from klimb.lab.scratch import word_tokenizer

WORDS = ["a", "b", "c", "?", "yes", "no", "it", "is", "so", "."]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(word_tokenizer(WORDS))


def texts(renderer: Renderer, tokens: list[int]) -> str:
    return str(renderer.tokenizer.decode(tokens))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_are_read_from_labelled_rows(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"prompt": "a ?", "completion": "yes", "label": True}, {"prompt": "b ?", "completion": "no", "label": 0}]
    for _ in range(2):  # the second time out of the cache
        found = load_feedback("labels", written(tmp_path / "labelled.jsonl", rows), renderer, cache=True)
        assert [item.label for item in found.items] == [True, False]
        assert texts(renderer, found.items[0].completion).startswith("yes")
        assert all(found.items[1].mask)
    assert "hit" in found.report.cache


def test_a_pair_gives_a_completion_of_each_label(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"prompt": "a ?", "chosen": "yes", "rejected": "no"}, {"prompt": "b ?", "chosen": "so", "rejected": "no"}]
    source = written(tmp_path / "pairs.jsonl", rows)
    for _ in range(2):
        found = load_feedback("labels", source, renderer, cache=True)
        assert [item.label for item in found.items] == [True, False, True, False]
        assert len({item.id for item in found.items}) == 4
        assert found.report.rows == 2
        assert found.report.repeats == 0
    pairs = load_feedback("pairs", source, renderer, cache=True).items
    assert [pair.chosen for pair in pairs] == [item.completion for item in found.items if item.label]
    assert [pair.rejected for pair in pairs] == [item.completion for item in found.items if not item.label]


def test_triples_have_a_gold_completion(renderer: Renderer, tmp_path: Path) -> None:
    row = {"prompt": "a ?", "chosen": "yes", "rejected": "no"}
    source = written(tmp_path / "triples.jsonl", [{**row, "gold": "yes it is"}])
    for _ in range(2):
        [item] = load_feedback("triples", source, renderer, cache=True).items
        assert texts(renderer, item.gold).startswith("yes it is")
        assert len(item.gold) == len(item.gold_mask) == 4
    [pair] = load_feedback("pairs", source, renderer, cache=True).items  # another item of the same rows
    assert pair.gold == []
    for gold, reason in ((None, "has no gold"), (3, "gold is a int"), ("", "gold is empty")):
        with pytest.raises(DataError, match=f"triples.jsonl:2: {reason}"):
            load_feedback(
                "triples", written(tmp_path / "triples.jsonl", [{**row, "gold": "so"}, {**row, "gold": gold}]), renderer
            )


STEPS = [
    {"prompt": "a ? ", "completions": ["it is", "yes", "so"], "labels": [True, True, True]},
    {"prompt": "a ? ", "completions": ["it is", "no", "so"], "labels": [True, False, True]},
    {"prompt": "a ? ", "completions": ["no", "it is"], "labels": [False, True]},
    {"prompt": "b ? ", "completions": ["it is", "no"], "labels": [True, False]},
    {"prompt": "b ? ", "completions": ["it is", "yes"], "labels": [True, True]},
    {"prompt": "c ? ", "completions": ["no"], "labels": [False]},
]


def test_steps_become_pairs_where_solutions_part(renderer: Renderer, tmp_path: Path) -> None:
    items = load_feedback("steps", written(tmp_path / "steps.jsonl", STEPS), renderer).items
    read = [tuple(texts(renderer, part).split() for part in (i.prompt, i.chosen, i.rejected)) for i in items]
    begin, end = renderer.tokenizer.bos_token, renderer.tokenizer.eos_token
    assert read == [
        ([begin, "a", "?"], ["it", "is"], ["no"]),
        ([begin, "a", "?", "it", "is"], ["yes"], ["no"]),
        ([begin, "b", "?", "it", "is"], ["yes", end], ["no", end]),  # these end their solutions
    ]
    assert all(all(i.chosen_mask) and all(i.rejected_mask) for i in items)


def test_steps_without_disagreement_are_refused(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no two solutions agree up to a step and then differ in being right"):
        load_feedback("steps", written(tmp_path / "steps.jsonl", STEPS[:1] + STEPS[5:]), renderer)
    with pytest.raises(DataError, match=r"is of type preference.*needed: steps \(prompt, completions, labels\)"):
        load_feedback("steps", [{"prompt": "a ?", "chosen": "yes", "rejected": "no"}], renderer)
    with pytest.raises(DataError, match=r"needed: labelled .* \| preference"):
        load_feedback("labels", STEPS, renderer)
