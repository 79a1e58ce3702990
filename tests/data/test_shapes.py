"""Rows as others write them: what they become, and what is refused."""

# ruff: noqa: E501

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy_tokenizers as toy

from klimb.data.formats import BadRows, read_rows
from klimb.data.kinds import read_table
from klimb.data.load import load_examples, load_preferences, load_prompts
from klimb.data.render import Renderer
from klimb.data.shapes import ours

SHARED = Path(__file__).parents[3] / "shared" / "data"
CHAT = Renderer(toy.chatml())
TOOL = {"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {"type": "object"}}}
WITH_TOOLS = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + toy.CHATML


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [turn("system", "s"), turn("human", "q"), turn("gpt", "a")]}, {"messages": [said("system", "s"), said("user", "q"), said("assistant", "a")]}),
        ({"conversations": [turn("human", "q"), turn("gpt", "a")], "system": "s", "id": 7}, {"messages": [said("system", "s"), said("user", "q"), said("assistant", "a")], "id": 7}),
        ({"conversation": [said("user", "q"), said("assistant", "a")]}, {"messages": [said("user", "q"), said("assistant", "a")]}),
        ({"conversations": [turn("human", "q")], "chosen": turn("gpt", "a"), "rejected": turn("gpt", "b")}, {"prompt": [said("user", "q")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}),
        ({"conversations": json.dumps([turn("user", "q"), turn("observation", "o"), turn("assistant", "a")])}, {"messages": [said("user", "q"), said("tool", "o"), said("assistant", "a")]}),
        ({"messages": json.dumps([said("user", "q")]), "tools": json.dumps([TOOL])}, {"messages": [said("user", "q")], "tools": [TOOL]}),
        ({"prompt": "Human: is a word", "messages": None}, {"prompt": "Human: is a word", "messages": None}),
    ],
)  # fmt: skip
def test_what_rows_become(row: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(row)
    assert ours(row) == expected
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [turn("human", "q"), turn("gtp", "a")]}, r"conversations\[1\] is from 'gtp', known are human"),
        ({"conversations": [turn("human", "q")]}, "has no assistant message"),
        ({"conversations": [turn("gpt", "a")]}, "starts with an assistant message"),
        ({"conversations": "nonsense"}, "conversations is text, and no JSON"),
        ({"conversations": []}, "has no messages"),
        ({"conversations": [turn("human", "q"), {"from": "gpt"}]}, r"has no content"),
        ({"messages": [said("user", "q"), said("assistant", "a")], "tools": "add"}, "tools is text, and no JSON"),
        ({"messages": [said("user", "q"), said("assistant", "a")], "tools": [3]}, "not a list of objects"),
    ],
)  # fmt: skip
def test_what_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRows, match=reason):
        read_table([row])


def test_labels_as_csv_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,label\nq,a,True\nq,b,0\nq,c,maybe\n")
    table = read_table(tmp_path / "a.csv", on_bad="drop")
    assert [record.values["label"] for record in table.records] == [True, False]
    assert "neither true nor false" in table.problems[0].reason


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b"}, {"messages": [said("user", "q"), said("assistant", "a"), said("user", "r"), said("assistant", "b")]}),
        ({"prompt": "Human: q\n\nAssistant:", "completion": " a\n\nb"}, {"prompt": [said("user", "q")], "completion": [said("assistant", "a\n\nb")]}),
        ({"prompt": "Human: q", "chosen": "a", "rejected": "b"}, {"prompt": [said("user", "q")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}),
        ({"prompt": [said("user", "q")]}, {"prompt": [said("user", "q")]}),
    ],
)  # fmt: skip
def test_transcripts_become_messages(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours(row, transcripts=True) == expected


def test_text_that_is_no_transcript_is_refused_where_some_are_expected() -> None:
    with pytest.raises(BadRows, match="prompt is no transcript"):
        load_prompts([{"prompt": "q"}], CHAT, transcripts="chat")


def test_hh_as_text_and_as_chat() -> None:
    if not (SHARED / "hh").exists():
        pytest.skip("the data is not beside the checkout")
    rows = [row.values for row in read_rows(SHARED / "hh" / "harmless.jsonl.gz")[0]]
    text = load_preferences(rows, CHAT, on_bad="drop")
    chat = load_preferences(rows, CHAT, on_bad="drop", transcripts="chat")
    assert (text.conversational, chat.conversational) == (False, True)
    assert len(chat.items) >= 0.95 * len(text.items) > 1500
    shown = CHAT.tokenizer.decode(chat.items[0].prompt + chat.items[0].chosen)
    assert shown.startswith("<|im_start|>user\nWhat do I do if")
    assert shown.endswith("<|im_end|>")
    assert "Human:" not in shown


# --- tools ---


def test_tools_are_printed_by_the_template_and_kept() -> None:
    renderer = Renderer(toy.chatml(WITH_TOOLS))
    rows = [{"prompt": [said("user", "q")], "tools": [TOOL], "answer": "a"}, {"prompt": [said("user", "q")]}]
    called, plain = load_prompts(rows, renderer).items
    assert called.columns == {"tools": [TOOL], "answer": "a"}
    assert renderer.tokenizer.decode(called.tokens) == f"tools: {json.dumps([TOOL])}\n" + renderer.tokenizer.decode(
        plain.tokens
    )
    assert plain.tokens == CHAT.prompt([said("user", "q")])


@pytest.mark.parametrize("kind", ["pair", "messages", "preference"])
def test_tools_change_the_prompt_and_not_what_is_trained(kind: str) -> None:
    renderer = Renderer(toy.chatml(WITH_TOOLS))
    asked, answer, other = [said("user", "q")], [said("assistant", "a")], [said("assistant", "b")]
    row: dict[str, Any] = {
        "pair": {"prompt": asked, "completion": answer},
        "messages": {"messages": asked + answer},
        "preference": {"prompt": asked, "chosen": answer, "rejected": other},
    }[kind]
    load = load_preferences if kind == "preference" else load_examples
    with_tools, without = load([{**row, "tools": [TOOL]}, row], renderer).items  # type: ignore[operator]
    assert with_tools.id != without.id
    assert renderer.tokenizer.decode(with_tools.prompt).startswith("tools: [{")
    assert with_tools.prompt[-len(without.prompt) :] == without.prompt
    name = "chosen" if kind == "preference" else "completion"
    assert getattr(with_tools, name) == getattr(without, name)


def test_tools_that_would_do_harm_or_get_lost_are_refused() -> None:
    row = {"messages": [said("user", "q"), said("assistant", "a")]}
    forged = {**row, "tools": [{"name": "<|im_end|>"}]}
    with pytest.raises(BadRows, match=r"the tools have '<\|im_end\|>' in them"):
        load_examples([forged], Renderer(toy.chatml(WITH_TOOLS)))
    with pytest.raises(BadRows, match="does not print the row's tools"):
        load_examples([{**row, "tools": [TOOL]}], CHAT)
    assert len(load_examples([{**row, "tools": []}], CHAT).items) == 1


def test_a_call_of_a_tool_may_be_without_words() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for c in m.get('tool_calls') or [] %}call {{ c['function']['name'] }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    messages = [said("user", "q"), call, said("tool", "3"), said("assistant", "a")]
    renderer = Renderer(toy.chatml(template))
    [example] = load_examples([{"messages": messages}], renderer).items
    trained = [token for token, on in zip(example.completion, example.mask) if on]
    assert renderer.tokenizer.decode(trained) == "call add<|im_end|>a<|im_end|>"
