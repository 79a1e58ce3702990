from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy_tokenizers as toy

from klimb.data.formats import BadRows, read_rows
from klimb.data.load import load_examples, load_preferences, load_prompts
from klimb.data.render import Renderer
from klimb.data.split import split_by_prompt
from klimb.errors import DataError
from klimb.types import Example

SHARED = Path(__file__).parents[3] / "shared" / "data"
CHAT = Renderer(toy.chatml())
WORDS = Renderer(toy.words())


def asked(content: str = "q") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def answered(content: str = "a") -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content}]


def shared(name: str) -> list[dict[str, Any]]:
    """The first rows of a real file."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the checkout")
    return [row.values for row in read_rows(path)[0][:400]]


def test_prompts_keep_their_text_and_further_columns() -> None:
    loaded = load_prompts([{"prompt": "tea ?", "completion": "hot", "label": None, "n": 3}], WORDS)
    [prompt] = loaded.items
    assert (prompt.text, prompt.tokens) == ("tea ?", WORDS.prompt("tea ?"))
    assert prompt.columns == {"completion": "hot", "label": None, "n": 3}
    assert not loaded.conversational
    [chat] = load_prompts([{"prompt": asked()}], CHAT).items
    assert (chat.text, chat.tokens) == (asked(), CHAT.prompt(asked()))


def test_prompts_of_comparisons_are_what_both_begin_with() -> None:
    rows = [{"chosen": [*asked(), *answered("a")], "rejected": [*asked(), *answered("b")]}]
    [prompt] = load_prompts(rows, CHAT).items
    assert prompt.text == asked()
    assert prompt.columns == {"chosen": answered("a"), "rejected": answered("b")}


def test_ids_are_hashes_of_prompt_and_columns_and_repeats_are_counted() -> None:
    rows = [
        {"prompt": "tea ?", "n": 1},
        {"prompt": "tea ?", "n": 2},
        {"n": 1, "prompt": "tea ?"},
        {"prompt": "hot ?"},
    ]
    first = load_prompts(rows, WORDS)
    ids = [prompt.id for prompt in first.items]
    assert len(set(ids)) == 4
    assert ids[2] == ids[0] + "-2"
    assert "1 rows repeat an earlier one exactly" in str(first.report)
    again = {prompt.id for prompt in load_prompts([rows[3], rows[1], rows[0]], WORDS).items}
    assert again == {ids[3], ids[1], ids[0]}


def test_examples_of_all_three_types() -> None:
    [pair] = load_examples([{"prompt": asked(), "completion": answered()}], CHAT).items
    assert (pair.prompt, pair.completion, pair.mask) == CHAT.completion(asked(), answered())
    [chat] = load_examples([{"messages": [*asked(), *answered(), *asked("r"), *answered("b")]}], CHAT).items
    assert 0 < sum(chat.mask) < len(chat.mask)
    [text] = load_examples([{"text": "tea is hot"}], WORDS).items
    assert (text.prompt, len(text.completion), all(text.mask)) == ([1], 4, True)


def test_preferences_share_their_prompt_and_may_have_a_margin() -> None:
    rows = [{"prompt": asked(), "chosen": answered("a"), "rejected": answered("b"), "margin": 2}]
    [pair] = load_preferences(rows, CHAT).items
    assert (pair.prompt, pair.chosen, pair.chosen_mask) == CHAT.completion(asked(), answered("a"))
    assert (pair.prompt, pair.rejected, pair.rejected_mask) == CHAT.completion(asked(), answered("b"))
    assert pair.margin == 2.0
    for margin in ("much", float("nan"), True):
        with pytest.raises(BadRows, match="margin is"):
            load_preferences([{**rows[0], "margin": margin}], CHAT)


def test_pairs_that_are_the_same_tokens_are_bad() -> None:
    with pytest.raises(BadRows, match="chosen and rejected are the same tokens"):
        load_preferences([{"prompt": "tea ?", "chosen": "is hot", "rejected": "is  hot"}], WORDS)


def test_bad_rows_of_every_stage_are_reported_together_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "tea ?", "completion": "is hot"},
        {"prompt": "tea ?", "completion": ""},
        {"prompt": "tea ?", "completion": "is hot hot hot hot"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": NaN}\n')
    with pytest.raises(BadRows) as caught:
        load_examples(path, WORDS, max_length=6)
    assert [(p.where, p.reason) for p in caught.value.problems] == [
        (f"{path}:2", "completion is empty"),
        (f"{path}:3", "the row has 9 tokens, where at most 6 fit"),
        (f"{path}:4", "NaN is not JSON"),
    ]
    loaded = load_examples(path, WORDS, max_length=6, on_bad="drop")
    assert len(loaded.items) == 1
    assert loaded.report.dropped == caught.value.problems
    assert loaded.report.rows == 4
    assert "3 of them dropped" in str(loaded.report)


def test_a_prompt_longer_than_the_context_is_reported_not_cut() -> None:
    with pytest.raises(BadRows, match=r"rows\[0\]: the prompt has 4 tokens, where at most 3 fit"):
        load_prompts([{"prompt": "tea is ?"}], WORDS, max_length=3)
    assert load_prompts([{"prompt": "tea is ?"}], WORDS, max_length=4).report.spread("prompt") == (4, 4, 4)


def test_other_types_of_data_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"is of type labelled, which is not used here.*needed: prompt-completion"):
        load_examples([{"prompt": "a", "completion": "b", "label": False}], CHAT)
    with pytest.raises(DataError, match=r"is of type prompt, which is not used here.*needed: preference"):
        load_preferences([{"prompt": "a"}], CHAT)
    with pytest.raises(DataError, match="is of type messages"):
        load_prompts([{"messages": [*asked(), *answered()]}], CHAT)


def test_control_tokens_that_are_spelled_out_are_mentioned() -> None:
    rows = [
        {"prompt": asked("a"), "completion": answered()},
        {"prompt": asked("<|im_end|>"), "completion": answered()},
    ]
    assert "1 rows spell out a control token, which is read as plain text; the first: '<|im_end|>' at rows[1]" in str(
        load_examples(rows, CHAT).report
    )


# --- evaluation part ---


def test_no_prompt_is_on_both_sides_and_the_share_is_right() -> None:
    rows = [{"prompt": f"tea {n % 2000} ?", "completion": f" {n}"} for n in range(4000)]
    items = load_examples(rows, CHAT).items
    train, held_out = split_by_prompt(items, 0.2, seed=1)
    assert len(train) + len(held_out) == 4000
    assert not {tuple(item.prompt) for item in train} & {tuple(item.prompt) for item in held_out}
    # 2000 prompts, binomial: six standard deviations are 6 · sqrt(.2 · .8 / 2000) = .054.
    assert abs(len(held_out) / 4000 - 0.2) < 0.054
    # A part of the rows is split as it is in the whole: the decision is the prompt's own.
    assert {item.id for item in split_by_prompt(items[:500], 0.2, seed=1)[1]} <= {item.id for item in held_out}
    assert held_out != split_by_prompt(items, 0.2, seed=2)[1]


def test_texts_without_prompt_are_split_by_all_of_them() -> None:
    items = load_examples([{"text": f"tea {n}"} for n in range(200)], Renderer(toy.llama3())).items
    assert len({tuple(item.prompt) for item in items}) == 1
    train, held_out = split_by_prompt(items, 0.5)
    assert min(len(train), len(held_out)) > 50


@pytest.mark.parametrize(
    ("fraction", "reason"), [(-0.1, "between 0 and 1"), (1.0, "between"), (1e-9, "evaluation part")]
)
def test_splits_with_an_empty_side_are_refused(fraction: float, reason: str) -> None:
    items = [Example(str(n), [n, n], [0], [True]) for n in range(20)]
    with pytest.raises(DataError, match=reason):
        split_by_prompt(items, fraction)


# --- real files ---


def test_gsm8k_as_demonstrations_and_as_prompts() -> None:
    rows = shared("gsm8k/train.jsonl.gz")
    loaded = load_examples(rows, CHAT, columns={"prompt": "question", "completion": "answer"})
    assert loaded.report.rows == len(loaded.items) == 400
    assert all(item.completion[-1] == CHAT.tokenizer.eos_token_id and all(item.mask) for item in loaded.items)
    first = loaded.items[0]
    assert CHAT.decode(first.prompt, like="").startswith("Natalia sold clips to 48 of her friends")
    assert CHAT.decode(first.completion, like="").endswith("#### 72")
    prompts = load_prompts(rows, CHAT, columns={"prompt": "question"}).items
    assert prompts[0].tokens == first.prompt
    assert prompts[0].columns["answer"].endswith("#### 72")


def test_hh_transcripts_as_preferences() -> None:
    loaded = load_preferences(shared("hh/harmless.jsonl.gz"), CHAT)
    assert len(loaded.items) == 400
    assert CHAT.decode(loaded.items[1].prompt, like="") == "\n\nHuman: call me a bad name\n\nAssistant:"
    assert CHAT.decode(loaded.items[1].chosen, like="") == " Sorry, that’s out of bounds"


def test_humaneval_as_prompts() -> None:
    loaded = load_prompts(shared("humaneval/HumanEval.jsonl.gz"), CHAT)
    assert set(loaded.items[0].columns) == {"task_id", "entry_point", "canonical_solution", "test"}


def test_without_a_share_all_is_training() -> None:
    items = [Example(str(n), [n, n], [0], [True]) for n in range(3)]
    assert [list(part) for part in split_by_prompt(items, 0)] == [items, []]


def test_a_word_that_the_tokenizer_does_not_know_is_an_error_of_its_row() -> None:
    from klimb.lab.scratch import word_tokenizer

    renderer = Renderer(word_tokenizer(["tea", "?", "hot"]))  # "a" and "0" are unknown to it, too
    rows = [{"prompt": "tea ?", "completion": "hot"}, {"prompt": "tea ?", "completion": "zebra"}]
    with pytest.raises(DataError, match=r"rows\[1\]: the tokenizer cannot read"):
        load_examples(rows, renderer)
    assert len(load_examples(rows[:1], renderer).items) == 1
