from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.data.formats import BadRows
from klimb.data.kinds import read_table, with_prompt
from klimb.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
FUZZ = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def user(content: str = "q") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str = "a") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("row", "type"),
    [
        ({"prompt": "q"}, "prompt (standard)"),
        ({"prompt": [user()], "answer": 4, "label": None}, "prompt (conversational)"),
        ({"prompt": "q", "completion": "a"}, "prompt-completion (standard)"),
        ({"prompt": [user()], "completion": [assistant()]}, "prompt-completion (conversational)"),
        ({"messages": [user(), assistant()]}, "messages (conversational)"),
        ({"text": "once"}, "text (standard)"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference (standard)"),
        ({"prompt": None, "chosen": "q a", "rejected": "q b"}, "preference (standard)"),
        (
            {"chosen": [user(), assistant()], "rejected": [user(), assistant("b")]},
            "preference (conversational)",
        ),
        ({"prompt": "q", "completion": "a", "label": True}, "labelled (standard)"),
        ({"prompt": "q", "completions": ["s", "t"], "labels": [True, False]}, "steps (standard)"),
    ],
)
def test_types_are_detected(row: dict[str, Any], type: str) -> None:
    table = read_table([row])
    assert table.type == type
    assert len(table.records) == 1


def test_further_columns_stay_with_the_row() -> None:
    [record] = read_table([{"prompt": "q", "answer": 4, "meta": {"x": [1]}}]).records
    assert record.values == {"prompt": "q"}
    assert record.columns == {"answer": 4, "meta": {"x": [1]}}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "completion": ""}, "completion is empty"),
        ({"prompt": 3}, "prompt is a int"),
        ({"prompt": None}, "prompt is null"),
        ({"promt": "q"}, "rename them, as in columns={prompt: promt}"),
        ({}, "it has: none"),
        ({"prompt": []}, "prompt has no messages"),
        ({"prompt": ["q"]}, r"prompt\[0\] is a str"),
        ({"prompt": [{"who": "human", "value": "q"}]}, r"prompt\[0\] has no role \(it has: who, value\)"),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\] has no content"),
        ({"prompt": [{"role": "human", "content": "q"}]}, "role 'human'"),
        ({"prompt": [{"role": ["user"], "content": "q"}]}, "role"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "list as content"),
        ({"prompt": [user(), assistant()]}, "nothing to answer"),
        ({"prompt": "q", "completion": [assistant()]}, "mixes strings and messages"),
        ({"prompt": [user()], "completion": [user()]}, "starts with a user"),
        ({"prompt": [user()], "completion": [assistant(), user()]}, "ends with a user"),
        ({"prompt": [user()], "completion": [assistant("")]}, r"completion\[0\] is empty"),
        ({"messages": [user()]}, "no assistant"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no assistant"),
        ({"messages": [assistant()]}, "starts with an assistant"),
        ({"messages": "hello"}, "messages is text, and no JSON"),
        ({"messages": 3}, "not a list"),
        ({"chosen": "same", "rejected": "same"}, "the same"),
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "the same"),
        ({"chosen": "q a", "rejected": [assistant()]}, "mixes"),
        ({"chosen": [user("x"), assistant()], "rejected": [user("y"), assistant()]}, "different messages"),
        (
            {"chosen": [user(), assistant()], "rejected": [user(), assistant(), user()]},
            "start of the other",
        ),
        ({"prompt": "q", "completion": "a", "label": "yes"}, "neither true nor false"),
        ({"prompt": "q", "completions": ["s"], "labels": [True, False]}, "1 completions but 2 labels"),
        ({"prompt": "q", "completions": [], "labels": []}, "completions is empty"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_bad_rows_say_why(row: dict[str, Any], reason: str) -> None:
    for on_bad in ("error", "drop"):  # nothing would be left to go on with
        with pytest.raises(BadRows, match=reason):
            read_table([row], on_bad=on_bad)  # type: ignore[arg-type]


def test_bad_rows_can_be_dropped_and_are_returned() -> None:
    rows = [{"prompt": "q", "completion": text} for text in ("a", "", "b", None)]
    table = read_table(rows, on_bad="drop")
    assert [record.where for record in table.records] == ["rows[0]", "rows[2]"]
    assert [problem.where for problem in table.problems] == ["rows[1]", "rows[3]"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"prompt": "q"}, {"prompt": "q", "completion": "a"}),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a", "label": True}),
        ({"prompt": "q"}, {"prompt": [user()]}),
        ({"messages": [user(), assistant()]}, {"text": "t"}),
    ],
)
def test_a_row_of_another_type_is_one_bad_row(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Wherever it stands: most rows decide, not the first."""
    for rows, at in (([first, first, second, first], 2), ([second, first, first], 0), ([first] * 70 + [second], 70)):
        with pytest.raises(BadRows, match=rf"^rows: 1 of {len(rows)} rows .* rows\[{at}\]: (is|has) "):
            read_table(rows)
        table = read_table(rows, on_bad="drop")
        assert len(table.records) == len(rows) - 1
        assert table.type == read_table([first]).type


def test_bad_rows_and_rows_of_no_type_do_not_decide() -> None:
    good = {"messages": [user(), assistant()]}
    rows = [{"text": ""}, {"text": ""}, {"x": 1}, {"prompt": 3}, good]
    table = read_table(rows, on_bad="drop")
    assert (table.kind, [record.where for record in table.records]) == ("messages", ["rows[4]"])
    assert [problem.reason for problem in table.problems][2] == (
        "has no column messages (it has: x), where most rows are messages"
    )
    late = read_table([{"x": 1}] * 100 + [good, {"text": "t"}, good], on_bad="drop")
    assert (late.kind, len(late.records), len(late.problems)) == ("messages", 2, 101)


@pytest.mark.parametrize(
    ("names", "wanted", "renaming"),
    [
        (("question", "answer"), ("prompt-completion", "text"), "{prompt: question, completion: answer}"),
        (("Instruction", "Response"), ("prompt-completion",), "{prompt: Instruction, completion: Response}"),
        (("prompt", "answer"), ("prompt-completion",), "{completion: answer}"),
        (("winner", "loser"), ("preference",), "{chosen: winner, rejected: loser}"),
        (("promt", "id"), ("messages", "prompt"), "{prompt: promt}"),
        (("a", "b"), ("prompt-completion",), "{prompt: NAME}"),
    ],
)
def test_a_file_in_which_nothing_fits_says_what_it_has_and_proposes_names(
    names: tuple[str, ...], wanted: Any, renaming: str
) -> None:
    rows = [dict.fromkeys(names, "x y")] * 3
    with pytest.raises(BadRows) as said:
        read_table(rows, wanted=wanted)
    reason = "has no" if "prompt" not in names else "is of"
    assert f"none of the 3 rows can be used, for one reason: {reason}" in str(said.value)
    assert f"it has: {', '.join(names)}; needed: " in str(said.value)
    assert str(said.value).endswith(f"columns={renaming}")
    assert "\n" not in str(said.value)


def test_reasons_are_short_and_hold_no_control_characters() -> None:
    rows: list[dict[str, Any]] = [{"\x1b[2J\n": "x", **{f"{n}{'k' * 99}": 1 for n in range(1000)}}]
    with pytest.raises(BadRows) as said:
        read_table(rows)
    assert len(str(said.value)) < 1000
    assert str(said.value).isprintable()


def test_the_wanted_type_decides_between_several_and_a_label_is_not_ignored() -> None:
    row = {"prompt": "q", "messages": [user(), assistant()]}
    assert read_table([row], wanted=["prompt-completion", "messages"]).kind == "messages"
    assert read_table([row], wanted=["prompt"]).kind == "prompt"
    with pytest.raises(DataError, match="is of type labelled, which is not used here"):
        read_table([{"prompt": "q", "completion": "a", "label": False}], wanted=["prompt-completion"])


def test_nulls_that_a_table_filled_in_are_taken_out_of_messages() -> None:
    [record] = read_table([{"prompt": [{**user(), "tool_calls": None}]}]).records
    assert record.values["prompt"] == [user()]


# --- implicit prompts ---


def test_transcripts_are_cut_at_the_last_turn() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:"
    row = with_prompt({"chosen": start + " Tea it is.", "rejected": start + " Tea is off."})
    assert row == {"prompt": start, "chosen": " Tea it is.", "rejected": " Tea is off."}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: b"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c\n\nHuman: d\n\nAssistant: e"),
    ],
)
def test_transcripts_that_part_earlier_are_bad(chosen: str, rejected: str) -> None:
    with pytest.raises(BadRows, match="differ before the"):
        read_table([{"chosen": chosen, "rejected": rejected}])


@FUZZ
@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_string_prompts_are_common_end_at_a_word_and_lose_nothing(prompt: str, one: str, two: str) -> None:
    chosen, rejected = prompt + one, prompt + two
    if chosen == rejected:
        return
    row = with_prompt({"chosen": chosen, "rejected": rejected})
    assert row["prompt"] + row["chosen"] == chosen
    assert row["prompt"] + row["rejected"] == rejected
    assert row["prompt"] == "" or (row["chosen"][0].isspace() and row["rejected"][0].isspace())
    assert not row["prompt"][-1:].isspace()


def test_message_prompts_are_the_common_start() -> None:
    row = with_prompt({"chosen": [user(), assistant("a")], "rejected": [user(), assistant("b")]})
    assert row["prompt"] == [user()]
    repeated = with_prompt({"prompt": "q", "chosen": [user(), assistant("a")], "rejected": [user(), assistant("b")]})
    assert repeated == row


@pytest.mark.parametrize(
    ("file", "columns", "type", "rows"),
    [
        ("gsm8k/train", {"prompt": "question", "completion": "answer"}, "prompt-completion (standard)", 7473),
        ("hh/harmless", None, "preference (standard)", 1700),
        ("humaneval/HumanEval", None, "prompt (standard)", 82),
    ],
)
def test_real_files(file: str, columns: dict[str, str] | None, type: str, rows: int) -> None:
    path = SHARED / f"{file}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{file} is not beside the checkout")
    table = read_table(path, columns=columns)
    assert (table.type, len(table.records)) == (type, rows)
    if file.startswith("hh"):
        assert all(record.values["prompt"].endswith("\n\nAssistant:") for record in table.records)
