"""Rankings, ratings, steps and verdicts: rows → tokens, and where in a run of tokens a step ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from klimb.data.judged import StepEnds, levels, load_judged, rankings, ratings, steps, verdicts
from klimb.data.load import load_preferences
from klimb.data.render import Renderer
from klimb.errors import DataError
from klimb.lab.scratch import character_tokenizer, piece_tokenizer, word_tokenizer

WORDS = ["a", "b", "c", "?", "yes", "no", "it", "is", "so", ";"]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(word_tokenizer(WORDS))


def read(renderer: Renderer, tokens: list[int]) -> str:
    return str(renderer.tokenizer.decode(tokens))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RANKED = [{"prompt": "a ?", "completions": ["yes", "no so", "it is a"], "scores": [1, -2.5, 0]}]


def test_rankings_keep_their_pieces_also_in_the_cache(renderer: Renderer, tmp_path: Path) -> None:
    path = written(tmp_path / "ranked.jsonl", RANKED)
    for _ in range(2):
        found = load_judged(rankings, path, renderer, cache=True)
        [item] = found.items
        assert [read(renderer, piece) for piece in item.pieces] == ["yes <eos>", "no so <eos>", "it is a <eos>"]
        assert item.values == [1.0, -2.5, 0.0]
    assert "hit" in found.report.cache


def test_ranks_are_scores_the_other_way_round(renderer: Renderer) -> None:
    rows = [{"prompt": "a ?", "completions": ["yes", "no"], "ranks": [2, 1]}]
    assert load_judged(rankings, rows, renderer).items[0].values == [-2.0, -1.0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"scores": [1, 1, 1]}, "scores are all the same"), ({"scores": [1, 2]}, "3 completions but 2 scores"),
     ({"scores": [1, "two", 3]}, r"scores\[1\] is 'two', not a number"), ({"scores": [1, float("inf"), 3]}, "inf")],
)  # fmt: skip
def test_bad_rankings(renderer: Renderer, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        load_judged(rankings, [{**RANKED[0], **change}], renderer)


def test_messages_are_ranked_as_replies(characters: Renderer) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a?"}], "completions": ["yes", "no"], "scores": [1, 0]}]
    [item] = load_judged(rankings, rows, characters).items
    assert [read(characters, piece) for piece in item.pieces] == ["yes<|im_end|>", "no<|im_end|>"]


def test_ratings_come_from_their_columns(renderer: Renderer) -> None:
    rows = [{"prompt": "a ?", "completion": "yes", "helpfulness": 4, "length": 2, "other": 9}]
    [item] = load_judged(ratings(["length", "helpfulness"]), rows, renderer).items
    assert item.values == [2.0, 4.0]
    with pytest.raises(DataError, match="has no column of ratings clarity"):
        load_judged(ratings(["length", "clarity"]), rows, renderer)
    with pytest.raises(DataError, match="is True, not a number"):
        load_judged(ratings(["length"]), [{**rows[0], "length": True}], renderer)


def test_levels_are_whole_numbers(renderer: Renderer) -> None:
    rows = [{"prompt": "a ?", "completion": "yes", "stars": 4.0}, {"prompt": "a ?", "completion": "no", "stars": -1}]
    assert [item.values for item in load_judged(levels("stars"), rows, renderer).items] == [[4.0], [-1.0]]
    for wrong, complaint in ((3.5, r"stars is 3\.5, not a whole number"), (None, "has no column of ratings stars"),
                             ("4", "is '4', not a number"), (float("nan"), "not a number")):  # fmt: skip
        with pytest.raises(DataError, match=complaint):
            load_judged(levels("stars"), [{**rows[0], "stars": wrong}], renderer)
    assert load_judged(ratings(["stars"]), [{**rows[0], "stars": 3.5}], renderer).items[0].values == [3.5]


def test_a_preference_has_a_strength(renderer: Renderer) -> None:
    rows = [{"prompt": "a ?", "chosen": "yes", "rejected": "no", "strength": s} for s in (0.75, None)]
    assert [item.strength for item in load_preferences(rows, renderer).items] == [0.75, 1.0]
    for wrong in (0.5, 1.01, 0.2, "0.8", True):
        with pytest.raises(DataError, match=r"not a share above 0\.5"):
            load_preferences([{**rows[0], "strength": wrong}], renderer)


# Steps ------------------------------------------------------------------------------------------------------------

SOLUTION = {"prompt": "a ?", "completions": ["it is a", "so it is", "yes"], "labels": [True, True, False]}


def test_steps_end_where_the_separator_does(renderer: Renderer) -> None:
    [item] = load_judged(steps(" ; "), [SOLUTION], renderer).items
    assert [read(renderer, piece) for piece in item.pieces] == ["it is a ;", "so it is ;", "yes <eos>"]
    assert item.values == [1.0, 1.0, 0.0]


def test_a_step_that_holds_the_separator_is_refused(renderer: Renderer) -> None:
    with pytest.raises(DataError, match=r"has 3 steps, but 4 when its text is split at ' ; '"):
        load_judged(steps(" ; "), [{**SOLUTION, "completions": ["it ; is", "so", "yes"]}], renderer)


TEXT = "3 eggs a day.\nThat is 3 * 7 = 21 a week.\n\nAnswer: 21"


@pytest.mark.parametrize("size", [300, 400])
def test_pieces_that_swallow_a_line_break_end_a_step_too(size: int) -> None:
    """Byte pairs merge "\\n" with what stands beside it: the step ends with whatever token completes the break."""
    renderer = Renderer(piece_tokenizer([TEXT] * 20, size))
    tokens = renderer.completion("How many?\n", TEXT).completion
    ends = StepEnds(renderer, "\n")(tokens)
    runs, start = [], 0
    for place, end in enumerate(ends):
        if end:
            runs.append(read(renderer, tokens[start : place + 1]).replace("<eos>", ""))
            start = place + 1
    assert len(runs) == 3
    assert "".join(runs) == TEXT
    assert [run.strip() for run in runs] == [line for line in TEXT.splitlines() if line]


def test_a_run_ends_its_last_step_wherever_it_ends(renderer: Renderer) -> None:
    def ends(text: str) -> list[int]:
        tokens = [renderer.tokenizer.convert_tokens_to_ids(word) for word in text.split()]
        return [place for place, end in enumerate(StepEnds(renderer, " ; ")(tokens)) if end]

    assert ends("it is ; so") == [2, 3]  # cut in the middle
    assert ends("it is ; so <eos>") == [2, 4]
    assert ends("it is ; <eos>") == [2]  # nothing stands behind the separator: no step
    assert ends("it ; ; ; so") == [1, 4]  # nor between two
    assert ends("; <eos>") == [1]
    assert ends("<eos>") == [0]
    assert ends("") == []


# Verdicts ---------------------------------------------------------------------------------------------------------

ASK = "\nRight?\n"


def test_a_verdict_stands_behind_the_question(characters: Renderer) -> None:
    rows = [{"prompt": "2+2=", "completion": "4", "label": 1}, {"prompt": "2+2=", "completion": "5", "label": 0}]
    good, bad = load_judged(verdicts(ASK), rows, characters).items
    assert read(characters, good.prompt + good.completion) == "<bos>2+2=4\nRight?\nY"
    assert read(characters, bad.prompt + bad.completion) == "<bos>2+2=5\nRight?\nN"
    assert good.mask == [False] * (len(good.completion) - 1) + [True]
    assert (good.label, bad.label, good.prompt == bad.prompt) == (True, False, True)


def test_a_verdict_on_messages_is_the_assistants_next_turn(characters: Renderer) -> None:
    asked = [{"role": "user", "content": "2+2?"}]
    rows = [{"prompt": asked, "chosen": [{"role": "assistant", "content": "4"}],
             "rejected": [{"role": "assistant", "content": "5"}]}]  # fmt: skip
    good, bad = load_judged(verdicts("Right?"), rows, characters).items
    behind = "<|im_end|>\n<|im_start|>user\nRight?<|im_end|>\n<|im_start|>assistant\n"
    assert read(characters, good.completion) == f"4{behind}Y"
    assert read(characters, bad.completion) == f"5{behind}N"
    assert good.id != bad.id


def test_verdicts_that_begin_alike_are_refused() -> None:
    renderer = Renderer(word_tokenizer([*WORDS, "Yes", "No"]))
    same = character_tokenizer("YNesoab? ")
    assert load_judged(verdicts(" ?"), [{"prompt": "a", "completion": "b", "label": 1}], renderer).items
    same.backend_tokenizer.normalizer = normalizers.Replace("No", "Yes")
    with pytest.raises(DataError, match="begins Yes and No with the same token"):
        load_judged(verdicts(" ?"), [{"prompt": "a", "completion": "b", "label": 1}], Renderer(same))
